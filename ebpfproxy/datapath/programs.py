"""Compiled programs, pinned beside the maps they were compiled for, and reused while nothing changed."""

from __future__ import annotations

import errno
import hashlib
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec

import ebpfproxy
from ebpfproxy.datapath import bpf, slots
from ebpfproxy.datapath.hooks import PACKETS, SOCKETS, Module
from ebpfproxy.datapath.loader import LoadRequest
from ebpfproxy.datapath.maps import MapSet
from ebpfproxy.datapath.probe import Features

_SHOWN_LINES = 12
_LOAD_SECONDS = 120


class LoadError(Exception):
    """Programs did not compile or load; the message has the program's name and the tool's own words."""


class Options(msgspec.Struct, frozen=True):
    """What is compiled in, because it cannot change while programs run."""

    features: Features
    host_netns_cookie: int
    node_ports_on_loopback: bool = True
    #: Sockets of pods are served, not only those of the host's namespace.
    pod_sockets: bool = True
    masquerade_all: bool = False
    #: Masqueraded flows are forwarded from the hook: no netfilter rule sees them.
    bypass_netfilter: bool = False
    #: Ports that stand for masqueraded clients, first and last.
    masquerade_ports: tuple[int, int] = (1024, 32767)
    #: Sockets of this host may have them, too: one that has a port towards a backend is looked for.
    masquerade_ports_shared: bool = False
    #: A local pod is known by its address (the ``cidrs`` map), not by the device that it is behind.
    pods_by_cidr: bool = False

    def defines(self) -> list[str]:
        return [
            f"-DHAVE_SET_RETVAL={int(self.features.set_retval)}",
            f"-DHOST_NETNS_COOKIE={self.host_netns_cookie}ULL",
            f"-DNODEPORTS_ON_LOOPBACK={int(self.node_ports_on_loopback)}",
            f"-DPOD_SOCKETS={int(self.pod_sockets)}",
            f"-DMASQUERADE_ALL={int(self.masquerade_all)}",
            f"-DBYPASS_NETFILTER={int(self.bypass_netfilter)}",
            f"-DMASQUERADE_FIRST={self.masquerade_ports[0]}",
            f"-DMASQUERADE_LAST={self.masquerade_ports[1]}",
            f"-DMASQUERADE_PORTS_SHARED={int(self.masquerade_ports_shared)}",
            f"-DPODS_BY_CIDR={int(self.pods_by_cidr)}",
            f"-DSEARCHED_SLOTS={slots.SEARCHED}",
        ]


def source_folder() -> Path:
    """``bpf/``: inside the installed package, or at the top of a checkout."""
    package = Path(ebpfproxy.__file__).parent
    for folder in (package / "bpf", package.parent / "bpf"):
        if (folder / "sock.c").exists():
            return folder
    raise LoadError(f"the BPF sources are neither in {package / 'bpf'} nor in {package.parent / 'bpf'}")


def _digest(sources: Path, defines: list[str]) -> str:
    digest = hashlib.sha256("\0".join(defines).encode())
    for path in sorted(p for p in sources.rglob("*") if p.suffix in (".c", ".h")):
        digest.update(str(path.relative_to(sources)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def is_loaded(home: Path, module: Module) -> bool:
    """Whether all of the module's programs are pinned in ``home``."""
    return all(pin.exists() for pin in _pins(home, module).values())


def ensure_loaded(maps: MapSet, options: Options, modules: Iterable[Module] = (SOCKETS, PACKETS)) -> Path:
    """The folder with the modules' pinned programs; those that were never compiled before are compiled now.

    Raises LoadError; then nothing that is attached has changed.
    """
    sources = source_folder()
    defines = options.defines()
    home = maps.folder / f"progs-{_digest(sources, defines)}"
    home.mkdir(exist_ok=True)
    missing = [m for m in modules if not is_loaded(home, m)]
    with ThreadPoolExecutor(len(missing) or 1, thread_name_prefix="loader") as workers:
        loads = [workers.submit(_load, sources, defines, maps, home, module) for module in missing]
    failed = [error for load in loads if (error := load.exception()) is not None]
    if failed:
        for module in missing:
            _unpin(home, module)
        if not any(home.iterdir()):
            home.rmdir()
        raise failed[0]
    return home


def _pins(home: Path, module: Module) -> dict[str, Path]:
    return {hook.name: home / f"{hook.name}{module.suffix}" for hook in module.hooks}


def _unpin(home: Path, module: Module) -> None:
    """What a load that failed, or was killed, has left."""
    for pin in _pins(home, module).values():
        pin.unlink(missing_ok=True)


def _load(sources: Path, defines: list[str], maps: MapSet, home: Path, module: Module) -> None:
    _unpin(home, module)
    _compile(sources, [*defines, *module.defines], maps, module, _pins(home, module))


def _compile(sources: Path, defines: list[str], maps: MapSet, module: Module, pins: dict[str, Path]) -> None:
    fds = {name: each.fd for name, each in maps.maps.items()}
    request = LoadRequest(
        source=str(sources / module.source),
        headers=str(sources / "include"),
        cflags=[
            f"-I{sources}",
            "-Wall",
            "-Wextra",
            "-Werror",
            *defines,
            *(f"-DMAP_FD_{name}={fd}" for name, fd in fds.items()),
        ],
        programs=[(h.name, h.program_type, h.attach_type, str(pins[h.name])) for h in module.hooks],
    )
    try:
        done = subprocess.run(
            [sys.executable, "-m", "ebpfproxy.datapath.loader"],
            input=msgspec.json.encode(request),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            pass_fds=tuple(fds.values()),
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            timeout=_LOAD_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise LoadError(f"loading took longer than {_LOAD_SECONDS} s") from None
    if done.returncode:
        said = done.stderr.decode(errors="replace")
        raise LoadError(explain(said, request.source, platform.release()))


def explain(said: str, source: str, kernel: str) -> str:
    """The compiler's or the verifier's own message, shortened, with the program and the kernel."""
    lines = [line for line in said.splitlines() if line.strip()]
    starts = [i for i, line in enumerate(lines) if line.startswith("program ")]
    if not starts:
        first = next((i for i, line in enumerate(lines) if "error" in line), 0)
        shown = lines[first : first + _SHOWN_LINES]
        return f"{source} does not compile (kernel {kernel}):\n" + "\n".join(shown)
    name = lines[starts[-1]].removeprefix("program ").rstrip(":")
    # The verifier gives its reason last.
    shown = lines[starts[-1] + 1 :][-_SHOWN_LINES:]
    return f"program {name} does not load (kernel {kernel}):\n" + "\n".join(shown)


def remove_others(maps: MapSet, keep: Path) -> list[Path]:
    """Unpins the programs of earlier builds; those still attached live on until they are replaced."""
    removed = [p for p in maps.folder.glob("progs-*") if p != keep]
    for folder in removed:
        shutil.rmtree(folder)
    return removed


def program_id(path: Path) -> int | None:
    """The id of the pinned program, None where nothing is pinned."""
    try:
        fd = bpf.get_pinned(path)
    except bpf.BpfError as error:
        if error.errno == errno.ENOENT:
            return None
        raise
    try:
        return int(bpf.prog_info(fd).id)
    finally:
        os.close(fd)
