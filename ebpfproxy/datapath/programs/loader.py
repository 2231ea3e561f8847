"""Compiled programs, pinned next to the maps that they were compiled for, and reused."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import msgspec

import ebpfproxy
from ebpfproxy.datapath.abi import uapi
from ebpfproxy.datapath.abi.hooks import FORWARDING, PACKETS, SOCKETS, Hook, Module
from ebpfproxy.datapath.abi.layout import U32, cpus_of_a_row_shift
from ebpfproxy.datapath.abi.schema import MAP_NAMES, SEARCHED_SLOTS
from ebpfproxy.datapath.kernel import bpf, extension
from ebpfproxy.datapath.kernel.libbpf import VerifierError
from ebpfproxy.datapath.kernel.maps import MapSet
from ebpfproxy.datapath.kernel.probe import Features, may_calculate_with_pointers
from ebpfproxy.datapath.kernel.socket_fields import NO_SOCKET_FIELDS
from ebpfproxy.datapath.programs import bytecode, xdp_chain
from ebpfproxy.logs import get_logger

log = get_logger(__name__)

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
    frontend_lines: int
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
    #: XDP programs forward flows, where a device takes one.
    forwards_at_xdp: bool = False
    #: A backend's node that gets the option of DSR answers the client itself.
    dsr_accepts: bool = False
    #: This node sends the option.
    dsr_sends: bool = False
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
            "FRONTEND_LINE_MASK": sizes.frontend_lines - 1,
            "CPUS_OF_A_ROW_SHIFT": cpus_of_a_row_shift(sizes.cpus),
            "LOADS_IN_ORDER": platform.machine() == "x86_64",
            "HOST_NETNS_COOKIE": self.host_netns_cookie,
            "HAVE_SET_RETVAL": self.features.set_retval,
            "HAVE_MPTCP": self.features.mptcp,
            **(self.features.socket_fields or NO_SOCKET_FIELDS).constants(),
            "NODEPORTS_ON_LOOPBACK": self.node_ports_on_loopback,
            "POD_SOCKETS": self.pod_sockets,
            "MASQUERADE_ALL": self.masquerade_all,
            "BYPASS_NETFILTER": self.bypass_netfilter,
            "FORWARDS_AT_XDP": self.forwards_at_xdp,
            "DSR_ACCEPTS": self.dsr_accepts,
            "DSR_SENDS": self.dsr_sends,
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


def recipe(sources: Path, module: Module, content: str = "") -> bytecode.Recipe:
    """What the module is compiled from: the same for maps of any size and all options.

    ``content``: ``bytecode.content_of(sources)``, where it is known.
    """
    any_options = Options(Features(set_retval=False), host_netns_cookie=0)
    return bytecode.Recipe(
        sources=sources,
        source=module.source,
        programs=tuple(hook.name for hook in module.programs),
        defines=(f"-DSEARCHED_SLOTS={SEARCHED_SLOTS}", *module.defines),
        maps=(*MAP_NAMES, WRITERS),
        constants=tuple(sorted(any_options.constants(Sizes(1, 1, 1, 1, 1)))),
        content=content,
    )


def _sizes(maps: MapSet) -> Sizes:
    names = ("sock_origin", "flow_cache", "service_rejections", "frontend_cache")
    sockets, flows, services, lines = (maps[name].spec.max_entries for name in names)
    return Sizes(sockets, flows, services, lines, bpf.possible_cpus())


def _home(sources: Path, content: str, options: Options, maps: MapSet) -> Path:
    digest = hashlib.sha256(recipe(sources, SOCKETS, content).digest().encode())
    digest.update(repr(sorted(options.constants(_sizes(maps)).items())).encode())
    # Where somebody has unpinned a map, what was loaded before uses another one than this agent.
    digest.update(repr(sorted(bpf.map_info(each.fd).id for each in maps.maps.values())).encode())
    return maps.folder / f"progs-{digest.hexdigest()[:12]}"


def is_loaded(home: Path, module: Module) -> bool:
    """True if all of the module's programs are pinned in ``home``."""
    return all(pin.exists() for pin in _pins(home, module).values())


def ensure_loaded(maps: MapSet, options: Options, modules: Iterable[Module] = (SOCKETS, PACKETS)) -> Path:
    """The folder with the modules' pinned programs; those that are not there are loaded now.

    Programs with other options, or for other maps, stay in theirs until :func:`remove_others`.
    Raises LoadError; then nothing that is attached has changed.
    """
    sources = source_folder()
    content = bytecode.content_of(sources)
    home = _home(sources, content, options, maps)
    missing = [m for m in modules if not is_loaded(home, m)]
    # The verifier says it, too, but in its own words, and after many seconds: it looks for speculative paths.
    if missing and not may_calculate_with_pointers():
        raise LoadError("programs do not load without CAP_PERFMON or CAP_SYS_ADMIN")
    home.mkdir(exist_ok=True)
    try:
        _load([recipe(sources, module, content) for module in missing], options, maps, home, missing)
    except Exception:
        for module in missing:
            _unpin(home, module)
        if not any(home.iterdir()):
            home.rmdir()
        raise
    return home


