"""Compiled programs, before they are loaded: instructions with references to maps and constants by name.

What is compiled says nothing of one start of one node: maps' file descriptors and the host's namespace are
filled in when a program is loaded. So it is kept in a file, which a built package ships (``build``) for the
machine that it was built on. Where there is none, the first load compiles, and later ones use the cache.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import msgspec

import ebpfproxy
from ebpfproxy.datapath.programs.compiler import NO_COMPILER, CompileRequest
from ebpfproxy.logs import get_logger

log = get_logger(__name__)

#: The package ships these files; a checkout has none.
SHIPPED = Path(ebpfproxy.__file__).parent / "bytecode"
#: This node keeps here what it compiled; where it cannot be written to, every load compiles.
CACHE = Path(os.environ.get("EBPFPROXY_CACHE_DIR", "/var/cache/ebpfproxy"))
#: Files that stay: those used last.
_KEPT_FILES = 64
#: It changes with Bytecode: a node's cache outlives this version of the agent.
_FORMAT = "3"
_LOCK_SUFFIX = ".lock"
_SECONDS = 120

# struct bpf_insn: opcode, two registers, offset, immediate value.
_INSTRUCTION = struct.Struct("=BBhI")
#: BPF_LD | BPF_IMM | BPF_DW: a value of 64 bits, in this instruction and the next.
_LOAD_64 = 0x18
#: The half of the registers' byte that is the source: a bit field in the machine's order.
_SOURCE_SHIFT = 4 if sys.byteorder == "little" else 0
#: Sources that give the value of _LOAD_64 a meaning: a map, or the value of one (BPF_PSEUDO_MAP_FD,
#: BPF_PSEUDO_MAP_VALUE), and one that only lib/maps.h has.
_MAPS = (1, 2)
_LOAD_TIME_CONSTANT = 15
#: BPF_JMP | BPF_CALL, with BPF_PSEUDO_KFUNC_CALL as source for a function of the kernel's that is no helper.
_CALL = 0x85
_KERNEL_FUNCTION = 2
#: BPF_ALU64 | BPF_MOV | BPF_K: register 0 gets the immediate value.
_MOVE = 0xB7
#: Calls of helpers with such numbers, which no helper has: a constant is the function's id. See lib/maps.h.
_FUNCTIONS = range(0x7F000000, 0x7F010000)


class CompileError(Exception):
    """A source does not compile; the message has the compiler's own words."""


class NoCompilerError(Exception):
    """Nothing was compiled for this machine, and there is no compiler; the message says what would help."""


class Program(msgspec.Struct, frozen=True, array_like=True):
    """One program. References are a place, counted in instructions, and a name."""

    instructions: bytes
    maps: list[tuple[int, str]]
    constants: list[tuple[int, str]]
    #: Calls of kernel functions, with the constant that has the function's BTF id.
    functions: list[tuple[int, str]] = []

    def linked(self, map_fds: Mapping[str, int], constants: Mapping[str, int]) -> bytes:
        """The instructions to load; ``constants`` are unsigned numbers of 64 bits."""
        made = bytearray(self.instructions)
        for at, name in self.maps:
            _put(made, at, map_fds[name])
        for at, name in self.constants:
            _put(made, at, constants[name], is_constant=True)
        for at, name in self.functions:
            _put_call(made, at, constants[name])
        return bytes(made)


class Bytecode(msgspec.Struct, frozen=True, array_like=True):
    """Programs by name, and the compiler's warnings of their source."""

    programs: dict[str, Program]
    warnings: str


#: Made with the module: msgspec.decode() looks at a structure when it first meets it, and what another thread
#: decodes meanwhile with the same type ends the process by SIGSEGV (msgspec 0.22).
_BYTECODE = msgspec.msgpack.Decoder(Bytecode)


class Recipe(msgspec.Struct, frozen=True):
    """The input of a compilation. ``maps`` and ``constants``: the names that the source may refer to."""

    sources: Path
    source: str
    programs: tuple[str, ...]
    defines: tuple[str, ...]
    maps: tuple[str, ...]
    constants: tuple[str, ...]
    #: The digest of the sources where it is known: several recipes have the same.
    content: str = ""

    def digest(self) -> str:
        names = (*self.programs, *self.defines, *self.maps, *self.constants)
        content = self.content or content_of(self.sources)
        made = "\0".join((_FORMAT, platform.machine(), self.source, *names, content))
        return hashlib.sha256(made.encode()).hexdigest()[:32]


