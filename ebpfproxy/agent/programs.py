"""The programs: loaded in a worker, attached once the maps are complete, then kept on all devices.

Only :meth:`ProgramManager.load` runs outside the reconciler's thread.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from ebpfproxy.agent.agent_options import AgentOptions
from ebpfproxy.agent.background import BackgroundRunner
from ebpfproxy.agent.handover import Handover
from ebpfproxy.config.datapath import ExternalTraffic, Xdp
from ebpfproxy.datapath.abi.decision_layout import TracingPrograms
from ebpfproxy.datapath.abi.hooks import (
    FORWARDING,
    GUARD,
    LOOPBACK,
    MEASURE,
    PACKETS,
    RAW_PACKETS,
    RECORDS,
    REPORT,
    SOCKETS,
    SWEEP,
    Hook,
    Module,
)
from ebpfproxy.datapath.abi.node_layout import DeviceFlags
from ebpfproxy.datapath.flows.decision_reports import DecisionReports
from ebpfproxy.datapath.flows.map_migration import MapMigration
from ebpfproxy.datapath.flows.record_programs import RecordPrograms
from ebpfproxy.datapath.kernel.maps import MapSet, pin_again, unpinned
from ebpfproxy.datapath.kernel.probe import Features
from ebpfproxy.datapath.node.packets import PacketPath
from ebpfproxy.datapath.programs import attach, detach, loader, xdp_chain
from ebpfproxy.datapath.programs.attach import Drifted
from ebpfproxy.datapath.programs.devices import device_attachments
from ebpfproxy.datapath.programs.xdp_places import XdpMode
from ebpfproxy.logs import get_logger
from ebpfproxy.netlink.namespaces import netns_cookie

log = get_logger(__name__)

#: The time between two attempts to attach to devices that failed.
_RETRY_SECONDS = 10.0
_XDP_MODES: dict[Xdp, tuple[XdpMode, ...]] = {
    Xdp.NONE: (),
    Xdp.NATIVE: (XdpMode.NATIVE,),
    Xdp.GENERIC: (XdpMode.NATIVE, XdpMode.GENERIC),
}


class ProgramDrift(NamedTuple):
    """Programs that somebody has detached or replaced, by hook and by device, and pins that are gone."""

    hooks: Sequence[Drifted] = ()
    devices: Mapping[int, Sequence[Drifted]] = {}
    unpinned: Sequence[str] = ()

    def __bool__(self) -> bool:
        return bool(self.hooks or self.devices or self.unpinned)


class ProgramManager:
    """Programs stay attached when the agent stops: the next one replaces them."""

    def __init__(
        self,
        options: AgentOptions,
        maps: MapSet,
        pins: Path,
        features: Features,
        background: BackgroundRunner,
        *,
        handover: Handover,
    ) -> None:
        self._options = options
        self._maps = maps
        self._pins = pins
        self._features = features
        self._background = background
        self._handover = handover
        #: The devices and ranges that packet programs know; ``NodeNetwork`` sets them.
        self.packets = PacketPath(
            maps,
            pins,
            tcx=features.tcx,
            loopback=options.node_ports_on_loopback,
            xdp=_XDP_MODES[options.xdp],
        )
        self._programs: Path | None = None
        self._loading = False
        #: True if the attached programs report decisions, or those that are to be.
        self._reports = options.trace_decisions
        #: Why they cannot; nothing is tried again before nobody wants them to.
        self._cannot_report = ""
        self._next_try = 0.0
        #: True after the first time: from then on programs follow the node's devices.
        self.attached = False
        #: What changes records of sockets, from the same time on.
        self.for_records: RecordPrograms | None = None
        #: The options that the programs are loaded with; None before they are.
        self.loaded_with: loader.Options | None = None
        #: Reports decisions of the agent, while programs report theirs.
        self.reports: DecisionReports | None = None
        #: Devices that could not be attached to, with the reasons.
        self.failures: list[str] = []

    @property
    def folder(self) -> Path | None:
        """The folder where the attached programs are pinned; None before they are attached."""
        return self._programs if self.attached else None

    @property
    def is_loading(self) -> bool:
        """True while programs are loaded, and perhaps replaced after that."""
        return self._loading

    # -- loading

    def start_load(self) -> None:
        self._loading = True
        reports = self._reports
        self._background(lambda: self.load(reports=reports), self._loaded)

    def load(self, *, reports: bool) -> Path:
        """Compiles and loads the programs, unless they are pinned already. Raises LoadError.

        ``reports``: those that report decisions.
        """
        options = self._options
        wanted = loader.Options(
            features=self._features,
            host_netns_cookie=netns_cookie(),
            node_ports_on_loopback=options.node_ports_on_loopback,
            pod_sockets=options.pod_sockets,
            masquerade_all=options.masquerade_all,
            bypass_netfilter=options.bypass_netfilter,
            masquerade_ports=options.masquerade_ports,
            masquerade_ports_shared=options.masquerade_ports_shared,
            forwards_at_xdp=options.xdp is not Xdp.NONE,
            dsr_accepts=options.external_traffic_mode is not ExternalTraffic.SNAT,
            dsr_sends=options.external_traffic_mode is ExternalTraffic.DSR,
            pods_by_cidr=options.local_pods.by_cidr,
            trace_decisions=reports,
            measure_connections=options.measure_connections,
            measure_traffic=options.measure_traffic,
        )
        try:
            folder = loader.ensure_loaded(self._maps, wanted, self._modules(reports=reports))
        except OSError as error:
            raise loader.LoadError(str(error)) from error
        if options.xdp is not Xdp.NONE and not xdp_chain.obstacle():
            try:
                loader.ensure_extension(self._maps, wanted, folder)
            except loader.LoadError as error:
                # It is needed only beside XDP programs of others.
                log.info("the XDP program cannot be chained to others", error=str(error))
        self.loaded_with = wanted
        return folder

    @property
    def _optional_modules(self) -> tuple[Module, ...]:
        """Those of optional hooks at sockets."""
        options = self._options
        return (
            *((GUARD,) if options.guard_node_ports else ()),
            *((MEASURE,) if options.measure_connections or options.measure_traffic else ()),
        )

    @property
    def _optional_hooks(self) -> tuple[Hook, ...]:
        return tuple(hook for module in self._optional_modules for hook in module.hooks)

    def _modules(self, *, reports: bool) -> tuple[Module, ...]:
        options = self._options
        return (
            SOCKETS,
            RECORDS,
            PACKETS,
            SWEEP,
            *((REPORT,) if reports else ()),
            *self._optional_modules,
            *((LOOPBACK,) if options.node_ports_on_loopback else ()),
            *((RAW_PACKETS,) if self.packets.needs_raw else ()),
            *((FORWARDING,) if options.xdp is not Xdp.NONE else ()),
        )

    def _loaded(self, folder: Path) -> None:
        self._loading = False
        self._programs = folder
        if self.attached:
            self._attach_devices()

    # -- what others have done

    def drifted(self) -> ProgramDrift:
        """What has been detached, replaced or unpinned since it was attached. Any thread may ask."""
        programs = self._programs
        if programs is None or not self.attached or self._loading:
            return ProgramDrift()
        unloaded = [
            module.source
            for module in self._modules(reports=self._reports)
            if not loader.is_loaded(programs, module)
        ]
        return ProgramDrift(
            attach.drifted(self._pins, programs, self._options.cgroup_root, self._optional_hooks)
            if not unloaded
            else [],
            self.packets.drifted() if not unloaded else {},
            [*unloaded, *(f"map {name}" for name in unpinned(self._maps))],
        )

    def repair(self, found: ProgramDrift) -> None:
        """Attaches, loads and pins what was found. What is unloaded is attached once it is loaded again."""
        pin_again(self._maps)
        if found.unpinned and not self._loading:
            self.start_load()
        if self._programs is None or self._loading:
            return
        if found.hooks:
            self._attach_sockets(self._programs)
        if found.devices:
            self.packets.forget(found.devices)
            self._attach_devices()

    # -- attaching

    def attach(self, started: float) -> None:
        """Attaches everything once programs are loaded, and after that to devices that failed.

        ``started``: the agent's start, in Unix seconds.
        """
        if self.attached:
            may_change = self.failures or self._options.xdp is not Xdp.NONE
            if may_change and time.monotonic() >= self._next_try:
                self._attach_devices()
        elif self._programs is not None:
            self._attach_first(self._programs, started)

    def _attach_first(self, programs: Path, started: float) -> None:
        """Attaches to sockets, then to devices, and removes what was used before.

        Flows and records of sockets in maps of other sizes are copied before each step, and after the last:
        some may have begun meanwhile.
        """
        for_records = RecordPrograms(programs)
        migration = MapMigration(self._pins, self._maps, for_records)
        migration.copy()
        changed = self._attach_sockets(programs, has_other_maps=migration.has_others)
        self.attached = True
        self._open_reports()
        self.for_records = for_records
        migration.copy()
        changed += self._attach_first_devices(migration)
        attach.drop_former(self._pins, programs)
        migration.close()
        if migration.copied:
            log.info("copied flows from maps of other sizes", entries=migration.copied)
        loader.remove_others(self._maps, programs)
        removed = detach.remove_other_versions(self._pins, self._maps.folder)
        log.info(
            "programs are attached",
            cgroup=str(self._options.cgroup_root),
            changed=changed or "nothing",
            removed=[str(p) for p in removed],
            seconds_since_start=round(time.time() - started, 3),
        )

    def _attach_first_devices(self, migration: MapMigration) -> list[str]:
        """Attaches to all devices. Meanwhile packet programs are told which flows they must leave alone."""
        mode = DeviceFlags.HANDOVER_MODE if self._handover.is_under_way() else DeviceFlags(0)
        # A new flow needs programs at all devices: until they are there it is kube-proxy's.
        is_first = not device_attachments(self._pins)
        migrating = DeviceFlags.MIGRATING_FLOWS if migration.has_others else DeviceFlags(0)
        self.packets.set_mode(mode | (DeviceFlags.NO_NEW_FLOWS if mode and is_first else migrating))
        migration.catch_up()
        changed = self._attach_devices()
        if mode:
            taken = self._handover.reserve_ports(self._maps, self._options.masquerade_ports)
            log.info("leaving existing connections to netfilter", ports_taken=taken)
        self.packets.set_mode(mode | migrating)
        migration.copy()
        self.packets.set_mode(mode)
        return changed

    def devices_changed(self) -> None:
        """Attaches to devices that are new, once the others have their programs."""
        if self.attached:
            self._attach_devices()

    def _attach_sockets(self, programs: Path, *, has_other_maps: bool = False) -> list[str]:
        return attach.attach_all(
            self._pins,
            programs,
            self._options.cgroup_root,
            self._optional_hooks,
            has_other_maps=has_other_maps,
        )

    def _attach_devices(self) -> list[str]:
        assert self._programs is not None
        if self.packets.needs_raw and not loader.is_loaded(self._programs, RAW_PACKETS):
            if not self._loading:
                self.start_load()
            return []
        self._next_try = time.monotonic() + _RETRY_SECONDS
        changed, failed = self.packets.attach(self._programs)
        for change in self.packets.attach_xdp(self._programs):
            log.info("XDP at a device", change=change)
        if changed and self.attached:
            log.debug("attached to devices", changed=changed)
        for failure in failed:
            if failure not in self.failures:
                log.error("failed to attach to a device, trying again", error=failure)
        self.failures = failed
        return changed

    # -- programs that report decisions, in the place of those that do not

    @property
    def reporting(self) -> TracingPrograms:
        """Which of them are attached."""
        if self._cannot_report:
            return TracingPrograms.FAILED
        is_done = self.attached and self._reports and not self._loading
        return TracingPrograms.REPORTING if is_done else TracingPrograms.PLAIN

    def report_decisions(self, wanted: bool) -> None:
        """Begins to replace all programs where they do not report decisions as ``wanted``.

        Each is replaced in one step, and both kinds use the same maps: connections do not notice.
        """
        if not wanted:
            self._cannot_report = ""
        if not self.attached or self._loading or self._cannot_report or wanted == self._reports:
            return
        self._loading = True

        def load() -> Path | loader.LoadError:
            try:
                return self.load(reports=wanted)
            except loader.LoadError as error:
                return error

        def loaded(found: Path | loader.LoadError) -> None:
            self._loading = False
            if isinstance(found, loader.LoadError):
                # The agent serves without them.
                self._cannot_report = str(found)
                log.error("failed to load programs that report decisions", error=str(found))
            else:
                self._replace(found, reports=wanted)

        self._background(load, loaded)

    def stop_reporting(self) -> None:
        """Attaches plain programs at once, which are pinned still, and unpins the others: the agent ends."""
        if not self.attached or self._options.trace_decisions:
            return
        if self._reports:
            self._replace(self.load(reports=False), reports=False)
        # What a worker pins just now is left to the next start.
        if self._programs is not None and not self._loading:
            loader.remove_others(self._maps, self._programs)

    def _replace(self, programs: Path, *, reports: bool) -> None:
        """The former ones stay pinned: the next time nothing has to be loaded."""
        self._programs, self._reports = programs, reports
        changed = self._attach_sockets(programs) + self._attach_devices()
        self._open_reports()
        log.info("replaced programs", report_decisions=reports, changed=len(changed))

    def _open_reports(self) -> None:
        # A worker may use the one before, which is closed with its last user.
        self.reports = DecisionReports(self._programs) if self._reports and self._programs else None
