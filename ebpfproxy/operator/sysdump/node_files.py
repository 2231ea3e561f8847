"""What this node has, as lines of files: kernel, sysctls, devices, routes, netfilter, BPF programs, logs."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
from pyroute2 import IPRoute

from ebpfproxy import yaml_text
from ebpfproxy.agent.state import AgentState
from ebpfproxy.datapath.abi import uapi
from ebpfproxy.datapath.kernel import bpf
from ebpfproxy.datapath.kernel.bpf_map import Map
from ebpfproxy.datapath.kernel.libbpf import LinkInfo
from ebpfproxy.datapath.kernel.probe import probe
from ebpfproxy.netlink import traffic_control
from ebpfproxy.netlink.namespaces import NO_ENTRY, may_enter
from ebpfproxy.netlink.rtnetlink import Rtnetlink
from ebpfproxy.node.clients import visible_namespaces
from ebpfproxy.node.pod_names import pods
from ebpfproxy.operator.migrate.node import iptables, tools
from ebpfproxy.operator.sysdump.archive import last, rows
from ebpfproxy.operator.sysdump.secrets import without
from ebpfproxy.services.model import format_address

#: Maps whose content is no state, or that other files show decoded.
_NOT_SHOWN = frozenset(
    ("agent_state", "crc32c", "decisions", "scratch", "sweep", "sweep_keys", "sweep_values")
)
_HASHES = (uapi.MAP_HASH, uapi.MAP_LRU_HASH, uapi.MAP_PERCPU_HASH, uapi.MAP_LPM_TRIE)
#: They have a value of each CPU.
_PER_CPU = (uapi.MAP_PERCPU_ARRAY, uapi.MAP_PERCPU_HASH)
#: A longer value, such as a filter's, is shown in pieces of so many bytes, those without any bit left out.
_PIECE = 256
#: enum bpf_prog_type and bpf_link_type: those at sockets and packets.
_PROGRAMS = {
    3: "sched_cls",
    4: "sched_act",
    6: "xdp",
    8: "cgroup_skb",
    9: "cgroup_sock",
    13: "sock_ops",
    14: "sk_skb",
    16: "sk_msg",
    18: "cgroup_sock_addr",
    25: "cgroup_sockopt",
    30: "sk_lookup",
    32: "netfilter",
}
_CGROUP, _XDP, _TCX, _NETKIT = 3, 6, 11, 13
_LINKS = {_CGROUP: "cgroup", _XDP: "xdp", 10: "netfilter", _TCX: "tcx", _NETKIT: "netkit"}
_PARENTS = {"ingress": traffic_control.INGRESS, "egress": traffic_control.EGRESS}
#: Below /proc/sys. Others hold keys (tcp_fastopen_key, stable_secret).
_SYSCTLS = (
    "kernel/unprivileged_bpf_disabled",
    "net/core/bpf_jit_*",
    "net/core/netdev_max_backlog",
    "net/core/somaxconn",
    "net/ipv4/ip_forward",
    "net/ipv4/ip_local_port_range",
    "net/ipv4/ip_local_reserved_ports",
    "net/ipv4/ip_nonlocal_bind",
    "net/ipv4/ip_unprivileged_port_start",
    "net/ipv4/tcp_tw_reuse",
    "net/ipv4/vs/*",
    "net/ipv4/conf/*/accept_local",
    "net/ipv4/conf/*/forwarding",
    "net/ipv4/conf/*/route_localnet",
    "net/ipv4/conf/*/rp_filter",
    "net/ipv4/conf/*/src_valid_mark",
    "net/ipv6/conf/*/disable_ipv6",
    "net/ipv6/conf/*/forwarding",
    "net/netfilter/nf_conntrack_*",
)
_UNIT = "ebpfproxy"
_JOURNAL_LINES = "20000"


# -- the kernel


def kernel() -> Iterator[str]:
    yield f"{' '.join(os.uname())}\n"
    yield f"processors: {os.cpu_count()}\n"
    for name in ("/proc/version", "/proc/uptime", "/proc/loadavg", "/proc/meminfo", "/etc/os-release"):
        if Path(name).exists():
            yield f"\n{name}:\n{Path(name).read_text()}"
    yield "\n/proc/self/mounts:\n"
    for line in Path("/proc/self/mounts").read_text().splitlines(keepends=True):
        if line.split()[2] in ("bpf", "cgroup", "cgroup2"):
            yield line


def features() -> Iterator[str]:
    return rows([{"kernel": platform.release(), **msgspec.to_builtins(probe())}])


def sysctls() -> Iterator[str]:
    root = Path("/proc/sys")
    for pattern in _SYSCTLS:
        for path in sorted(root.glob(pattern)):
            if path.is_file():
                yield f"{path.relative_to(root)} = {' '.join(path.read_text().split())}\n"


# -- devices and routes


def devices() -> Iterator[str]:
    with IPRoute() as netlink:
        yield from _messages(netlink.get_links())
        yield from _messages(netlink.get_addr())


def routes() -> Iterator[str]:
    with IPRoute() as netlink:
        yield from _messages(netlink.get_rules())
        yield from _messages(netlink.get_routes())


def neighbours() -> Iterator[str]:
    with IPRoute() as netlink:
        yield from _messages(netlink.get_neighbours())


def _messages(found: Any) -> Iterator[str]:
    for message in found:
        plain = message.dump()
        del plain["header"]
        yield from rows([plain])


def namespaces(results: Path) -> Iterator[str]:
    """Pods' network namespaces, from which ``explain`` and ``trace`` have clients' names."""
    for each in visible_namespaces():
        addresses = [format_address(address) for address in each.addresses]
        yield from rows([{**each._asdict(), "path": str(each.path), "addresses": addresses}])
    yield from rows({"pod": f"{pod.namespace}/{pod.name}", "netns": pod.netns} for pod in pods(results))
    if not may_enter():
        raise PermissionError(NO_ENTRY)


# -- BPF, whosever it is


def programs() -> Iterator[str]:
    """All programs, what they are attached to by links, and filters of devices."""
    for each in bpf.programs():
        name, kind = each.name.decode(errors="replace"), _PROGRAMS.get(each.type, each.type)
        yield from rows([{"program": each.id, "type": kind, "name": name, "tag": bytes(each.tag).hex()}])
    for link in bpf.links():
        yield from rows([_link(link)])
    with Rtnetlink() as netlink, IPRoute() as links:
        for index in [message["index"] for message in links.get_links()]:
            for direction, parent in _PARENTS.items():
                for found in traffic_control.filters(netlink, index, parent):
                    yield from rows([{"device": index, "direction": direction, **found._asdict()}])


def _link(link: LinkInfo) -> Mapping[str, Any]:
    shown = {"link": link.id, "type": _LINKS.get(link.type, link.type), "program": link.prog_id}
    low, high, *_ = target = list(link.target)
    if link.type == _CGROUP:
        return {**shown, "cgroup": low | high << 32, "attach_type": target[2]}
    if link.type in (_XDP, _TCX, _NETKIT):
        return {**shown, "device": low, "attach_type": high}
    return shown


def pins(folder: Path) -> Iterator[str]:
    """What is pinned: also where no command can read it."""
    for at, _, files in os.walk(folder):
        yield from (f"{at}/{name}\n" for name in ["", *sorted(files)])


def content(each: Map) -> Iterator[str]:
    """A map as it is: what ``explain`` and ``check`` read. Places of arrays that are 0 are left out."""
    if each.spec.name in _NOT_SHOWN:
        return
    found = each.items() if each.spec.kind in _HASHES else each.nonzero_items()
    for key, value in found:
        if len(value) <= _PIECE or each.spec.kind in _PER_CPU:
            yield f"{key.hex()} {value.hex()}\n"
            continue
        for at in range(0, len(value), _PIECE):
            piece = value[at : at + _PIECE]
            if piece.count(0) != len(piece):
                yield f"{key.hex()}+{at} {piece.hex()}\n"


# -- netfilter


def netfilter() -> Iterator[str]:
    """What each backend of iptables has: kube-proxy's rules, or a firewall in the way."""
    for tool in iptables.installed():
        yield f"# {tool.save}\n{tool.saved()}\n"


