"""Netlink messages and their attributes (linux/netlink.h), packed and taken apart for the whole agent.

pyroute2's decoding takes 36 us a message: too long where tens of thousands of sockets are to be ended
within a second, or a dump of conntrack has a million entries. Importing it takes 0.15 s and 12 MB: only the
migration does, which changes IPVS.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Callable, Iterator
from functools import wraps
from typing import NamedTuple, ParamSpec, TypeVar

#: Flags of a request.
REQUEST, ACK, DUMP = 0x1, 0x4, 0x300
#: The object must not exist yet.
CREATE = 0x600
_ERROR, _DONE = 2, 3
#: Flags of an error: it has the header of the request only (NLM_F_CAPPED), and attributes (NLM_F_ACK_TLVS).
_CAPPED, _HAS_ATTRIBUTES = 0x100, 0x200
_TEXT = 1  # NLMSGERR_ATTR_MSG
_HEADER = struct.Struct("=IHHII")  # struct nlmsghdr: length, type, flags, sequence, port
_NUMBER = struct.Struct("=i")  # a negative errno, or 0
_ATTRIBUTE = struct.Struct("=HH")  # struct nlattr: length, type
_NESTED, _TYPE_MASK = 1 << 15, 0x3FFF
_RECEIVE = 1 << 18
_SOL_NETLINK, _CAP_ACK, _EXT_ACK = 270, 10, 11
_LAST_ERRNO = 4095  # MAX_ERRNO of linux/err.h

P = ParamSpec("P")
R = TypeVar("R")


class MalformedError(OSError):
    """A message that cannot be read. Callers know OSError, which the kernel's own errors are."""

    def __init__(self, why: object) -> None:
        super().__init__(errno.EBADMSG, f"a netlink message cannot be read: {why}")


def reading(function: Callable[P, R]) -> Callable[P, R]:
    """Decorates what takes a message apart: raises MalformedError where that is too short or lacks a part."""

    @wraps(function)
    def read(*arguments: P.args, **named: P.kwargs) -> R:
        try:
            return function(*arguments, **named)
        except (struct.error, LookupError, ValueError) as error:
            raise MalformedError(repr(error)) from error

    return read


class Message(NamedTuple):
    """One netlink message, without its header. ``payload`` is a view of the socket's buffer."""

    kind: int
    sequence: int
    payload: memoryview
    flags: int = 0

    @property
    def is_error(self) -> bool:
        """True for NLMSG_ERROR; an acknowledgement is one with the number 0."""
        return self.kind == _ERROR

    @property
    def error(self) -> OSError | None:
        """The error of such a message, or of a dump's end; None for an acknowledgement.

        It has the kernel's own text where the socket asks for that (:func:`explain_errors`).
        """
        if len(self.payload) < _NUMBER.size:
            raise MalformedError("an error without a number")
        number = -_NUMBER.unpack_from(self.payload)[0]
        if not 0 <= number <= _LAST_ERRNO:
            raise MalformedError(f"an error {number}")
        return OSError(number, self._text or os.strerror(number)) if number else None

    @property
    def _text(self) -> str:
        if not (self.is_error and self.flags & _CAPPED and self.flags & _HAS_ATTRIBUTES):
            return ""
        text = attributes(self.payload[_NUMBER.size + _HEADER.size :]).get(_TEXT, memoryview(b""))
        return bytes(text).rstrip(b"\0").decode(errors="replace")


def explain_errors(netlink: socket.socket) -> None:
    """Has the kernel add a text to errors, where it has one."""
    for option in (_CAP_ACK, _EXT_ACK):
        netlink.setsockopt(_SOL_NETLINK, option, 1)


def pack(kind: int, flags: int, body: bytes, sequence: int = 0) -> bytes:
    """Packs a message. ``body`` is padded by the caller; attributes are padded already."""
    return _HEADER.pack(_HEADER.size + len(body), kind, flags, sequence, 0) + body


def messages(data: bytes) -> Iterator[Message]:
    """The messages of one datagram. Raises MalformedError."""
    view = memoryview(data)
    at = 0
    while at + _HEADER.size <= len(data):
        length, kind, flags, sequence, _ = _HEADER.unpack_from(data, at)
        if not _HEADER.size <= length <= len(data) - at:
            raise MalformedError(f"{length} bytes of {len(data) - at}")
        yield Message(kind, sequence, view[at + _HEADER.size : at + length], flags)
        at += (length + 3) & ~3


def replies(netlink: socket.socket) -> Iterator[Message]:
    """The messages of a dump until it is done, or those that a request gets before its acknowledgement.

    Raises OSError: with the kernel's number, or because nothing comes in time.
    """
    while True:
        for each in messages(netlink.recv(_RECEIVE)):
            if each.kind == _DONE:
                if len(each.payload) >= _NUMBER.size and (error := each.error):
                    raise error
                return
            if each.is_error:
                if error := each.error:
                    raise error
                return
            yield each


def receive(netlink: socket.socket) -> list[Message]:
    """Receives the next datagram. Raises OSError if none arrives in time."""
    return list(messages(netlink.recv(_RECEIVE)))


def attribute(kind: int, value: bytes) -> bytes:
    packed = _ATTRIBUTE.pack(_ATTRIBUTE.size + len(value), kind) + value
    return packed + b"\0" * (-len(packed) % 4)


def nested(kind: int, *inside: bytes) -> bytes:
    return attribute(kind | _NESTED, b"".join(inside))


def attributes(data: memoryview) -> dict[int, memoryview]:
    """Values by type, without flags; of several of one type the last."""
    found = {}
    at = 0
    while at + _ATTRIBUTE.size <= len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, at)
        if length < _ATTRIBUTE.size:
            break
        found[kind & _TYPE_MASK] = data[at + _ATTRIBUTE.size : at + length]
        at += (length + 3) & ~3
    return found
