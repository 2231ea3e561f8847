"""A lab: nodes connected by a bridge, pods with veth pairs to their nodes, and agents on nodes.

Node number N has 172.18.0.N and fd00:172:18::N on the bridge, and pods in 10.244.N.0/24 and
fd00:10:244:N::/64, with native routing. The default route of nodes leads to 172.18.0.254 and
fd00:172:18::fe, where an external client can run (``lab.outside``). Nothing in the root namespace is changed.
Names contain the process id of the lab, so that several can run at the same time, and leftovers of killed ones
can be found.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from pyroute2 import IPRoute, netns

from ebpfproxy.config.datapath import BPFFS
from ebpfproxy.datapath.kernel.roots import ensure_bpffs, find_cgroup_root, pin_folder
from ebpfproxy.datapath.programs.detach import remove_everything
from tests.lab import clients, cni, ethtool
from tests.lab.addresses import add_address, add_route
from tests.lab.foreign_programs import check_cgroup_root
from tests.lab.processes import Served
from tests.lab.spaces import HAS_IPV6, Space, enter_namespace, leave_namespace, namespace_restored
from tests.lab.waiting import READY_SECONDS

_LAB_ID = re.compile(r"epl(\d+)x\d+")
_counter = iter(range(1_000_000))


class Agent:
    """``ebpfproxy run`` on a lab node."""

    def __init__(self, node: LabNode, arguments: list[str]) -> None:
        self._node = node
        self._arguments = arguments
        self.log = node.lab.folder / f"{node.name}-{next(_counter)}.log"
        self.process: subprocess.Popen[bytes] | Served | None = None
        #: What the log had when the process was started: it may be started again.
        self._logged = 0

    def start(
        self,
        *,
        wait: bool = True,
        cwd: Path | None = None,
        module: str = "ebpfproxy",
        into: IO[bytes] | None = None,
        executes: bool = False,
        **options: Any,
    ) -> Agent:
        """``cwd``: the checkout whose agent is started, if it is another one than that under test.

        ``module``: what is run instead, with the same arguments. ``into``: a file for the log, which is then not
        read here. ``executes``: starts an interpreter as a container does, instead of one that has the agent's
        modules. So do ``cwd``, ``module`` and ``options``, which are those of :meth:`Space.popen`.
        """
        arguments = ["run", *self._node.roots, *self._arguments]
        executes = executes or self._node.lab.executes_agents or module != "ebpfproxy" or cwd is not None
        self._logged = len(self.text)
        with self.log.open("ab") as log:
            if executes or options:
                command = [sys.executable, "-m", module, *arguments]
                self.process = self._node.popen(
                    command, join_cgroup=False, stdout=into or log, stderr=into or log, cwd=cwd, **options
                )
            else:
                self.process = self._node.start_command(arguments, stdout=into or log, stderr=into or log)
        if wait:
            self.wait_ready()
        return self

    def wait_ready(self, timeout: float = READY_SECONDS) -> None:
        """Waits until the log says that the agent has started and its programs are attached."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            assert self.process is not None
            if self.process.poll() is not None:
                raise AssertionError(f"the agent ended with {self.process.returncode}:\n{self.text}")
            if self.is_ready:
                return
            time.sleep(0.02)
        raise AssertionError(f"the agent is not ready after {timeout} s:\n{self.text}")

    @property
    def is_ready(self) -> bool:
        """True once the process that was started last has attached its programs."""
        _, started, since = self.text[self._logged :].partition("started")
        return bool(started) and "programs are attached" in since

    @property
    def text(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def wait_log(self, text: str, timeout: float = 60.0, *, times: int = 1) -> None:
        deadline = time.monotonic() + timeout
        while self.text.count(text) < times:
            assert time.monotonic() < deadline, f"no {text!r} in the log:\n{self.text}"
            time.sleep(0.02)

    def stop(self) -> int:
        """Sends SIGTERM; returns the exit code."""
        assert self.process is not None
        self.process.terminate()
        return self.process.wait(60)

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def http(self, path: str, port: int = 10256) -> tuple[int, str]:
        """Sends GET to this agent from its node; returns status and body."""
        return self._node.call(clients.get, port, path)


class Pod(Space):
    """The network namespace of a pod, with an address of each family."""

    def __init__(self, node: LabNode, name: str, number: int) -> None:
        super().__init__(f"{node.netns}-{name}", node.cgroup)
        self.name = name
        self.node = node
        self.set_addresses(f"10.244.{node.number}.{number}", f"fd00:10:244:{node.number}::{number:x}")

    def set_addresses(self, address: str, address6: str) -> None:
        """Notes the pod's addresses, where something else than the lab assigns them."""
        self.address, self.address6 = address, address6
        cni.write_result(self.node.cni_results, self.netns, self.name, (address, address6))


class LabNode(Space):
    """The network namespace of a node, which routes for its pods and in which its agent runs."""

    def __init__(self, lab: Lab, name: str, number: int) -> None:
        cgroup = find_cgroup_root() / lab.id / name
        cgroup.mkdir(parents=True)
        super().__init__(f"{lab.id}-{number}", cgroup)
        self.lab = lab
        self.name = name
        self.number = number
        self.address = f"172.18.0.{number}"
        self.address6 = f"fd00:172:18::{number}"
        self.bpf_root = BPFFS / lab.id / name
        #: What a container runtime keeps of its pods, for commands that take a pod's name.
        self.cni_results = lab.folder / "cni" / name
        self.cni_results.mkdir(parents=True)
        self.pods: list[Pod] = []

    @property
    def roots(self) -> list[str]:
        return ["--bpf-root", str(self.bpf_root), "--cgroup-root", str(self.cgroup)]

    def bare_pod(self, name: str) -> Pod:
        """Creates a pod without a device, to be connected by the caller."""
        pod = Pod(self, name, len(self.pods) + 2)
        self.pods.append(pod)
        self.lab.namespace(pod.netns, is_host=True).close()
        return pod

    def pod(self, name: str) -> Pod:
        """Creates a pod with a veth and a route of its own, as the CNI plugin ptp does."""
        pod = self.bare_pod(name)
        link = f"p{len(self.pods)}"
        gateway, gateway6 = f"10.244.{self.number}.1", f"fd00:10:244:{self.number}::1"
        with routes_of(self.netns) as outside:
            outside.link("add", ifname=link, kind="veth", peer={"ifname": "eth0", "net_ns_fd": pod.netns})
            index = outside.link_lookup(ifname=link)[0]
            add_address(outside, index, gateway, 32)
            add_address(outside, index, gateway6, 128)
            outside.link("set", index=index, state="up")
            add_route(outside, index, f"{pod.address}/32", scope="link")
            add_route(outside, index, f"{pod.address6}/128")
        with routes_of(pod.netns) as inside:
            index = inside.link_lookup(ifname="eth0")[0]
            add_address(inside, index, pod.address, 32)
            add_address(inside, index, pod.address6, 128)
            inside.link("set", index=index, state="up")
            add_route(inside, index, f"{gateway}/32", scope="link")
            add_route(inside, index, f"{gateway6}/128")
            add_route(inside, index, "default", gateway)
            add_route(inside, index, "default", gateway6)
        return pod

    def agent(self, *arguments: str, manifests: Path | None = None) -> Agent:
        """Creates an agent for this node without starting it."""
        source = ["--manifests", str(manifests)] if manifests is not None else []
        made = Agent(self, ["--hostname-override", self.name, *source, *arguments])
        self.lab.agents.append(made)
        return made

    def cli(self, *arguments: str, check: bool = True) -> str:
        """Runs an ``ebpfproxy`` command with this node's bpf root; returns its output."""
        done = self.run_command([*arguments, "--bpf-root", str(self.bpf_root)])
        if check and done.code:
            raise RuntimeError(f"ebpfproxy {arguments} failed ({done.code}): {done.output}{done.errors}")
        return done.output


def routes_of(name: str) -> Any:
    """Returns an IPRoute of the namespace with this name, to be closed by the caller."""
    with namespace_restored():
        enter_namespace(f"/run/netns/{name}")
        return IPRoute()


OUTSIDE, OUTSIDE6 = "172.18.0.254", "fd00:172:18::fe"


class Outside(Space):
    """A host on the nodes' network that is no node: the external client and default gateway."""

    address, address6 = OUTSIDE, OUTSIDE6

    def route(self, destination: str, node: LabNode) -> None:
        """Routes ``destination``, an address or a CIDR, to a node."""
        gateway = node.address6 if ":" in destination else node.address
        with routes_of(self.netns) as routes:
            index = routes.link_lookup(ifname="eth0")[0]
            add_route(routes, index, destination, gateway, command="replace")


class Lab:
    """A context manager, which removes everything it created in any case.

    Within the context SIGTERM raises KeyboardInterrupt as SIGINT does, so that the context is left.
    ``takes_xdp``: the bridge's ports have GRO, without which they take no frames of XDP programs.
    ``routes_pods``: every node has routes to the pods of the others, through their addresses on the bridge.
    ``executes_agents``: each agent is a new interpreter, for what measures its start.
    """

    def __init__(
        self, *, takes_xdp: bool = False, routes_pods: bool = True, executes_agents: bool = False
    ) -> None:
        self.executes_agents = executes_agents
        self._takes_xdp = takes_xdp
        self._routes_pods = routes_pods
        self.id = f"epl{os.getpid()}x{next(_counter)}"
        self.nodes: list[LabNode] = []
        self.agents: list[Agent] = []
        self._names: list[str] = []
        self._outside: Outside | None = None
        self._stack = ExitStack()

    def __enter__(self) -> Lab:
        check_cgroup_root()
        ensure_bpffs(BPFFS)
        self._handle_signals()
        self.folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix=f"{self.id}-")))
        # Callbacks run in the opposite order, also if another one raises.
        self._stack.callback(remove_leftovers, self.id)
        self._stack.callback(self._remove_namespaces)
        self._stack.callback(self._end_processes)
        try:
            with self.namespace(f"{self.id}-switch") as switch:
                switch.link("add", ifname="br0", kind="bridge")
                switch.link("set", index=switch.link_lookup(ifname="br0")[0], state="up")
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:
            for log in sorted(self.folder.glob("*.log")):
                print(f"--- {log.name}\n{log.read_text()[-4000:]}", file=sys.stderr)
        self.close()

    def namespace(self, name: str, *, is_host: bool = False) -> Any:
        """Creates a namespace with lo up, with the sysctls of nodes and pods if ``is_host``.

        The caller closes the returned socket.
        """
        with namespace_restored():
            leave_namespace()
            netns.attach(name, threading.get_native_id())
            self._names.append(name)
            made = IPRoute()
            if is_host:
                _set_sysctls()
        made.link("set", index=1, state="up")
        return made

    def _plug(self, name: str, port: str, address: str, address6: str) -> Any:
        """Creates a namespace with eth0 on the bridge; the caller closes the returned socket."""
        made = self.namespace(name, is_host=True)
        with routes_of(f"{self.id}-switch") as switch:
            switch.link("add", ifname=port, kind="veth", peer={"ifname": "eth0", "net_ns_fd": name})
            bridge = switch.link_lookup(ifname="br0")[0]
            index = switch.link_lookup(ifname=port)[0]
            switch.link("set", index=index, master=bridge, state="up")
        if self._takes_xdp:
            self.switch.call(ethtool.turn, port, {"gro": True})
        index = made.link_lookup(ifname="eth0")[0]
        add_address(made, index, address, 24)
        add_address(made, index, address6, 64)
        made.link("set", index=index, state="up")
        return made

    @property
    def switch(self) -> Space:
        """The namespace of the bridge."""
        return Space(f"{self.id}-switch", None)

    @property
    def outside(self) -> Outside:
        """Created on first use, with routes to the pods of all nodes that exist then."""
        if self._outside is None:
            cgroup = find_cgroup_root() / self.id / "outside"
            cgroup.mkdir(parents=True)
            self._outside = Outside(f"{self.id}-outside", cgroup)
            self._plug(self._outside.netns, "outside", OUTSIDE, OUTSIDE6).close()
            for node in self.nodes:
                self._outside.route(f"10.244.{node.number}.0/24", node)
                self._outside.route(f"fd00:10:244:{node.number}::/64", node)
        return self._outside

    def node(self, name: str) -> LabNode:
        number = len(self.nodes) + 1
        node = LabNode(self, name, number)
        with self._plug(node.netns, f"n{number}", node.address, node.address6) as made:
            index = made.link_lookup(ifname="eth0")[0]
            add_route(made, index, "default", OUTSIDE)
            add_route(made, index, "default", OUTSIDE6)
        for other in self.nodes if self._routes_pods else ():
            _route(node, other)
            _route(other, node)
        self.nodes.append(node)
        return node

    def _handle_signals(self) -> None:
        """SIGTERM and SIGINT raise KeyboardInterrupt in this process, and end forked children.

        A forked child would leave the lab's context as well, and remove the lab of its parent.
        """
        if threading.current_thread() is not threading.main_thread():
            return
        owner = os.getpid()

        def interrupt(number: int, frame: object) -> None:
            if os.getpid() != owner:
                os._exit(128 + number)
            raise KeyboardInterrupt

        for number in (signal.SIGTERM, signal.SIGINT):
            before = signal.getsignal(number)
            if before in (signal.SIG_DFL, signal.default_int_handler):
                signal.signal(number, interrupt)
                self._stack.callback(signal.signal, number, before)

    def close(self) -> None:
        self._stack.close()

    def _end_processes(self) -> None:
        for node in self.nodes:
            for space in [*node.pods, node]:
                space.end()
        self.nodes.clear()
        if self._outside is not None:
            self._outside.end()
            self._outside = None

    def _remove_namespaces(self) -> None:
        for name in self._names:
            netns.remove(name)
        self._names.clear()