def content_of(sources: Path) -> str:
    """A digest of all sources."""
    digest = hashlib.sha256()
    for path in sorted(p for p in sources.rglob("*") if p.suffix in (".c", ".h")):
        digest.update(str(path.relative_to(sources)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def get(recipe: Recipe) -> Bytecode:
    """What the package ships or the cache has, else compiled and stored there.

    Raises CompileError and NoCompilerError.
    """
    digest = recipe.digest()
    return _read(SHIPPED / digest) or _compiled(recipe, CACHE / digest)


def compiled(recipe: Recipe, folder: Path) -> Bytecode:
    """What ``folder`` has, else compiled and stored there. Raises CompileError and NoCompilerError."""
    return _compiled(recipe, folder / recipe.digest())


def _compiled(recipe: Recipe, path: Path) -> Bytecode:
    found = _read(path)
    if found is not None:
        # The files used last are kept. The folder may be where nothing can be changed.
        with suppress(OSError):
            os.utime(path)
        return found
    with _lock(path):
        # Another process may have compiled it meanwhile.
        found = _read(path)
        if found is None:
            found = _compile(recipe)
            _write(path, found)
            if found.warnings:
                log.warning("compiler warnings", source=recipe.source, warnings=found.warnings)
    return found


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Lets one process at a time compile for ``path``; if nothing can be written there, each compiles."""
    lock = path.with_name(f".{path.name}{_LOCK_SUFFIX}")
    with ExitStack() as stack:
        try:
            lock.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            fcntl.flock(stack.enter_context(lock.open("w")), fcntl.LOCK_EX)
        except OSError as error:
            log.debug("failed to lock the cache of programs, compiling without a lock", reason=str(error))
        try:
            yield
        finally:
            with suppress(OSError):
                lock.unlink(missing_ok=True)


def _compile(recipe: Recipe) -> Bytecode:
    source = recipe.sources / recipe.source
    request = CompileRequest(
        source=str(source),
        headers=str(recipe.sources / "include"),
        cflags=[
            f"-I{recipe.sources}",
            "-Wall",
            "-Wextra",
            # bcc asks for debug information, which is a fifth of the work and which nothing reads here.
            "-g0",
            *recipe.defines,
            *(f"-DMAP_NUMBER_{name}={number}" for number, name in enumerate(recipe.maps)),
            *(f"-DCONSTANT_NUMBER_{name}={number}" for number, name in enumerate(recipe.constants)),
        ],
        programs=list(recipe.programs),
    )
    try:
        done = subprocess.run(
            [sys.executable, "-m", "ebpfproxy.datapath.programs.compiler"],
            input=msgspec.json.encode(request),
            capture_output=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            timeout=_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise CompileError(f"{source}: compiling took longer than {_SECONDS} s") from None
    said = done.stderr.decode(errors="replace").strip()
    if done.returncode == NO_COMPILER:
        raise NoCompilerError(
            f"no bytecode of {recipe.source} for {platform.machine()} in {SHIPPED} or {CACHE}, and no "
            f"compiler to make it: {said}. Install the distribution's python3-bpfcc, or use the image that "
            "includes it (without -slim in its name)"
        )
    if done.returncode:
        raise CompileError(said)
    programs = msgspec.msgpack.decode(done.stdout, type=dict[str, bytes])
    return Bytecode({name: _program(code, recipe) for name, code in programs.items()}, said)


def _program(code: bytes, recipe: Recipe) -> Program:
    maps: list[tuple[int, str]] = []
    constants: list[tuple[int, str]] = []
    functions: list[tuple[int, str]] = []
    is_second_half = False
    for at, (opcode, registers, _, value) in enumerate(_INSTRUCTION.iter_unpack(code)):
        if opcode == _CALL and value in _FUNCTIONS and not is_second_half:
            functions.append((at, recipe.constants[value - _FUNCTIONS.start]))
        if is_second_half or opcode != _LOAD_64:
            is_second_half = False
            continue
        is_second_half = True
        meaning = registers >> _SOURCE_SHIFT & 0x0F
        if meaning in _MAPS:
            maps.append((at, recipe.maps[value]))
        elif meaning == _LOAD_TIME_CONSTANT:
            constants.append((at, recipe.constants[value]))
    return Program(code, maps, constants, functions)


def _put(instructions: bytearray, at: int, value: int, *, is_constant: bool = False) -> None:
    """A constant is a plain number to the kernel."""
    size = _INSTRUCTION.size
    opcode, registers, offset, _ = _INSTRUCTION.unpack_from(instructions, at * size)
    if is_constant:
        registers &= ~(0x0F << _SOURCE_SHIFT)
    _INSTRUCTION.pack_into(instructions, at * size, opcode, registers, offset, value & 0xFFFFFFFF)
    _INSTRUCTION.pack_into(instructions, (at + 1) * size, 0, 0, 0, value >> 32)


def _put_call(instructions: bytearray, at: int, function: int) -> None:
    """Calls the kernel function with this BTF id. Without one the call, which nothing reaches, returns 0."""
    call = (_CALL, _KERNEL_FUNCTION << _SOURCE_SHIFT, 0, function) if function else (_MOVE, 0, 0, 0)
    _INSTRUCTION.pack_into(instructions, at * _INSTRUCTION.size, *call)


# -- files: a SHA-256 of what follows, and Bytecode as MessagePack


def _read(path: Path) -> Bytecode | None:
    try:
        content = path.read_bytes()
        digest, bytecode = content[:32], content[32:]
        if hashlib.sha256(bytecode).digest() != digest:
            log.warning("bytecode is damaged, compiling again", file=str(path))
            return None
        return _BYTECODE.decode(bytecode)
    except FileNotFoundError:
        return None
    except OSError as error:
        log.debug("failed to read bytecode", file=str(path), reason=str(error))
        return None


def _write(path: Path, bytecode: Bytecode) -> None:
    content = msgspec.msgpack.encode(bytecode)
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".", delete=False) as made:
            try:
                made.write(hashlib.sha256(content).digest() + content)
                made.flush()
                Path(made.name).replace(path)
            except OSError:
                Path(made.name).unlink()
                raise
        kept = (each for each in path.parent.iterdir() if each.suffix != _LOCK_SUFFIX)
        files = sorted(kept, key=lambda each: each.stat().st_mtime, reverse=True)
        for each in files[_KEPT_FILES:]:
            each.unlink(missing_ok=True)
    except OSError as error:
        log.debug(
            "failed to write the cache of programs, compiling again at the next start", reason=str(error)
        )
