"""Our XDP program among those of others: in the dispatcher of libxdp, which calls one after the other.

libxdp.so.1 changes a dispatcher: it attaches another one in its place, in one step. What is in a dispatcher
can be read without it, from pins (lib/libxdp/protocol.org of xdp-tools). Programs run in the order of their
priorities, the next one if those before have passed the packet.
"""

from __future__ import annotations

import ctypes as ct
import functools
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from ebpfproxy.datapath.kernel import bpf
from ebpfproxy.datapath.programs.attach import program_id

#: The program's name, by which others know it, too, and that of its pin.
NAME = "ebpfproxy"
#: After all that have libxdp's default, 50, such as filters: what ours forwards, no later program sees.
PRIORITY = 100
_BPFFS = "/sys/fs/bpf"
_LIBRARY = "libxdp.so.1"
_MEMBER = re.compile(r"prog(\d+)-prog")
#: enum xdp_attach_mode.
_NATIVE, _GENERIC = 1, 2
_MAX_ERRNO = 4095
_POINTER = ct.c_void_p
_FUNCTIONS = {
    "xdp_program__from_fd": ((ct.c_int,), _POINTER),
    "xdp_program__from_id": ((ct.c_uint32,), _POINTER),
    "xdp_program__attach": ((_POINTER, ct.c_int, ct.c_int, ct.c_uint), ct.c_int),
    "xdp_program__detach": ((_POINTER, ct.c_int, ct.c_int, ct.c_uint), ct.c_int),
    "xdp_program__close": ((_POINTER,), None),
    "libxdp_set_print": ((_POINTER,), _POINTER),
}


class ChainError(Exception):
    """The message says what did not work."""


@functools.cache
def _library() -> ct.CDLL | None:
    try:
        library = ct.CDLL(_LIBRARY)
    except OSError:
        return None
    for name, (arguments, result) in _FUNCTIONS.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, result
    library.libxdp_set_print(None)
    return library


def obstacle() -> str:
    """Why no dispatcher can be changed here, empty if libxdp is installed."""
    return "" if _library() is not None else f"{_LIBRARY} is not installed, which could chain ours"


def _folder(ifindex: int, dispatcher: int) -> Path:
    return Path(os.environ.get("LIBXDP_BPFFS", _BPFFS), "xdp", f"dispatch-{ifindex}-{dispatcher}")


def members(ifindex: int, program: int) -> list[int] | None:
    """The ids of programs as they run, if the program that the device has is a dispatcher, else None."""
    folder = _folder(ifindex, program)
    try:
        names = [found for path in folder.iterdir() if (found := _MEMBER.fullmatch(path.name))]
    except FileNotFoundError:
        return None
    ordered = sorted(names, key=lambda found: int(found[1]))
    # One that is replaced now has no pins any more.
    return [number for each in ordered if (number := program_id(folder / each[0])) is not None]


def dispatchers_with(ifindex: int, program: int) -> Iterator[list[int]]:
    """The members of dispatchers that have this program, in any network namespace."""
    for path in sorted(_folder(ifindex, 0).parent.glob(f"dispatch-{ifindex}-*")):
        number = path.name.rpartition("-")[2]
        if number.isdecimal() and program in (programs := members(ifindex, int(number)) or []):
            yield programs


def names_of(programs: Iterable[int]) -> str:
    """Names of these programs but ours."""
    return ", ".join(name for number in programs if (name := bpf.prog_name(number)) not in ("", NAME))


def join(ifindex: int, program: int, *, is_native: bool) -> None:
    """Adds a loaded extension, by its descriptor, to the device's dispatcher. Raises ChainError."""
    library = _required()
    opened = library.xdp_program__from_fd(program)
    _call("xdp_program__attach", opened, ifindex, is_native=is_native)


def leave(ifindex: int, program: int, *, is_native: bool) -> None:
    """Removes a program, by its id; with the last one the dispatcher goes. Raises ChainError."""
    library = _required()
    opened = library.xdp_program__from_id(program)
    _call("xdp_program__detach", opened, ifindex, is_native=is_native)


def _required() -> ct.CDLL:
    library = _library()
    if library is None:
        raise ChainError(obstacle())
    return library


def _call(function: str, program: int | None, ifindex: int, *, is_native: bool) -> None:
    library = _required()
    if (number := _error_of(program)) or program is None:
        raise ChainError(f"libxdp does not open the program: {os.strerror(number)}")
    try:
        result = getattr(library, function)(program, ifindex, _NATIVE if is_native else _GENERIC, 0)
    finally:
        library.xdp_program__close(program)
    if result:
        raise ChainError(f"libxdp: {os.strerror(-result)}")


def _error_of(pointer: int | None) -> int:
    """The number that libxdp returns in place of a pointer."""
    value = ct.c_ssize_t(pointer or 0).value
    return -value if -_MAX_ERRNO <= value < 0 else 0