def nftables() -> Iterator[str]:
    yield tools.run("nft", "list", "ruleset")


# -- the agent


def log_file(agent: AgentState | None) -> Iterator[str]:
    """The agent's standard error, where that is a file."""
    for process in _processes(agent):
        path = process / "fd/2"
        if path.is_file():
            yield from last(path.read_text(errors="replace"))


def command_line(agent: AgentState | None) -> Iterator[str]:
    for process in _processes(agent):
        yield f"{' '.join(_words(process))}\n"


def configuration_file(agent: AgentState | None) -> Iterator[str]:
    """The file that the agent was started with, where its process sees it."""
    for path in _named(agent, "--config"):
        yield from rows(without(yaml_text.load_all(path.read_text())))


def kubeconfigs(agent: AgentState | None) -> Iterator[Path]:
    """Those of the agent's: no file is made of them either."""
    yield from _named(agent, "--kubeconfig")
    for path in _named(agent, "--config"):
        for document in yaml_text.load_all(path.read_text()):
            connection = document.get("clientConnection") if isinstance(document, dict) else None
            if isinstance(connection, dict) and connection.get("kubeconfig"):
                yield from (_seen(process, connection["kubeconfig"]) for process in _processes(agent))


def _named(agent: AgentState | None, option: str) -> Iterator[Path]:
    """A file that the agent's command line names."""
    for process in _processes(agent):
        words = _words(process)
        for name, value in zip(words, [*words[1:], ""], strict=True):
            if name == option or name.startswith(f"{option}="):
                yield _seen(process, name.partition("=")[2] or value)


def _seen(process: Path, path: str) -> Path:
    """A path as the process means it."""
    return process / ("root" if path.startswith("/") else "cwd") / path.lstrip("/")


def variables(agent: AgentState | None) -> dict[str, str]:
    """The agent's environment, of which no file is made."""
    found = {}
    for process in _processes(agent):
        for each in (process / "environ").read_text(errors="replace").split("\0"):
            name, _, value = each.partition("=")
            found[name] = value
    return found


def _processes(agent: AgentState | None) -> Iterator[Path]:
    """The folder in /proc of the agent's process, unless it is gone, or in another process namespace."""
    if agent is None:
        raise LookupError("no agent has left its process id")
    folder = Path("/proc", str(agent.pid))
    try:
        words = _words(folder)
    except OSError:
        words = []
    if "run" not in words or not any("ebpfproxy" in word for word in words):
        raise LookupError(f"process {agent.pid} is no agent: it has ended, or is another process namespace's")
    yield folder


def _words(process: Path) -> list[str]:
    return (process / "cmdline").read_text(errors="replace").rstrip("\0").split("\0")


def journal() -> Iterator[str]:
    """What systemd has of the agent's unit and of the kernel's messages about BPF."""
    if shutil.which("journalctl") is None:
        raise tools.ToolError("journalctl is not installed: the agent's pod has its log")
    yield from last(tools.run("journalctl", "--no-pager", "-n", _JOURNAL_LINES, "-u", _UNIT))
