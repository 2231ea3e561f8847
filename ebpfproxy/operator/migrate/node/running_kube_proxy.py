"""Finds the kube-proxy that runs on this node, how it was started, and its configuration."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import msgspec
import yaml

from ebpfproxy import yaml_text
from ebpfproxy.config import load
from ebpfproxy.config.documents import ConfigurationError
from ebpfproxy.operator.waiting import NODE_SECONDS, Wait

_COMM = "kube-proxy"
#: kube-proxy runs inside the process of these distributions: a setting disables it.
_EMBEDDED = {"k3s-server": "k3s", "k3s-agent": "k3s", "k0s": "k0s", "microk8s": "MicroK8s"}

_POD = re.compile(r"/pod[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}(/|$)")


class Process(msgspec.Struct, frozen=True, kw_only=True):
    """A kube-proxy in this network namespace."""

    pid: int
    command: tuple[str, ...]
    #: ``pod``, a systemd unit's name, or ``process``.
    started_by: str
    mode: str
    config: str | None = None
    #: Fields of its configuration that our agent rejects, and why.
    problems: tuple[str, ...] = ()


def find(proc: Path = Path("/proc")) -> list[Process]:
    """Sees other processes only where /proc is the host's (hostPID, or outside of any pod).

    Raises PermissionError where it may not look at one: CAP_SYS_PTRACE is missing, or AppArmor denies it.
    """
    here = (proc / "self/ns/net").stat().st_ino
    found = []
    for folder in proc.iterdir():
        try:
            if not folder.name.isdigit() or name_of(folder) != _COMM:
                continue
            if (folder / "ns/net").stat().st_ino == here:
                found.append(_read(folder))
        except (FileNotFoundError, ProcessLookupError):  # it ended meanwhile
            continue
    return sorted(found, key=lambda each: each.pid)


def embedded(proc: Path = Path("/proc")) -> str:
    """Returns the distribution that runs kube-proxy inside its own process; empty where none does."""
    for folder in proc.iterdir():
        try:
            if folder.name.isdigit() and (name := _EMBEDDED.get(name_of(folder))):
                return name
        except OSError:
            continue
    return ""


def name_of(folder: Path) -> str:
    """The name of the process with this folder in /proc. Processes name themselves, by any bytes."""
    return (folder / "comm").read_text(encoding="utf-8", errors="replace").strip()


def _read(folder: Path) -> Process:
    command = tuple(part.decode(errors="replace") for part in (folder / "cmdline").read_bytes().split(b"\0"))
    command = command[:-1] if command[-1:] == ("",) else command
    path = option(command, "config")
    mode = option(command, "proxy-mode")
    problems: tuple[str, ...] = ()
    if path:
        # The path is the process' own: in a pod it is in a ConfigMap's volume.
        mode, problems = read_config(folder / "root" / path.lstrip("/"), path)
    return Process(
        pid=int(folder.name),
        command=command,
        started_by=started_by((folder / "cgroup").read_text(errors="replace")),
        mode=mode or "iptables",
        config=path or None,
        problems=problems,
    )


def option(command: tuple[str, ...], name: str) -> str:
    """Returns the value of ``--name VALUE`` or ``--name=VALUE``; empty without it."""
    for at, word in enumerate(command):
        if word.startswith(f"--{name}="):
            return word.partition("=")[2]
        if word == f"--{name}" and at + 1 < len(command):
            return command[at + 1]
    return ""


def read_config(path: Path, shown: str) -> tuple[str, tuple[str, ...]]:
    """Returns the mode of a KubeProxyConfiguration, and what our agent rejects in it."""
    try:
        text = path.read_bytes()
    except OSError as error:
        return "", (f"{shown}: {error.strerror}",)
    return check_config(text, shown)


def check_config(text: str | bytes, shown: str) -> tuple[str, tuple[str, ...]]:
    try:
        load.parse(text, shown)
    except ConfigurationError as error:
        problems = tuple(map(str, error.problems))
    else:
        problems = ()
    try:
        document = yaml_text.load(text)
    except yaml.YAMLError:
        return "", problems
    return (str(document.get("mode") or "") if isinstance(document, dict) else ""), problems


def started_by(cgroup: str) -> str:
    """Tells it from /proc/PID/cgroup: kubelet puts pods below ``kubepods``, systemd has units by name.

    In a container the path begins at its own cgroup: of a pod beside it only the pod's part may be left.
    """
    path = cgroup.strip("\n").rpartition("\n")[2].split(":", 2)[-1]
    if "kubepods" in path or _POD.search(path):
        return "pod"
    unit = path.rpartition("/")[2]
    return unit if unit.endswith(".service") else "process"


def end(process: Process, seconds: float) -> bool:
    """Sends SIGTERM; True if it ended in time. Its rules stay in force: kube-proxy removes none."""
    # A pidfd names the process itself: its number may be reused.
    try:
        fd = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return True
    try:
        if process not in find():
            return True
        signal.pidfd_send_signal(fd, signal.SIGTERM)
        return wait_gone(seconds)
    finally:
        os.close(fd)


def wait_gone(seconds: float) -> bool:
    """Waits until no kube-proxy runs in this network namespace; False where one still does."""
    return any(not find() for _ in Wait(seconds, NODE_SECONDS))