def _set_sysctls() -> None:
    """Enables forwarding, and reuse of TIME-WAIT for benchmarks of short connections.

    ip_local_port_range is above all ports that agents and servers of a lab listen on.
    """
    for path, value in (
        ("ipv4/ip_forward", "1"),
        ("ipv6/conf/all/forwarding", "1"),
        ("ipv4/tcp_tw_reuse", "1"),
        ("ipv4/ip_local_port_range", "15000 64999"),
    ):
        if HAS_IPV6 or not path.startswith("ipv6"):
            Path("/proc/sys/net", path).write_text(value)


def _route(here: LabNode, there: LabNode) -> None:
    with routes_of(here.netns) as routes:
        index = routes.link_lookup(ifname="eth0")[0]
        add_route(routes, index, f"10.244.{there.number}.0/24", there.address)
        add_route(routes, index, f"fd00:10:244:{there.number}::/64", there.address6)


def remove_leftovers(lab_id: str) -> None:
    """Removes cgroups and pins of a lab."""
    root = find_cgroup_root() / lab_id
    if root.is_dir():
        for folder in sorted(root.rglob("*"), reverse=True):
            if folder.is_dir():
                _remove_cgroup(folder)
        _remove_cgroup(root)
    pins = BPFFS / lab_id
    if pins.is_dir():
        for node in pins.iterdir():
            remove_everything(pin_folder(node))
        shutil.rmtree(pins)


