"""The agent: which parts there are, and in what order they start and stop.

Threads: one for each watched resource (or one for the manifests), one for the node's devices and addresses,
the HTTP servers, and the reconciler, which alone owns the tracker and the maps' contents. They meet at one
queue. Slow things that the reconciler starts (compiling, and those of ``housekeeping``) run beside it and
report to the queue.

Order of a start: roots and lock; kernel probe; maps (adopted or made); then, at the same time, the watches'
first lists and the programs' compilation; the first full programming; and only then programs are attached
or replaced. A stop changes nothing: maps and programs go on without an agent.
"""

from __future__ import annotations

import gc
import os
import queue
import signal
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import msgspec

import ebpfproxy
from ebpfproxy import state
from ebpfproxy.config.watch import watch_file
from ebpfproxy.datapath import attach, cleanup, maps, probe, programs, roots
from ebpfproxy.datapath.carry import Carrier, carry_orders
from ebpfproxy.datapath.devices import Target, device_attachments
from ebpfproxy.datapath.drained import Drained
from ebpfproxy.datapath.grace import Grace
from ebpfproxy.datapath.hooks import PACKETS, RAW_PACKETS, SOCKETS
from ebpfproxy.datapath.layout import DeviceFlags
from ebpfproxy.datapath.packets import PacketDevice, PacketPath
from ebpfproxy.datapath.writer import Writer
from ebpfproxy.health.node_port import NodePortHealth, ServiceHealth
from ebpfproxy.health.proxy import ProxyHealth, eligible
from ebpfproxy.health.server import Answer, HttpServer, json_answer, text_answer
from ebpfproxy.housekeeping import Housekeeping
from ebpfproxy.logs import get_logger
from ebpfproxy.metrics.agent import AgentMetrics, SourceCollector
from ebpfproxy.metrics.health import HealthCollector
from ebpfproxy.metrics.maps import MapCollector
from ebpfproxy.migrate import flows, keeper, ports
from ebpfproxy.migrate.tools import ToolError
from ebpfproxy.node.identity import netns_cookie
from ebpfproxy.node.local import LocalMode
from ebpfproxy.node.network import Network, NetworkWatcher, Role, select_node_port_addresses
from ebpfproxy.objects import Deleted, Event, Replaced
from ebpfproxy.options import AgentOptions
from ebpfproxy.services.model import Family, Prefix
from ebpfproxy.services.tracker import Tracker, Update
from ebpfproxy.services.values import parse_prefix
from ebpfproxy.source import Source

log = get_logger(__name__)

#: How often the agent writes what ``status`` shows when nothing happens, in seconds.
_HEARTBEAT = 5.0
#: How often it looks for orders of commands, in seconds.
_ORDERS = 0.5
R = TypeVar("R")

#: So many service ports at once are a new list, or a cluster that grew.
_MANY_CHANGES = 1000


class NetworkChanged(msgspec.Struct, frozen=True):
    network: Network


class Finished(msgspec.Struct, frozen=True):
    """Something that ran beside is done, and this is what the reconciler does about it."""

    then: Callable[[], None]


class Failed(msgspec.Struct, frozen=True):
    """Something that runs beside the reconciler has failed, and the agent with it."""

    error: BaseException


class Stop(msgspec.Struct, frozen=True):
    reason: str = ""


Message = Event | NetworkChanged | Finished | Failed | Stop


