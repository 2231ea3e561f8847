"""The agent: its parts, and the order in which they start and stop.

Threads: one for each watched resource (or one for the manifests), one for the node's devices and addresses,
the HTTP servers, one that sends events, and the reconciler, which alone owns the tracker and the maps'
contents. They meet at one queue (``messages``). Slow work of the reconciler (compiling, and that of
``housekeeping``) runs in workers, whose results come by the same queue.

Order of a start: roots and lock (``succession``: another agent may run still); kernel probe; the watches,
and while their first lists come, maps (reused or created), the node's network, and the load of programs; the
first full programming; and only then programs are attached or replaced. A stop changes nothing: maps and
programs go on without an agent.
"""

from __future__ import annotations

import gc
import signal
import time
from collections.abc import Mapping
from functools import partial

import ebpfproxy
from ebpfproxy.agent import collectors, drain, kube_events, local_pages, state
from ebpfproxy.agent.agent_options import AgentOptions
from ebpfproxy.agent.drain import DrainRequests
from ebpfproxy.agent.drift import DriftCheck
from ebpfproxy.agent.handover import Handover
from ebpfproxy.agent.housekeeping import Housekeeping
from ebpfproxy.agent.local_socket import LocalServer
from ebpfproxy.agent.messages import Call, Failed, Message, Messages, NetworkChanged, Stop
from ebpfproxy.agent.mounts import MountFollower
from ebpfproxy.agent.node_network import NodeNetwork
from ebpfproxy.agent.programming import Programming
from ebpfproxy.agent.programs import ProgramManager
from ebpfproxy.agent.serving import Serving
from ebpfproxy.agent.source import source_of
from ebpfproxy.agent.status_record import Parts, Status
from ebpfproxy.agent.succession import Predecessor, Successors
from ebpfproxy.agent.telemetry import Telemetry
from ebpfproxy.agent.tracing import TracingFollower
from ebpfproxy.config.datapath import Xdp
from ebpfproxy.config.file_watch import ReadFile
from ebpfproxy.datapath.flows.map_migration import copy_drain_requests
from ebpfproxy.datapath.kernel import maps, probe, roots
from ebpfproxy.datapath.kernel.grace import Grace
from ebpfproxy.datapath.services.drained import Drained
from ebpfproxy.datapath.services.former import former_backends
from ebpfproxy.datapath.services.writer import Writer
from ebpfproxy.health.listeners import Listeners, inherited
from ebpfproxy.health.proxy import eligible
from ebpfproxy.kube.objects import Deleted, Replaced
from ebpfproxy.logs import get_logger
from ebpfproxy.metrics.agent_metrics import AgentMetrics
from ebpfproxy.netlink.routes import Routes
from ebpfproxy.node.facts import NodeFacts, node_facts
from ebpfproxy.node.network_watcher import NetworkWatcher
from ebpfproxy.services.tracker import Tracker

log = get_logger(__name__)

