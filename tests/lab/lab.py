"""A lab: nodes joined by a switch, pods behind their nodes, an agent for each node.

Every node has a number N: 172.18.0.N and fd00:172:18::N on the switch, pods in 10.244.N.0/24 and
fd00:10:244:N::/64, native routes between all. The nodes' default route leads to the outside, 172.18.0.254 and
fd00:172:18::fe, where a client can be (``lab.outside``). Nothing in the root namespace is changed; names carry
the process id of the lab, so that several can run at once and what a killed one left can be found.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

from pyroute2 import NetNS, netns

from ebpfproxy.config.datapath import BPFFS
from ebpfproxy.datapath.kernel.roots import ensure_bpffs, find_cgroup_root, pin_folder
from ebpfproxy.datapath.programs.detach import remove_everything
from tests.lab import command
from tests.lab.machine import check_cgroup_root
from tests.lab.spaces import Space

#: An emulator takes its time to compile.
READY_SECONDS = float(os.environ.get("EBPFPROXY_LAB_SECONDS", "120"))
_LAB_ID = re.compile(r"epl(\d+)x\d+")
_counter = iter(range(1_000_000))


class Agent:
    """``ebpfproxy run`` on a lab node."""

    def __init__(self, node: LabNode, arguments: list[str]) -> None:
        self._node = node
        self._arguments = arguments
        self.log = node.lab.folder / f"{node.name}-{next(_counter)}.log"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, *, wait: bool = True, cwd: Path | None = None) -> Agent:
        """``cwd``: a checkout whose agent this is, if not the one under test."""
        command = [sys.executable, "-m", "ebpfproxy", "run", *self._node.roots, *self._arguments]
        with self.log.open("ab") as log:
            self.process = self._node.popen(command, join_cgroup=False, stdout=log, stderr=log, cwd=cwd)
        if wait:
            self.wait_ready()
        return self

    def wait_ready(self, timeout: float = READY_SECONDS) -> None:
        """Until /livez is good and the programs are attached."""
        deadline = time.monotonic() + timeout
        seen = len(self.text.split("started")) - 1
        while time.monotonic() < deadline:
            assert self.process is not None
            if self.process.poll() is not None:
                raise AssertionError(f"the agent ended with {self.process.returncode}:\n{self.text}")
            if seen and self.text.rpartition("started")[2].count("programs are attached"):
                return
            seen = len(self.text.split("started")) - 1
            time.sleep(0.02)
        raise AssertionError(f"the agent is not ready after {timeout} s:\n{self.text}")

    @property
    def text(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def wait_log(self, text: str, timeout: float = 60.0, *, times: int = 1) -> None:
        deadline = time.monotonic() + timeout
        while self.text.count(text) < times:
            assert time.monotonic() < deadline, f"no {text!r} in the log:\n{self.text}"
            time.sleep(0.02)

    def stop(self) -> int:
        """SIGTERM; the exit code."""
        assert self.process is not None
        self.process.terminate()
        return self.process.wait(60)

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def http(self, path: str, port: int = 10256) -> tuple[int, str]:
        """A GET to this agent from its own node: status and body."""
        return self._node.call(_get, port, path)


def _get(port: int, path: str) -> tuple[int, str]:
    with socket.create_connection(("127.0.0.1", port), 5) as connection:
        connection.sendall(f"GET {path} HTTP/1.0\r\n\r\n".encode())
        answer = b""
        while chunk := connection.recv(65536):
            answer += chunk
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), body.decode()


class Pod(Space):
    """A namespace behind a node, with an address of each family."""

    def __init__(self, node: LabNode, name: str, number: int) -> None:
        super().__init__(f"{node.netns}-{name}", node.cgroup)
        self.name = name
        self.node = node
        self.address = f"10.244.{node.number}.{number}"
        self.address6 = f"fd00:10:244:{node.number}::{number:x}"


class LabNode(Space):
    """A namespace that routes for its pods; also the host namespace of its agent."""

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
        self.pods: list[Pod] = []

    @property
    def roots(self) -> list[str]:
        return ["--bpf-root", str(self.bpf_root), "--cgroup-root", str(self.cgroup)]

    def pod(self, name: str) -> Pod:
        pod = Pod(self, name, len(self.pods) + 2)
        self.pods.append(pod)
        inside = self.lab.namespace(pod.netns)
        link = f"p{len(self.pods)}"
        gateway, gateway6 = f"10.244.{self.number}.1", f"fd00:10:244:{self.number}::1"
        with NetNS(self.netns) as outside:
            outside.link("add", ifname=link, kind="veth", peer={"ifname": "eth0", "net_ns_fd": pod.netns})
            index = outside.link_lookup(ifname=link)[0]
            _address(outside, index, gateway, 32)
            _address(outside, index, gateway6, 128)
            outside.link("set", index=index, state="up")
            outside.route("add", dst=f"{pod.address}/32", oif=index, scope="link")
            outside.route("add", dst=f"{pod.address6}/128", oif=index, family=socket.AF_INET6)
        index = inside.link_lookup(ifname="eth0")[0]
        _address(inside, index, pod.address, 32)
        _address(inside, index, pod.address6, 128)
        inside.link("set", index=index, state="up")
        inside.route("add", dst=f"{gateway}/32", oif=index, scope="link")
        inside.route("add", dst=f"{gateway6}/128", oif=index, family=socket.AF_INET6)
        inside.route("add", dst="default", gateway=gateway)
        inside.route("add", dst="default", gateway=gateway6, family=socket.AF_INET6, oif=index)
        inside.close()
        pod.call(_set_sysctls)
        return pod

    def agent(self, *arguments: str, manifests: Path | None = None) -> Agent:
        """An agent for this node, not yet started."""
        source = ["--manifests", str(manifests)] if manifests is not None else []
        made = Agent(self, ["--hostname-override", self.name, *source, *arguments])
        self.lab.agents.append(made)
        return made

    def cli(self, *arguments: str, check: bool = True) -> str:
        """An ``ebpfproxy`` command on this node's roots."""
        command.import_commands()
        done = self.call(command.run, [*arguments, "--bpf-root", str(self.bpf_root)])
        if check and done.code:
            raise RuntimeError(f"ebpfproxy {arguments} failed ({done.code}): {done.output}{done.errors}")
        return done.output


