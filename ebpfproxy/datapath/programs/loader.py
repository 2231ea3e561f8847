"""Compiled programs, pinned next to the maps that they were compiled for, and reused."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import msgspec

import ebpfproxy
from ebpfproxy.datapath.abi import uapi
from ebpfproxy.datapath.abi.hooks import PACKETS, SOCKETS, Hook, Module
from ebpfproxy.datapath.abi.layout import U32, cpus_of_a_row_shift
from ebpfproxy.datapath.abi.schema import MAP_NAMES
from ebpfproxy.datapath.kernel import bpf
from ebpfproxy.datapath.kernel.libbpf import VerifierError
from ebpfproxy.datapath.kernel.maps import MapSet
from ebpfproxy.datapath.kernel.probe import Features, may_calculate_with_pointers
from ebpfproxy.datapath.programs import bytecode
from ebpfproxy.datapath.services import slots

_SHOWN_LINES = 12
#: The array with the program that others go on with. Each folder of programs has its own, of its version.
WRITERS = "writers"


class LoadError(Exception):
    """Programs did not compile or load; the message has the program's name and the tool's own words."""


class Sizes(NamedTuple):
    """What programs have to know of the maps and of the machine."""

    socket_slots: int
    flow_slots: int
    services: int
    #: Possible CPUs.
    cpus: int


class Options(msgspec.Struct, frozen=True):
    """Options that cannot change while programs run: constants that are filled in when they are loaded."""

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
    #: Programs report decisions to a command that holds the lease of the ``tracing`` map.
    trace_decisions: bool = False
    #: Programs measure how long connections take to be established, and count those that fail.
    measure_connections: bool = False
    #: Programs count bytes and packets of Services.
    measure_traffic: bool = False

    def constants(self, sizes: Sizes) -> dict[str, int]:
        """The constants of bpf/lib/options.h by name: unsigned 64 bits, filled in at the load."""
        return {
            "ORIGIN_SLOT_MASK": sizes.socket_slots - 1,
            "FLOW_SLOT_MASK": sizes.flow_slots - 1,
            "SERVICES": sizes.services,
            "CPUS_OF_A_ROW_SHIFT": cpus_of_a_row_shift(sizes.cpus),
            "HOST_NETNS_COOKIE": self.host_netns_cookie,
            "HAVE_SET_RETVAL": self.features.set_retval,
            "HAVE_MPTCP": self.features.mptcp,
            "NODEPORTS_ON_LOOPBACK": self.node_ports_on_loopback,
            "POD_SOCKETS": self.pod_sockets,
            "MASQUERADE_ALL": self.masquerade_all,
            "BYPASS_NETFILTER": self.bypass_netfilter,
            "MASQUERADE_FIRST": self.masquerade_ports[0],
            "MASQUERADE_LAST": self.masquerade_ports[1],
            "MASQUERADE_PORTS_SHARED": self.masquerade_ports_shared,
            "PODS_BY_CIDR": self.pods_by_cidr,
            "TRACE_DECISIONS": self.trace_decisions,
            "MEASURE_CONNECTIONS": self.measure_connections,
            "MEASURE_TRAFFIC": self.measure_traffic,
        }


def source_folder() -> Path:
    """``bpf/``: inside the installed package, or at the top of a checkout."""
    package = Path(ebpfproxy.__file__).parent
    for folder in (package / "bpf", package.parent / "bpf"):
        if (folder / "sock.c").exists():
            return folder
    raise LoadError(f"the BPF sources are neither in {package / 'bpf'} nor in {package.parent / 'bpf'}")


def recipe(sources: Path, module: Module) -> bytecode.Recipe:
    """What the module is compiled from: the same for maps of any size and all options."""
    any_options = Options(Features(set_retval=False), host_netns_cookie=0)
    return bytecode.Recipe(
        sources=sources,
        source=module.source,
        programs=module.programs,
        defines=(f"-DSEARCHED_SLOTS={slots.SEARCHED}", *module.defines),
        maps=(*MAP_NAMES, WRITERS),
        constants=tuple(sorted(any_options.constants(Sizes(1, 1, 1, 1)))),
    )


def _sizes(maps: MapSet) -> Sizes:
    def entries(name: str) -> int:
        return maps[name].spec.max_entries

    return Sizes(
        entries("sock_origin"), entries("flow_cache"), entries("service_rejections"), bpf.possible_cpus()
    )


def _home(sources: Path, options: Options, maps: MapSet) -> Path:
    digest = hashlib.sha256(recipe(sources, SOCKETS).digest().encode())
    digest.update(repr(sorted(options.constants(_sizes(maps)).items())).encode())
    return maps.folder / f"progs-{digest.hexdigest()[:12]}"


def is_loaded(home: Path, module: Module) -> bool:
    """True if all of the module's programs are pinned in ``home``."""
    return all(pin.exists() for pin in _pins(home, module).values())