def _remove_cgroup(folder: Path) -> None:
    """Kills remaining processes, such as children of servers, and removes the cgroup once they have exited."""
    (folder / "cgroup.kill").write_text("1")
    for _ in range(200):
        try:
            folder.rmdir()
            return
        except OSError:
            time.sleep(0.01)
    folder.rmdir()


def clean_dead_labs() -> list[str]:
    """Removes leftovers of labs whose process has exited; returns their names.

    One process at a time does it: workers of a run begin at once.
    """
    folder = os.open(tempfile.gettempdir(), os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        return _clean_dead_labs()
    finally:
        os.close(folder)


def _clean_dead_labs() -> list[str]:
    temporary = Path(tempfile.gettempdir())
    names = {n.split("-")[0] for n in netns.listnetns()}
    for home in (find_cgroup_root(), BPFFS, temporary):
        names |= {p.name.split("-")[0] for p in home.glob("epl*")}
    dead = [n for n in sorted(names) if (found := _LAB_ID.fullmatch(n)) and not _alive(int(found[1]))]
    for lab_id in dead:
        for name in netns.listnetns():
            if name.split("-")[0] == lab_id:
                for pid in netns_pids(name):
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                netns.remove(name)
        remove_leftovers(lab_id)
        for folder in temporary.glob(f"{lab_id}-*"):
            shutil.rmtree(folder)
    return dead


def netns_pids(name: str) -> list[int]:
    """The processes in a network namespace of a lab."""
    wanted = Path("/run/netns", name).stat().st_ino
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and (entry / "ns/net").stat().st_ino == wanted:
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def _alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()