def _address(where: Any, index: int, address: str, prefix: int) -> None:
    # IFA_F_NODAD: the address works at once.
    options = {"flags": 0x02} if ":" in address else {}
    where.addr("add", index=index, address=address, prefixlen=prefix, **options)


OUTSIDE, OUTSIDE6 = "172.18.0.254", "fd00:172:18::fe"


class Outside(Space):
    """A host on the nodes' network that is no node: clients from outside, and the nodes' way to the world."""

    address, address6 = OUTSIDE, OUTSIDE6

    def route(self, destination: str, node: LabNode) -> None:
        """Sends what is for ``destination`` (an address or a CIDR) to a node."""
        family, gateway = (
            (socket.AF_INET6, node.address6) if ":" in destination else (socket.AF_INET, node.address)
        )
        with NetNS(self.netns) as routes:
            index = routes.link_lookup(ifname="eth0")[0]
            routes.route("replace", dst=destination, gateway=gateway, oif=index, family=family)


class Lab:
    """Use it as a context: what it made is gone at the end, whatever happened.

    SIGTERM then ends the program as Ctrl-C does, so that the end is reached.
    """

    def __init__(self) -> None:
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
        # In the opposite order, and each even where another fails.
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

    def namespace(self, name: str) -> Any:
        """A new namespace with its loopback up; the caller closes what it gets."""
        netns.create(name)
        self._names.append(name)
        made = NetNS(name)
        made.link("set", index=1, state="up")
        return made

    def _plug(self, name: str, port: str, address: str, address6: str) -> Any:
        """A new namespace with its eth0 on the switch; the caller closes what it gets."""
        made = self.namespace(name)
        with NetNS(f"{self.id}-switch") as switch:
            switch.link("add", ifname=port, kind="veth", peer={"ifname": "eth0", "net_ns_fd": name})
            bridge = switch.link_lookup(ifname="br0")[0]
            index = switch.link_lookup(ifname=port)[0]
            switch.link("set", index=index, master=bridge, state="up")
        index = made.link_lookup(ifname="eth0")[0]
        _address(made, index, address, 24)
        _address(made, index, address6, 64)
        made.link("set", index=index, state="up")
        return made

    @property
    def outside(self) -> Outside:
        """Made when first asked for. It knows the ways to all pods that nodes have by then."""
        if self._outside is None:
            cgroup = find_cgroup_root() / self.id / "outside"
            cgroup.mkdir(parents=True)
            self._outside = Outside(f"{self.id}-outside", cgroup)
            self._plug(self._outside.netns, "outside", OUTSIDE, OUTSIDE6).close()
            self._outside.call(_set_sysctls)
            for node in self.nodes:
                self._outside.route(f"10.244.{node.number}.0/24", node)
                self._outside.route(f"fd00:10:244:{node.number}::/64", node)
        return self._outside

    def node(self, name: str) -> LabNode:
        number = len(self.nodes) + 1
        node = LabNode(self, name, number)
        with self._plug(node.netns, f"n{number}", node.address, node.address6) as made:
            index = made.link_lookup(ifname="eth0")[0]
            made.route("add", dst="default", gateway=OUTSIDE, oif=index)
            made.route("add", dst="default", gateway=OUTSIDE6, oif=index, family=socket.AF_INET6)
        node.call(_set_sysctls)
        for other in self.nodes:
            _route(node, other)
            _route(other, node)
        self.nodes.append(node)
        return node

    def _handle_signals(self) -> None:
        """SIGTERM and SIGINT raise KeyboardInterrupt in this process, and end those forked from it.

        A forked child would unwind the lab's context as well, and remove the lab under its parent:
        pyroute2 forks to open a socket in a namespace, and ends that child by SIGTERM.
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
    """Forwarding, and what benchmarks of short connections need.

    Local ports begin above all those that agents and servers of a lab listen on: no client takes one.
    """
    for path, value in (
        ("ipv4/ip_forward", "1"),
        ("ipv6/conf/all/forwarding", "1"),
        ("ipv4/tcp_tw_reuse", "1"),
        ("ipv4/ip_local_port_range", "15000 64999"),
    ):
        Path("/proc/sys/net", path).write_text(value)


def _route(here: LabNode, there: LabNode) -> None:
    with NetNS(here.netns) as routes:
        index = routes.link_lookup(ifname="eth0")[0]
        routes.route("add", dst=f"10.244.{there.number}.0/24", gateway=there.address, oif=index)
        routes.route(
            "add",
            dst=f"fd00:10:244:{there.number}::/64",
            gateway=there.address6,
            oif=index,
            family=socket.AF_INET6,
        )


def remove_leftovers(lab_id: str) -> None:
    """Cgroups and pins of a lab."""
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
    """Ends what is still in it (a child that a server left); it can be removed a moment after that."""
    (folder / "cgroup.kill").write_text("1")
    for _ in range(200):
        try:
            folder.rmdir()
            return
        except OSError:
            time.sleep(0.01)
    folder.rmdir()


def clean_dead_labs() -> list[str]:
    """Removes what labs left whose process is gone; returns their names."""
    temporary = Path(tempfile.gettempdir())
    names = {n.split("-")[0] for n in netns.listnetns()}
    for home in (find_cgroup_root(), BPFFS, temporary):
        names |= {p.name.split("-")[0] for p in home.glob("epl*")}
    dead = [n for n in sorted(names) if (found := _LAB_ID.fullmatch(n)) and not _alive(int(found[1]))]
    for lab_id in dead:
        for name in netns.listnetns():
            if name.split("-")[0] == lab_id:
                for pid in netns_pids(name):
                    os.kill(pid, signal.SIGKILL)
                netns.remove(name)
        remove_leftovers(lab_id)
        for folder in temporary.glob(f"{lab_id}-*"):
            shutil.rmtree(folder)
    return dead


def netns_pids(name: str) -> list[int]:
    """Processes in a namespace of a lab, which only labs start."""
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
