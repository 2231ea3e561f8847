"""Features of devices, by ioctl (linux/ethtool.h): no tool is needed for that."""

from __future__ import annotations

import ctypes
import fcntl
import socket
import struct

_SIOCETHTOOL = 0x8946
#: Features, by the commands that set them (ETHTOOL_STXCSUM, ETHTOOL_SGRO).
_COMMANDS = {"tx-checksum": 0x17, "gro": 0x2C}
_REQUEST = struct.Struct("@16sP16x")  # struct ifreq


class _Value(ctypes.Structure):
    """struct ethtool_value."""

    _fields_ = (("command", ctypes.c_uint32), ("value", ctypes.c_uint32))


def turn(device: str, features: dict[str, bool]) -> None:
    """Turns features of a device of this network namespace on or off. Raises OSError."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        for name, is_on in features.items():
            value = _Value(_COMMANDS[name], is_on)
            fcntl.ioctl(sock, _SIOCETHTOOL, _REQUEST.pack(device.encode(), ctypes.addressof(value)))