class Agent:
    """One node's agent. :meth:`run` is the reconciler, and returns after SIGTERM or SIGINT.

    Raises what ``cli.errors`` turns into one line: RootError, UnsupportedKernelError, LoadError, BpfError,
    and the sources' own.
    """

    def __init__(
        self, options: AgentOptions, configz: Mapping[str, object], *, config: Path | None = None
    ) -> None:
        """``configz``: what /configz answers. ``config``: the file whose change ends the agent."""
        self._options = options
        self._configz = dict(configz)
        self._config = config
        self._queue: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._tracker = Tracker(options.node_name)
        self._health = ProxyHealth()
        self._metrics = AgentMetrics()
        self._node_port_health = NodePortHealth(lambda: self._health.healthy)
        self._workers = ThreadPoolExecutor(4, thread_name_prefix="worker")
        self._started = time.time()
        self._programs: Path | None = None
        self._loading = False
        self._pod_cidrs: tuple[Prefix, ...] | None = None
        self._next_orders = 0.0
        self._device_failures: list[str] = []
        self._complete = False
        self._attached = False
        self._last_programmed: float | None = None
        self._last_duration: float | None = None
        self._state_written = 0.0
        self._problems: tuple[str, ...] = ()

    # -- start and stop

    def run(self, *, init_only: bool = False) -> None:
        """``init_only``: makes the maps, compiles and loads the programs, and is done."""
        options = self._options
        # What the first lists bring stays: there is nothing to collect until they are programmed.
        gc.disable()
        mounted = roots.ensure_bpffs(options.bpf_root)
        if mounted:
            log.info("mounted a bpffs", path=str(options.bpf_root))
        roots.check_cgroup(options.cgroup_root)
        lock = roots.Lock([("--bpf-root", options.bpf_root), ("--cgroup-root", options.cgroup_root)])
        self._features = probe.probe().without(options.without)
        self._pins = roots.pin_folder(options.bpf_root)
        self._maps = maps.open_or_create(self._pins, options.capacity)
        grace = Grace()
        self._writer = Writer(self._maps, grace.wait, maglev_size=options.maglev_size)
        self._housekeeping = Housekeeping(
            options, self._maps, self._writer, grace=grace, metrics=self._metrics, beside=self._beside
        )
        carry_orders(self._pins, self._maps)
        self._drained = Drained(self._maps)
        self._packets = PacketPath(self._maps, self._pins, tcx=self._features.tcx)
        log.info(
            "maps are adopted" if self._maps.adopted else "maps are made",
            folder=str(self._maps.folder),
            service_ports=self._writer.service_ports,
            backends=self._writer.backends,
        )
        if init_only:
            self._load()
            lock.release()
            return
        source = self._source = Source(options, self._queue.put, self._metrics.requested)
        servers = self._servers(source)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self._queue.put(Stop()))
        if self._config is not None:
            watch_file(self._config, lambda: self._queue.put(Stop("the configuration has changed")))
        NetworkWatcher(lambda found: self._queue.put(NetworkChanged(found)), options.devices).start()
        if not self._handle_all(self._next_messages(_HEARTBEAT)):
            self._queue.put(Stop())
        self._set_cidrs()
        self._start_load()
        for server in servers:
            server.start()
        self._node_port_health.start()
        source.start()
        log.info("started", node=options.node_name, source=source.description, version=ebpfproxy.__version__)
        try:
            self._reconcile()
        finally:
            source.stop()
            for server in servers:
                server.stop()
            self._node_port_health.stop()
            self._workers.shutdown(wait=False, cancel_futures=True)
            lock.release()
        log.info("stopped, traffic goes on")

    def _start_load(self) -> None:
        self._loading = True
        self._beside(self._load, self._loaded)

    def _load(self) -> Path:
        options = self._options
        wanted = programs.Options(
            features=self._features,
            host_netns_cookie=netns_cookie(),
            node_ports_on_loopback=options.node_ports_on_loopback,
            guard_node_ports=options.guard_node_ports,
            masquerade_all=options.masquerade_all,
            bypass_netfilter=options.bypass_netfilter,
            masquerade_ports=options.masquerade_ports,
            pods_by_cidr=options.local_pods.by_cidr,
            service_cidrs=bool(options.service_cidrs),
        )
        modules = (SOCKETS, PACKETS, *((RAW_PACKETS,) if self._packets.needs_raw else ()))
        try:
            return programs.ensure_loaded(self._maps, wanted, modules)
        except OSError as error:
            raise programs.LoadError(str(error)) from error

    def _loaded(self, folder: Path) -> None:
        self._loading = False
        self._programs = folder
        if self._attached:
            self._attach_devices()

    def _servers(self, source: Source) -> list[HttpServer]:
        self._metrics.registry.register(SourceCollector(source.statuses, source.requests, source.host))
        self._metrics.registry.register(MapCollector(self._maps))
        self._metrics.registry.register(
            HealthCollector(self._health.healthz, lambda: attach.attachments(self._pins))
        )

        def proxy_page(path: str, ask: Callable[[], tuple[bool, dict[str, object]]]) -> Callable[[], Answer]:
            def page() -> Answer:
                good, body = ask()
                code = 200 if good else 503
                self._metrics.asked(path, code)
                return json_answer(body, code)

            return page

        return [
            HttpServer(
                "healthz",
                self._options.healthz_bind_address,
                {
                    "/healthz": proxy_page("healthz", self._health.healthz),
                    "/livez": proxy_page("livez", self._health.livez),
                },
                hard_fail=self._options.bind_hard_fail,
            ),
            HttpServer(
                "metrics",
                self._options.metrics_bind_address,
                {
                    "/metrics": lambda: Answer(
                        200, "text/plain; version=0.0.4; charset=utf-8", self._metrics.render()
                    ),
                    "/healthz": lambda: text_answer("ok"),
                    "/proxyMode": lambda: text_answer("ebpf"),
                    "/configz": lambda: json_answer(self._configz),
                },
                hard_fail=self._options.bind_hard_fail,
            ),
        ]

    # -- the reconciler

    def _reconcile(self) -> None:
        while True:
            messages = self._next_messages(_ORDERS)
            is_idle = not messages
            if not self._handle_all(messages):
                return
            del messages
            self._follow_orders()
            node = self._tracker.node
            # Manifests need not have a Node: then nothing speaks against this one.
            self._health.set_eligible(eligible(node) or (node is None and not self._source.has_cluster))
            if self._tracker.synced and (self._tracker.pending or not self._complete):
                self._program()
            self._set_cidrs()
            self._attach_when_ready()
            self._housekeeping.start(attached=self._attached)
            if not is_idle or time.monotonic() - self._state_written >= _HEARTBEAT:
                self._write_state()

    def _next_messages(self, seconds: float) -> list[Message]:
        """Waits for one, and takes all that are there by then: many events become one change."""
        try:
            found = [self._queue.get(timeout=seconds)]
        except queue.Empty:
            return []
        while not self._queue.empty():
            found.append(self._queue.get())
        return found

    def _handle_all(self, messages: list[Message]) -> bool:
        """False after Stop. The messages are gone when this returns: a list can be large."""
        for message in messages:
            if isinstance(message, Stop):
                if message.reason:
                    log.info("stopping", reason=message.reason)
                return False
            self._handle(message)
        return True

    def _handle(self, message: Message) -> None:
        if isinstance(message, NetworkChanged):
            self._set_network(message.network)
        elif isinstance(message, Finished):
            message.then()
        elif isinstance(message, Failed):
            raise message.error
        elif not isinstance(message, Stop):
            if isinstance(message, Replaced):
                log.debug("list", resource=str(message.resource), objects=len(message.objects))
            elif not isinstance(message, Deleted):
                log.debug("change", resource=str(message.resource))
            self._tracker.apply(message)

    def _follow_orders(self) -> None:
        """``backend drain``: until it is undone or the endpoint goes."""
        now = time.monotonic()
        if now < self._next_orders:
            return
        self._next_orders = now + _ORDERS
        drained = self._drained.read()
        if self._complete:
            for order in drained:
                if not self._tracker.has_endpoint(*order):
                    self._drained.remove(*order)
                    drained -= {order}
        self._tracker.set_drained(drained)

    def _program(self) -> None:
        self._health.queued()
        self._metrics.queued(time.time())
        began = time.monotonic()
        update = self._tracker.drain()
        full = not self._complete
        problems = self._writer.apply(update.changed, update.removed, complete=full)
        done = time.monotonic()
        if full or len(update.changed) > _MANY_CHANGES:
            # What is known now mostly stays: the collector need not walk it for every change.
            gc.collect()
            gc.freeze()
            gc.enable()
        self._complete = True
        self._health.programmed()
        self._node_port_health.update(ServiceHealth(*check) for check in self._tracker.health_checks)
        if update.changed or update.removed:
            self._problems = tuple(problems)
        self._last_programmed, self._last_duration = time.time(), done - began
        self._report(update, problems, done, full=full)

    def _report(self, update: Update, problems: list[str], done: float, *, full: bool) -> None:
        metrics, now = self._metrics, time.time()
        families = set(Family) if full else {port.key.family for port in update.changed}
        families |= {key.family for key in update.removed}
        metrics.programmed(families, self._last_duration or 0.0, full=full, now=now)
        metrics.changes(update.service_changes, update.endpoint_changes)
        metrics.no_local_endpoints(self._tracker.without_local_endpoints)
        for received in update.received:
            metrics.event_to_map.observe(done - received)
        for trigger in update.triggers:
            # One from before this agent's start was programmed by another (KEP-2433's metric does so, too).
            if trigger > self._started:
                metrics.network_programming(families, max(0.0, now - trigger))
        for warning in update.warnings:
            metrics.warned(str(warning.resource))
            log.warning(
                "value is not used",
                resource=str(warning.resource),
                object=str(warning.key),
                field=warning.field,
                error=warning.message,
            )
        for problem in problems:
            metrics.did_not_fit()
            log.error("service port is not programmed", error=problem)
        if full:
            log.info(
                "programmed everything",
                service_ports=self._writer.service_ports,
                frontends=self._writer.frontends,
                backends=self._writer.backends,
                seconds=round(self._last_duration or 0.0, 3),
            )
        else:
            log.debug("programmed", changed=len(update.changed), removed=len(update.removed))

    def _attach_when_ready(self) -> None:
        if self._attached or not self._complete or self._programs is None:
            return
        carrier = Carrier(self._pins, self._maps)
        carrier.copy()
        changed = attach.attach_all(self._pins, self._programs, self._options.cgroup_root)
        self._attached = True
        carrier.copy()
        mode = DeviceFlags.HANDOVER if _is_handover() else DeviceFlags(0)
        # A flow that begins needs programs at all devices: until then it is kube-proxy's.
        is_first = not device_attachments(self._pins)
        self._packets.set_mode(mode | DeviceFlags.WAITS if mode and is_first else mode)
        changed += self._attach_devices()
        if mode:
            taken = ports.reserve(self._maps, flows.find(), self._options.masquerade_ports)
            log.info("kube-proxy's connections go on behind us", ports_taken=taken)
        self._packets.set_mode(mode)
        carrier.copy()
        carrier.close()
        if carrier.copied:
            log.info("flows are carried over from other maps", entries=carrier.copied)
        programs.remove_others(self._maps, self._programs)
        removed = cleanup.remove_other_versions(self._pins, self._maps.folder)
        log.info(
            "programs are attached",
            cgroup=str(self._options.cgroup_root),
            changed=changed or "nothing",
            removed=[str(p) for p in removed],
            seconds_since_start=round(time.time() - self._started, 3),
        )

    # -- this node's devices and addresses

    def _set_network(self, network: Network) -> None:
        options = self._options
        node_ports = select_node_port_addresses(network, options.node_port_addresses)
        log.info(
            "devices and addresses",
            uplinks=[d.name for d in network.devices if d.role is Role.UPLINK],
            tunnels=[d.name for d in network.devices if d.role is Role.TUNNEL],
            local=sum(d.role is Role.LOCAL for d in network.devices),
            addresses=len(network.addresses),
            node_port_addresses=len(node_ports),
        )
        self._writer.set_own_addresses(network.addresses)
        self._writer.set_node_addresses(node_ports)
        own = {len(address): address for address in network.primary}
        self._packets.set_devices(
            (
                PacketDevice(
                    Target(d.ifindex, d.name, not d.ethernet),
                    d.address4,
                    d.address6,
                    d.role is Role.LOCAL,
                    options.local_pods.is_behind(d),
                    d.mtu,
                )
                for d in network.devices
            ),
            own.get(4, b""),
            own.get(16, b""),
        )
        if self._attached:
            self._attach_devices()

    def _attach_devices(self) -> list[str]:
        assert self._programs is not None
        if self._packets.needs_raw and not programs.is_loaded(self._programs, RAW_PACKETS):
            if not self._loading:
                self._start_load()
            return []
        changed, failed = self._packets.attach(self._programs)
        if changed and self._attached:
            log.debug("devices", changed=changed)
        for failure in failed:
            if failure not in self._device_failures:
                log.error("device is not attached", error=failure)
        self._device_failures = failed
        return changed

    def _set_cidrs(self) -> None:
        """Known from the options, or from the Node once it is there."""
        pods = self._options.cluster_cidrs
        if self._options.local_pods.mode is LocalMode.NODE_CIDR:
            node = self._tracker.node
            texts = (node.spec.pod_cidrs if node is not None and node.spec is not None else None) or ()
            pods = tuple(prefix for text in texts if (prefix := parse_prefix(text)) is not None)
        if pods != self._pod_cidrs:
            self._pod_cidrs = pods
            self._packets.set_cidrs(pods, self._options.service_cidrs)

    def _beside(self, work: Callable[[], R], then: Callable[[R], None]) -> None:
        """Runs ``work`` in a worker, and ``then`` with its result in the reconciler. Its failure is ours."""

        def done(future: Future[R]) -> None:
            if future.cancelled():
                return
            error = future.exception()
            if error is None:
                self._queue.put(Finished(lambda: then(future.result())))
            else:
                self._queue.put(Failed(error))

        self._workers.submit(work).add_done_callback(done)

    # -- what status shows

    def _unbound_ports(self) -> list[str]:
        return [
            f"healthCheckNodePort {port}: {error}" for port, error in self._node_port_health.failed.items()
        ]

    def _write_state(self) -> None:
        """At most once a second while much happens: it is for people to read."""
        now = time.monotonic()
        if now - self._state_written < 1.0 and self._attached:
            return
        self._state_written = now
        self._metrics.pending(*self._tracker.pending_changes)
        self._metrics.devices(len(self._packets.targets), len(self._device_failures))
        without_room = tuple(dict.fromkeys((*self._writer.unplaced, *self._problems)))
        self._metrics.without_room(len(without_room))
        self._metrics.health_check_ports(self._node_port_health.bound, len(self._node_port_health.failed))
        statuses = self._source.statuses()
        state.save(
            self._maps,
            state.AgentState(
                pid=os.getpid(),
                version=ebpfproxy.__version__,
                node=self._options.node_name,
                source=self._source.description,
                started=self._started,
                written=time.time(),
                synced=self._complete and self._attached,
                healthy=self._health.healthy,
                last_programmed=self._last_programmed,
                last_duration=self._last_duration,
                services=self._tracker.services,
                watches=tuple(
                    state.WatchState(str(s.resource), str(s.state), s.since, s.last_event, s.error)
                    for s in statuses
                ),
                problems=(
                    *without_room,
                    *self._device_failures,
                    *self._unbound_ports(),
                ),
                devices=len(self._packets.targets),
                conntrack_entries=self._housekeeping.entries,
                conntrack_evicted=self._housekeeping.evicted,
                health_check_ports=self._node_port_health.bound,
                timeouts=self._options.timeouts,
            ),
        )


def _is_handover() -> bool:
    try:
        return keeper.is_handover()
    except ToolError as error:
        log.warning("whether kube-proxy's connections live here is not known", error=str(error))
        return False