def ensure_extension(maps: MapSet, options: Options, home: Path) -> None:
    """Loads the XDP program once more, for dispatchers of libxdp, unless it is pinned in ``home``.

    Raises LoadError.
    """
    pin = home / xdp_chain.NAME
    if pin.exists():
        return
    (hook,) = FORWARDING.hooks
    program = _compiled(recipe(source_folder(), FORWARDING))[hook.name]
    code = _linked({hook.name: program}, options, maps)[hook.name]
    try:
        fd = extension.load_extension(xdp_chain.NAME, code, xdp_chain.PRIORITY)
    except VerifierError as error:
        raise LoadError(_verifier_says(xdp_chain.NAME, error)) from None
    except OSError as error:
        raise LoadError(str(error)) from None
    try:
        bpf.pin(fd, pin)
    finally:
        os.close(fd)


def _pins(home: Path, module: Module) -> dict[str, Path]:
    """By the names of programs, and of the array that has the one that they go on with."""
    names = (*(hook.name for hook in module.programs), *((WRITERS,) if module.called else ()))
    return {name: home / f"{name}{module.suffix}" for name in names}


def pinned_programs(folder: Path) -> Iterator[Path]:
    """The pins of all programs for the maps of a folder."""
    return (path for path in folder.glob("progs-*/*") if not path.name.startswith(WRITERS))


def _unpin(home: Path, module: Module) -> None:
    """Removes what a load that failed, or was killed, has left."""
    for pin in _pins(home, module).values():
        pin.unlink(missing_ok=True)


class _Program(NamedTuple):
    hook: Hook
    code: bytes
    pin: Path


def _load(
    recipes: Sequence[bytecode.Recipe],
    options: Options,
    maps: MapSet,
    home: Path,
    modules: Sequence[Module],
) -> None:
    """Raises the first failure, once nothing is loaded any more."""
    if not modules:
        return
    programs: list[_Program] = []
    arrays: dict[Module, int] = {}
    with ExitStack() as opened:
        # Compilers are processes of their own.
        with ThreadPoolExecutor(len(modules), thread_name_prefix="compiler") as workers:
            for module, compiled in zip(modules, workers.map(_compiled, recipes), strict=True):
                _unpin(home, module)
                if module.called:
                    arrays[module] = bpf.map_create(uapi.MAP_PROG_ARRAY, WRITERS, 4, 4, 1)
                    opened.callback(os.close, arrays[module])
                codes = _linked(compiled, options, maps, arrays.get(module))
                pins = _pins(home, module)
                programs += (_Program(hook, codes[hook.name], pins[hook.name]) for hook in module.programs)
        # The longest ones first: the others fill up what time is left beside them.
        programs.sort(key=lambda each: -len(each.code))
        count = len(os.sched_getaffinity(0))
        with ThreadPoolExecutor(count, thread_name_prefix="loader", initializer=_give_way) as workers:
            for _ in workers.map(_load_program, programs):
                pass
        for module, array in arrays.items():
            _fill(array, module, _pins(home, module))


def _fill(array: int, module: Module, pins: Mapping[str, Path]) -> None:
    """Enters the program that the module's others go on with, and pins the array."""
    assert module.called is not None
    with bpf.opened(pins[module.called.name]) as program:
        bpf.map_update(array, U32.pack(0), U32.pack(program))
    # The entry lives as long as a process or a pin holds the array.
    bpf.pin(array, pins[WRITERS])


def _give_way() -> None:
    """The agent reads its first lists meanwhile, in one thread: with few processors that takes longest."""
    # On Linux this is for the calling thread alone.
    os.nice(10)


def _compiled(of: bytecode.Recipe) -> dict[str, bytecode.Program]:
    try:
        return bytecode.get(of).programs
    except bytecode.NoCompilerError as error:
        raise LoadError(str(error)) from None
    except bytecode.CompileError as error:
        raise LoadError(_compiler_says(str(error), of.sources / of.source)) from None


def _linked(
    compiled: Mapping[str, bytecode.Program], options: Options, maps: MapSet, writers: int | None = None
) -> dict[str, bytes]:
    """Programs by name, to be loaded with these options and maps.

    ``writers``: the descriptor of the array with the program that they go on with, if there is one.
    """
    fds = {name: each.fd for name, each in maps.maps.items()}
    if writers is not None:
        fds[WRITERS] = writers
    constants = options.constants(_sizes(maps))
    return {name: program.linked(fds, constants) for name, program in compiled.items()}


def _load_program(program: _Program) -> None:
    hook = program.hook
    # Kernels before 6.6 know no attach type for tc: theirs is a filter's matter.
    attach_type = 0 if hook.program_type == uapi.PROG_SCHED_CLS else hook.attach_type
    try:
        fd = bpf.prog_load(hook.program_type, attach_type, hook.name, program.code)
    except VerifierError as error:
        raise LoadError(_verifier_says(hook.name, error)) from None
    try:
        bpf.pin(fd, program.pin)
    finally:
        os.close(fd)


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