def ensure_loaded(maps: MapSet, options: Options, modules: Iterable[Module] = (SOCKETS, PACKETS)) -> Path:
    """The folder with the modules' pinned programs; those that are not there are loaded now.

    Raises LoadError; then nothing that is attached has changed.
    """
    sources = source_folder()
    home = _home(sources, options, maps)
    missing = [m for m in modules if not is_loaded(home, m)]
    # The verifier says it, too, but in its own words, and after many seconds: it looks for speculative paths.
    if missing and not may_calculate_with_pointers():
        raise LoadError("programs do not load without CAP_PERFMON or CAP_SYS_ADMIN")
    home.mkdir(exist_ok=True)
    with ThreadPoolExecutor(len(missing) or 1, thread_name_prefix="loader") as workers:
        loads = [workers.submit(_load, sources, options, maps, home, module) for module in missing]
    failed = [error for load in loads if (error := load.exception()) is not None]
    if failed:
        for module in missing:
            _unpin(home, module)
        if not any(home.iterdir()):
            home.rmdir()
        raise failed[0]
    return home


def _pins(home: Path, module: Module) -> dict[str, Path]:
    """By the names of programs, and of the array that has the one that they go on with."""
    names = (*module.programs, *((WRITERS,) if module.called else ()))
    return {name: home / f"{name}{module.suffix}" for name in names}


def pinned_programs(folder: Path) -> Iterator[Path]:
    """The pins of all programs for the maps of a folder."""
    return (path for path in folder.glob("progs-*/*") if not path.name.startswith(WRITERS))


def _unpin(home: Path, module: Module) -> None:
    """Removes what a load that failed, or was killed, has left."""
    for pin in _pins(home, module).values():
        pin.unlink(missing_ok=True)


def _load(sources: Path, options: Options, maps: MapSet, home: Path, module: Module) -> None:
    _unpin(home, module)
    try:
        programs = bytecode.get(recipe(sources, module)).programs
    except bytecode.NoCompilerError as error:
        raise LoadError(str(error)) from None
    except bytecode.CompileError as error:
        raise LoadError(_compiler_says(str(error), sources / module.source)) from None
    fds = {name: each.fd for name, each in maps.maps.items()}
    constants, pins = options.constants(_sizes(maps)), _pins(home, module)

    def load(hook: Hook) -> int:
        # Kernels before 6.6 know no attach type for tc: theirs is a filter's matter.
        attach_type = 0 if hook.program_type == uapi.PROG_SCHED_CLS else hook.attach_type
        code = programs[hook.name].linked(fds, constants)
        try:
            fd = bpf.prog_load(hook.program_type, attach_type, hook.name, code)
        except VerifierError as error:
            raise LoadError(_verifier_says(hook.name, error)) from None
        opened.callback(os.close, fd)
        bpf.pin(fd, pins[hook.name])
        return fd

    with ExitStack() as opened:
        if module.called:
            fds[WRITERS] = bpf.map_create(uapi.MAP_PROG_ARRAY, WRITERS, 4, 4, 1)
            opened.callback(os.close, fds[WRITERS])
            bpf.map_update(fds[WRITERS], U32.pack(0), U32.pack(load(module.called)))
            # The entry lives as long as a process or a pin holds the array.
            bpf.pin(fds[WRITERS], pins[WRITERS])
        for hook in module.hooks:
            load(hook)


def _compiler_says(said: str, source: Path) -> str:
    """The compiler's own message, shortened, with the source and the kernel."""
    lines = [line for line in said.splitlines() if line.strip()]
    first = next((i for i, line in enumerate(lines) if "error" in line), 0)
    shown = lines[first : first + _SHOWN_LINES]
    return "\n".join([f"{source} does not compile (kernel {platform.release()}):", *shown])


def _verifier_says(program: str, error: VerifierError) -> str:
    """The verifier's own message, shortened, with the program and the kernel. It gives its reason last."""
    shown = [line for line in error.log.splitlines() if line.strip()][-_SHOWN_LINES:]
    what = f"program {program} does not load (kernel {platform.release()})"
    return "\n".join([f"{what}: {os.strerror(error.errno or 0)}", *shown])


def remove_others(maps: MapSet, keep: Path) -> list[Path]:
    """Unpins the programs of earlier builds; those still attached live on until they are replaced."""
    removed = [p for p in maps.folder.glob("progs-*") if p != keep]
    for folder in removed:
        shutil.rmtree(folder)
    return removed
