"""The bytes of what is measured of connections: the agent's side of ``bpf/lib/measure_types.h``."""

from __future__ import annotations

import enum
import struct


class ConnectFailure(enum.IntEnum):
    """``enum connect_failure``: why a connection was not established."""

    RESET = 0
    TIMEOUT = 1
    ABANDONED = 2

    def __str__(self) -> str:
        return self.name.lower()


#: Upper bounds of the times in ``struct connects``, in microseconds. One more place has those above.
CONNECT_BOUNDS = tuple(64 << place for place in range(18))
#: It has a count for each reason.
CONNECT_FAILURES = struct.Struct(f"={len(ConnectFailure)}Q")
#: Microseconds of all connections together, the times, and failures.
CONNECTS = struct.Struct(f"=Q{len(CONNECT_BOUNDS) + 1}Q{len(ConnectFailure)}Q")
#: ``struct traffic``, of one CPU: bytes from clients and to them, and packets.
TRAFFIC = struct.Struct("=4Q")
