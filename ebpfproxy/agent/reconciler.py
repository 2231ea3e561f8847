"""The agent: which parts there are, and in what order they start and stop.

Threads: one for each watched resource (or one for the manifests), one for the node's devices and addresses,
the HTTP servers, one that sends events, and the reconciler, which alone owns the tracker and the maps'
contents. They meet at one queue. Slow things that the reconciler starts (compiling, and those of
``housekeeping``) run beside it and report to the queue.

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
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import msgspec

import ebpfproxy
from ebpfproxy.agent import http, kube_events, reports, state
from ebpfproxy.agent.handover import Handover
from ebpfproxy.agent.housekeeping import Housekeeping
from ebpfproxy.agent.options import AgentOptions
from ebpfproxy.agent.programs import ProgramManager
from ebpfproxy.agent.source import Source
from ebpfproxy.config.file_watch import watch_file
from ebpfproxy.config.masquerade_ports import shared_remark
from ebpfproxy.datapath.flows.map_migration import carry_orders
from ebpfproxy.datapath.kernel import maps, probe, roots
from ebpfproxy.datapath.kernel.grace import Grace
from ebpfproxy.datapath.programs import attach
from ebpfproxy.datapath.programs.devices import LOOPBACK
from ebpfproxy.datapath.services.drained import Drained
from ebpfproxy.datapath.services.writer import Writer
from ebpfproxy.health.node_port import NodePortHealth, ServiceHealth
from ebpfproxy.health.proxy import ProxyHealth, eligible
from ebpfproxy.health.server import HttpServer
from ebpfproxy.kube.objects import Deleted, Event, ObjectKey, Replaced
from ebpfproxy.logs import get_logger
from ebpfproxy.metrics.agent_metrics import AgentMetrics, SourceCollector
from ebpfproxy.metrics.health_metrics import HealthCollector
from ebpfproxy.metrics.map_metrics import MapCollector
from ebpfproxy.netlink.namespaces import netns_cookie
from ebpfproxy.netlink.routes import Routes
from ebpfproxy.node.facts import Facts, NodeFacts, node_facts
from ebpfproxy.node.network import Device, network_of
from ebpfproxy.node.network_watcher import NetworkWatcher
from ebpfproxy.node.node_ports import select_node_port_addresses
from ebpfproxy.node.roles import Role
from ebpfproxy.services.tracker import Tracker

log = get_logger(__name__)

#: How often the agent writes what ``status`` shows when nothing happens, in seconds.
_HEARTBEAT = 5.0
#: At least so long between two of what happens, in seconds.
_STATE_REST = 0.25
#: How often it looks for orders of commands, in seconds.
_ORDERS = 0.5
#: So many service ports at once are a new list, or a cluster that grew.
_MANY_CHANGES = 1000


R = TypeVar("R")


class NetworkChanged(msgspec.Struct, frozen=True):
    facts: Facts


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
        self,
        options: AgentOptions,
        configz: Mapping[str, object],
        *,
        handover: Handover,
        config: Path | None = None,
        init_only: bool = False,
    ) -> None:
        """Changes nothing on this node, and finds what of the options is wrong.

        ``configz``: what /configz answers. ``config``: the file whose change ends the agent. ``init_only``:
        :meth:`run` makes the maps, compiles and loads the programs, and is done.
        """
        self._options = options
        self._configz = dict(configz)
        self._config = config
        self._queue: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._tracker = Tracker(options.node_name)
        self._health = ProxyHealth()
        self._metrics = AgentMetrics()
        self._node_port_health = NodePortHealth(lambda: self._health.healthy, self._health_port_not_bound)
        self._workers = ThreadPoolExecutor(4, thread_name_prefix="worker")
        self._started = time.time()
        self._next_orders = 0.0
        self._complete = False
        self._last_programmed: float | None = None
        self._last_duration: float | None = None
        self._state_written = 0.0
        self._synced_written = False
        self._state_is_old = False
        self._told_failures: set[str] = set()
        self._init_only = init_only
        self._handover = handover
        roots.check_cgroup(options.cgroup_root)
        if not init_only:
            self._source = Source(options, self._queue.put, self._metrics.requested, self._metrics.event)
        self._facts = Facts()
        self._node_facts = NodeFacts()
        self._devices: dict[int, Device] = {}

    # -- start and stop

    def run(self) -> None:
        options = self._options
        # What the first lists bring stays: there is nothing to collect until they are programmed.
        gc.disable()
        mounted = roots.ensure_bpffs(options.bpf_root)
        if mounted:
            log.info("mounted a bpffs", path=str(options.bpf_root))
        lock = roots.Lock([("--bpf-root", options.bpf_root), ("--cgroup-root", options.cgroup_root)])
        features = probe.probe().without(options.without)
        pins = roots.pin_folder(options.bpf_root)
        self._maps = maps.open_or_create(pins, options.capacity)
        # What is known of the node stays while the API server is away.
        if (last := state.load_latest(pins)) is not None and last.node == options.node_name:
            self._node_facts = last.node_facts
        grace = Grace()
        self._writer = Writer(
            self._maps,
            grace.wait,
            maglev_size=options.maglev_size,
            absence=options.stale_tcp_seconds,
            source_towards=Routes().source_towards,
        )
        self._housekeeping = Housekeeping(
            options, self._maps, self._writer, grace=grace, metrics=self._metrics, background=self._background
        )
        self._programs = ProgramManager(
            options, self._maps, pins, features, self._background, handover=self._handover
        )
        carry_orders(pins, self._maps)
        self._drained = Drained(self._maps)
        log.info(
            "maps are adopted" if self._maps.adopted else "maps are made",
            folder=str(self._maps.folder),
            service_ports=self._writer.service_ports,
            backends=self._writer.backends,
        )
        if self._init_only:
            self._programs.load()
            lock.release()
            return
        source = self._source
        registry = self._metrics.registry
        registry.register(SourceCollector(source.statuses, source.requests, source.host))
        registry.register(MapCollector(self._maps))
        registry.register(HealthCollector(self._health.healthz, lambda: attach.attachments(pins)))
        servers = self._servers = http.servers(options, self._health, self._metrics, self._configz)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self._queue.put(Stop()))
        if self._config is not None:
            watch_file(self._config, lambda: self._queue.put(Stop("the configuration has changed")))
        NetworkWatcher(lambda found: self._queue.put(NetworkChanged(found))).start()
        if not self._handle_all(self._next_messages(_HEARTBEAT)):
            self._queue.put(Stop())
        self._programs.set_pod_cidrs(self._node_facts)
        self._programs.start_load()
        source.record(kube_events.starting(options.node_name))
        self._serve(servers)
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

    def _serve(self, servers: Iterable[HttpServer]) -> None:
        for server in servers:
            server.start()
            if server.failure:
                node = self._options.node_name
                self._source.record(kube_events.server_not_started(node, server.name, server.failure))

    # -- the reconciler

    def _reconcile(self) -> None:
        while True:
            messages = self._next_messages(self._pause())
            is_idle = not messages
            if not self._handle_all(messages):
                return
            del messages
            self._follow_orders()
            node = self._tracker.node
            if self._tracker.knows_node:
                self._follow_node(node_facts(node))
            # Manifests need not have a Node: then nothing speaks against this one.
            self._health.set_eligible(eligible(node) or (node is None and not self._source.has_cluster))
            if self._tracker.synced and (self._tracker.pending or not self._complete):
                self._program()
            self._writer.end_absences()
            self._programs.set_pod_cidrs(self._node_facts)
            if self._complete:
                self._programs.set_service_cidrs(self._tracker.service_cidrs, self._tracker.of_other_proxies)
                self._programs.attach(self._started)
            self._tell_of_devices()
            self._housekeeping.start(attached=self._programs.attached)
            if not is_idle or self._state_is_old or time.monotonic() - self._state_written >= _HEARTBEAT:
                self._write_state()

    def _pause(self) -> float:
        """Seconds until something is due without a message."""
        pause = _STATE_REST if self._state_is_old else _ORDERS
        absence = self._writer.next_absence
        return pause if absence is None else min(pause, max(0.0, absence - time.monotonic()))

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
            self._facts = message.facts
            self._set_network()
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
        self._last_programmed, self._last_duration = time.time(), done - began
        state.save_programmed(self._maps, self._last_programmed, self._last_duration)
        self._metrics.no_local_endpoints(self._tracker.without_local_endpoints)
        reports.programmed(
            self._metrics,
            self._source.record,
            self._options.node_name,
            update,
            problems,
            began=began,
            done=done,
            started=self._started,
            full=full,
        )
        if full:
            log.info(
                "programmed everything",
                service_ports=self._writer.service_ports,
                frontends=self._writer.frontends,
                backends=self._writer.backends,
                seconds=round(done - began, 3),
            )

    def _follow_node(self, facts: NodeFacts) -> None:
        """The Node's addresses may be written long after it is there, by a cloud provider."""
        if facts != self._node_facts:
            self._node_facts = facts
            self._set_network()

    def _set_network(self) -> None:
        network = network_of(self._facts, self._node_facts, self._options.devices)
        node_ports = select_node_port_addresses(network, self._options.node_port_addresses)
        log.info(
            "devices and addresses",
            uplinks=[d.name for d in network.devices if d.role is Role.UPLINK],
            tunnels=[d.name for d in network.devices if d.role is Role.TUNNEL],
            outside=[d.name for d in network.devices if d.role is Role.OUTSIDE],
            local=sum(d.role is Role.LOCAL for d in network.devices),
            addresses=len(network.addresses),
            node_port_addresses=len(node_ports),
        )
        self._tell_of_roles(network.devices)
        self._writer.set_own_addresses(network.addresses, network.answered)
        self._writer.set_node_addresses(node_ports)
        self._writer.set_primary_addresses(network.primary)
        self._programs.set_network(network)

    def _tell_of_roles(self, devices: tuple[Device, ...]) -> None:
        """Pods' devices come and go by the hundred: only what a device changes to is told of those."""
        for device in devices:
            before = self._devices.get(device.ifindex)
            if before is not None and (before.role, before.why) == (device.role, device.why):
                continue
            tell = log.debug if before is None and device.role is Role.LOCAL else log.info
            tell("device", name=device.name, taken_for=str(device.role), because=device.why)
        self._devices = {device.ifindex: device for device in devices}

    def _tell_of_devices(self) -> None:
        failures = set(self._programs.failures)
        for failure in sorted(failures - self._told_failures):
            self._source.record(kube_events.device_not_attached(self._options.node_name, failure))
        self._told_failures = failures

    def _health_port_not_bound(self, service: ServiceHealth, error: str) -> None:
        key = ObjectKey(service.namespace, service.name)
        self._source.record(
            kube_events.health_port_not_bound(self._options.node_name, key, service.port, error)
        )

    def _background(self, work: Callable[[], R], then: Callable[[R], None]) -> None:
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

    def _loopback_state(self) -> Iterable[state.DeviceState]:
        if LOOPBACK in self._programs.targets:
            is_attached = LOOPBACK.ifindex in self._programs.attached_devices
            yield state.DeviceState(
                LOOPBACK.ifindex, LOOPBACK.name, "loopback", "NodePorts answer on it", is_attached
            )

    def _unbound(self) -> list[str]:
        servers = [f"{s.name}: {s.failure}" for s in self._servers if s.failure and s.port is None]
        failed = self._node_port_health.failed
        return [*servers, *(f"healthCheckNodePort {port}: {error}" for port, error in failed.items())]

    def _write_state(self) -> None:
        """A few times a second while much happens, but at once when everything is in place.

        What is not written at once is soon after: ``status`` must not show maps that are newer by more.
        """
        now = time.monotonic()
        synced = self._complete and self._programs.attached
        if now - self._state_written < _STATE_REST and synced and self._synced_written:
            self._state_is_old = True
            return
        self._state_written, self._synced_written, self._state_is_old = now, synced, False
        self._metrics.pending(*self._tracker.pending_changes)
        self._metrics.devices(len(self._programs.targets), len(self._programs.failures))
        without_room = [str(each) for each in self._writer.unplaced]
        self._metrics.without_room(len(without_room))
        self._metrics.health_check_ports(self._node_port_health.bound, len(self._node_port_health.failed))
        statuses = self._source.statuses()
        attached = self._programs.attached_devices
        state.save(
            self._maps,
            state.AgentState(
                pid=os.getpid(),
                version=ebpfproxy.__version__,
                node=self._options.node_name,
                source=self._source.description,
                started=self._started,
                written=time.time(),
                synced=synced,
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
                    *self._programs.failures,
                    *(
                        [shared_remark(self._options.masquerade_ports)]
                        if self._options.masquerade_ports_shared
                        else []
                    ),
                    *self._unbound(),
                ),
                devices=len(self._programs.targets),
                device_roles=(
                    *self._loopback_state(),
                    *(
                        state.DeviceState(d.ifindex, d.name, str(d.role), d.why, d.ifindex in attached)
                        for d in self._devices.values()
                    ),
                ),
                netns=netns_cookie(),
                node_facts=self._node_facts,
                conntrack_entries=self._housekeeping.entries,
                conntrack_evicted=self._housekeeping.evicted,
                health_check_ports=self._node_port_health.bound,
                timeouts=self._options.timeouts,
            ),
        )