_CHANGED = "the configuration has changed"


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
        config: ReadFile | None = None,
        init_only: bool = False,
        standby: bool = False,
    ) -> None:
        """Checks the options, and changes nothing on this node.

        ``configz``: what /configz answers. ``config``: the file whose change ends the agent. ``init_only``:
        :meth:`run` makes the maps, compiles and loads the programs, and is done. ``standby``: where another
        agent runs, :meth:`run` waits until it ends.
        """
        self._options = options
        self._configz = dict(configz)
        self._config = config
        self._messages = Messages()
        self._tracker = Tracker(options.node_name)
        self._metrics = AgentMetrics()
        self._listeners = Listeners(inherited())
        self._started = time.time()
        self._told_failures: set[str] = set()
        #: True once the configuration has changed.
        self._starts_anew = False
        self._is_told_to_end = False
        self._knows_network = False
        self._init_only = init_only
        self._standby = standby
        self._predecessor = Predecessor()
        self._handover = handover
        roots.check_cgroup(options.cgroup_root)
        if not init_only:
            metrics = self._metrics
            self._source = source_of(options, self._messages.put, metrics.requested, metrics.event)

    # -- start and stop

    def run(self) -> bool:
        """True if the agent has ended because its configuration has changed.

        Then a program that replaces this one in its process inherits its listening sockets.
        """
        # What modules and the first lists bring stays: the collector begins once that is programmed.
        gc.disable()
        lock = self._lock_roots()
        if lock is None:
            return self._starts_anew
        self._mounts = MountFollower(lock, self._options.bpf_root)
        features = probe.probe().without(self._options.without)
        if self._init_only:
            self._open(features)
            self._programs.load(reports=self._options.trace_decisions)
            lock.release()
            return False
        source, options = self._source, self._options
        telemetry = Telemetry(options, self._metrics.registry)
        # The first lists take longer to come than everything until they are needed.
        source.start()
        try:
            self._create_parts(features, telemetry)
            self._begin()
            successors = Successors(self._local.name)
        except BaseException:
            source.stop()
            raise
        log.info("started", node=options.node_name, source=source.description, version=ebpfproxy.__version__)
        try:
            self._reconcile()
        finally:
            self._shut_down(telemetry, successors, lock)
        log.info("stopped, traffic goes on")
        telemetry.close()
        return self._starts_anew and not self._is_told_to_end

    def _begin(self) -> None:
        """Loads the programs, and answers who asks, while the first lists come."""
        self._listen()
        if not self._learn_network():
            self._messages.put(Stop())
        self._network.set_pod_cidrs()
        self._programs.start_load()
        self._source.record(kube_events.starting(self._options.node_name))
        self._serving.follow(complete=False)
        self._local.start()

    def _shut_down(self, telemetry: Telemetry, successors: Successors, lock: roots.Lock) -> None:
        """Ends what runs beside the reconciler; another agent gets the listening sockets and the lock."""
        telemetry.stop()
        self._tracing.stop()
        self._source.stop()
        self._messages.close()
        self._local.stop()
        if self._starts_anew:
            self._listeners.leave_to_next()
        successors.hand_over(self._listeners, lock)
        self._predecessor.dismiss()
        self._serving.stop()

    def _create_parts(self, features: probe.Features, telemetry: Telemetry) -> None:
        options, source = self._options, self._source
        self._serving = Serving(
            options,
            self._metrics,
            self._configz,
            listeners=self._listeners,
            predecessor=self._predecessor,
            record=source.record,
        )
        self._open(features)
        self._network = self._node_network()
        self._drift = self._drift_check()
        self._local = LocalServer(
            local_pages.pages(self._messages, self._tracker, self._drift, self._configz, self._metrics.render)
        )
        self._status = self._status_of(telemetry)
        self._programming = Programming(
            options.node_name,
            self._tracker,
            self._writer,
            self._serving,
            self._status,
            metrics=self._metrics,
            record=source.record,
            former=partial(former_backends, roots.pin_folder(options.bpf_root), self._maps),
            started=self._started,
        )
        collectors.register(self._metrics.registry, options, self._maps, source, self._serving.health)
        telemetry.start()

    def _lock_roots(self) -> roots.Lock | None:
        """None if another agent runs, and nothing is to be done beside it, or not with this configuration.

        Raises RootError.
        """
        options = self._options
        mounted = roots.ensure_bpffs(options.bpf_root)
        if mounted:
            log.info("mounted a bpffs", path=str(options.bpf_root))
        folders = [("--bpf-root", options.bpf_root), ("--cgroup-root", options.cgroup_root)]
        if not self._standby:
            return roots.Lock(folders)
        if self._init_only:
            try:
                return roots.Lock(folders)
            except roots.RootError as error:
                log.info("not loading programs beside another agent", reason=str(error))
                return None
        # The first process of a container is not ended by a signal for which it has no handler.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, _end)
        lock, sockets = self._predecessor.wait_for_lock(folders, options.bpf_root)
        self._listeners.inherit(sockets)
        if self._config is None or not self._config.has_changed:
            return lock
        # It may have waited for long: nothing is programmed as an old configuration says.
        log.info("stopping", reason=_CHANGED)
        self._starts_anew = True
        self._listeners.leave_to_next()
        lock.release()
        return None

    def _open(self, features: probe.Features) -> None:
        """Opens the maps, and creates the parts that need them."""
        options = self._options
        pins = roots.pin_folder(options.bpf_root)
        self._maps = maps.open_or_create(pins, options.capacity, xdp=options.xdp is not Xdp.NONE)
        grace = Grace()
        self._writer = Writer(
            self._maps,
            grace.wait,
            maglev_size=options.maglev_size,
            absence=options.stale_tcp_seconds,
            source_towards=Routes().source_towards,
        )
        background = self._messages.run
        self._housekeeping = Housekeeping(
            options,
            self._maps,
            self._writer,
            grace=grace,
            metrics=self._metrics,
            background=background,
            call=self._messages.call,
        )
        self._programs = ProgramManager(
            options, self._maps, pins, features, background, handover=self._handover
        )
        copy_drain_requests(pins, self._maps)
        self._drain = DrainRequests(Drained(self._maps), self._tracker)
        self._tracing = TracingFollower(options, self._maps, self._programs, self._tracker, background)
        log.info(
            "reusing pinned maps" if self._maps.adopted else "created maps",
            folder=str(self._maps.folder),
            service_ports=self._writer.service_ports,
            backends=self._writer.backends,
        )

    def _node_network(self) -> NodeNetwork:
        """What is known of the node stays while the API server is away."""
        options = self._options
        last = state.load_latest(roots.pin_folder(options.bpf_root))
        known = last.node_facts if last is not None and last.node == options.node_name else NodeFacts()
        return NodeNetwork(options, self._writer, self._programs, known, self._serving.node_port_health)

    def _drift_check(self) -> DriftCheck:
        return DriftCheck(
            self._options,
            self._maps,
            self._writer,
            self._programs,
            [self._housekeeping.clients.owned()],
            metrics=self._metrics,
            record=self._source.record,
            background=self._messages.run,
        )

    def _listen(self) -> None:
        """From now on signals, the configuration's file and the node's network send messages."""
        put = self._messages.put
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)
        if self._config is not None:
            self._config.watch(lambda: put(Stop(_CHANGED)))
        NetworkWatcher(lambda found: put(NetworkChanged(found))).start()

    def _learn_network(self) -> bool:
        """Waits for the node's devices, which decide what is loaded. False after Stop."""
        end = time.monotonic() + state.HEARTBEAT
        while not self._knows_network and (left := end - time.monotonic()) > 0:
            if not self._handle_all(self._messages.take(left)):
                return False
        return True

    def _stop(self, *_: object) -> None:
        self._is_told_to_end = True
        self._messages.put(Stop())

    def _status_of(self, telemetry: Telemetry) -> Status:
        parts = Parts(
            options=self._options,
            maps=self._maps,
            source=self._source,
            tracker=self._tracker,
            writer=self._writer,
            programs=self._programs,
            network=self._network,
            housekeeping=self._housekeeping,
            health=self._serving.health,
            node_port_health=self._serving.node_port_health,
            metrics=self._metrics,
            servers=self._serving.servers,
            telemetry=telemetry,
            socket=self._local.name,
        )
        return Status(parts, self._started)

    # -- the reconciler

    def _reconcile(self) -> None:
        # Lists may have come already.
        pause = 0.0
        while True:
            messages = self._messages.take(pause)
            is_idle = not messages
            if not self._handle_all(messages):
                return
            del messages
            self._drain.follow(complete=self._programming.complete)
            node = self._tracker.node
            if self._tracker.knows_node:
                self._network.set_node(node_facts(node))
            # Manifests need not have a Node: then nothing speaks against this one.
            self._serving.health.set_eligible(
                eligible(node) or (node is None and not self._source.has_cluster)
            )
            if self._programming.is_due:
                self._programming.apply()
                self._tracing.changed()
            self._mounts.follow()
            self._writer.end_absences()
            self._network.set_pod_cidrs()
            if self._programming.complete:
                self._network.set_service_cidrs(self._tracker.service_cidrs, self._tracker.of_other_proxies)
                self._programs.attach(self._started)
                if self._programs.attached:
                    self._serving.health.attached()
                    self._programming.drop_gone()
            self._serving.follow(complete=self._programming.complete)
            self._tell_of_devices()
            self._tracing.follow()
            programs = self._programs
            self._housekeeping.start(programs.folder, programs.for_records, programs.reports)
            if self._programming.complete and self._programs.attached:
                self._drift.start()
            self._status.write(is_idle=is_idle, complete=self._programming.complete)
            pause = self._pause()

    def _pause(self) -> float:
        """Seconds until there is something to do without a message."""
        pause = min(self._status.pause, drain.SECONDS)
        absence = self._writer.next_absence
        return pause if absence is None else min(pause, max(0.0, absence - time.monotonic()))

    def _handle_all(self, messages: list[Message]) -> bool:
        """False after Stop. The messages are gone when this returns: a list can be large."""
        for message in messages:
            if isinstance(message, Stop):
                if message.reason:
                    log.info("stopping", reason=message.reason)
                    self._starts_anew = True
                return False
            self._handle(message)
        return True

    def _handle(self, message: Message) -> None:
        if isinstance(message, NetworkChanged):
            self._network.set_facts(message.facts)
            self._knows_network = True
        elif isinstance(message, Call):
            message.what()
        elif isinstance(message, Failed):
            raise message.error
        elif not isinstance(message, Stop):
            if isinstance(message, Replaced):
                log.debug("listed", resource=str(message.resource), objects=len(message.objects))
            elif not isinstance(message, Deleted):
                log.debug("changed", resource=str(message.resource))
            self._tracker.apply(message)

    def _tell_of_devices(self) -> None:
        failures = set(self._programs.failures)
        for failure in sorted(failures - self._told_failures):
            self._source.record(kube_events.device_not_attached(self._options.node_name, failure))
        self._told_failures = failures


def _end(*_: object) -> None:
    raise SystemExit(0)
