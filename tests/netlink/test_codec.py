"""Netlink messages as the kernel packs and expects them."""

from __future__ import annotations

import errno
import socket
import struct

import pytest

from ebpfproxy.netlink import codec


def test_message_has_its_length_and_sequence_number() -> None:
    packed = codec.pack(20, codec.REQUEST | codec.DUMP, b"body", 7)
    assert packed == struct.pack("=IHHII", 20, 20, 0x301, 7, 0) + b"body"


def test_attributes_are_padded_and_parsed() -> None:
    packed = codec.attribute(1, b"abc") + codec.nested(2, codec.attribute(3, b"12345678"))
    assert len(packed) % 4 == 0
    found = codec.attributes(memoryview(packed))
    assert bytes(found[1]) == b"abc"
    assert bytes(codec.attributes(found[2])[3]) == b"12345678"


def test_truncated_attribute_ends_the_list() -> None:
    packed = codec.attribute(1, b"abcd") + struct.pack("=HH", 2, 9)
    assert list(codec.attributes(memoryview(packed))) == [1]


def test_messages_of_one_datagram_are_split() -> None:
    data = codec.pack(16, 0, b"one\0", 1) + codec.pack(17, 0, b"two\0", 2)
    assert [(m.kind, m.sequence, bytes(m.payload)) for m in codec.messages(data)] == [
        (16, 1, b"one\0"),
        (17, 2, b"two\0"),
    ]


@pytest.fixture
def pair() -> tuple[socket.socket, socket.socket]:
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)


def test_dump_ends_at_nlmsg_done(pair: tuple[socket.socket, socket.socket]) -> None:
    here, there = pair
    there.send(codec.pack(16, 2, b"one\0"))
    there.send(codec.pack(16, 2, b"two\0") + codec.pack(3, 2, bytes(4)))
    assert [bytes(each.payload) for each in codec.replies(here)] == [b"one\0", b"two\0"]


def test_ack_ends_a_reply_and_an_error_is_raised(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    here, there = pair
    there.send(codec.pack(2, 0, struct.pack("=i", 0)))
    assert list(codec.replies(here)) == []
    there.send(codec.pack(2, 0, struct.pack("=i", -errno.EPERM)))
    with pytest.raises(PermissionError):
        list(codec.replies(here))


def test_error_has_the_text_of_the_kernel(pair: tuple[socket.socket, socket.socket]) -> None:
    """It comes after the header of the request, and only where the message has attributes."""
    here, there = pair
    request = codec.pack(19, codec.REQUEST, b"")
    failed = struct.pack("=i", -errno.EINVAL) + request + codec.attribute(1, b"MTU too large\0")
    for flags, text in ((0x300, "MTU too large"), (0x100, "Invalid argument"), (0, "Invalid argument")):
        there.send(codec.pack(2, flags, failed))
        with pytest.raises(OSError, match=text) as raised:
            list(codec.replies(here))
        assert (raised.value.errno, raised.value.strerror) == (errno.EINVAL, text)


@pytest.mark.parametrize(
    "data",
    [
        codec.pack(2, 0, b"\0\0")[:18],
        struct.pack("=IHHII", 8, 24, 0, 0, 0),
        struct.pack("=IHHII", 1000, 24, 0, 0, 0),
    ],
)
def test_message_that_is_not_whole_is_an_error_of_the_kernel_to_callers(data: bytes) -> None:
    """They know OSError: they give up, or ask again."""
    with pytest.raises(OSError, match="netlink message cannot be read"):
        for each in codec.messages(data):
            assert each.error is None


def test_reader_of_a_message_that_lacks_something_raises_the_same() -> None:
    @codec.reading
    def read(payload: memoryview) -> object:
        return struct.unpack("=I", codec.attributes(payload)[1])

    for payload in (b"", codec.attribute(1, b"ab")):
        with pytest.raises(codec.MalformedError) as raised:
            read(memoryview(payload))
        assert raised.value.errno == errno.EBADMSG
