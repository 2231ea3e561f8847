"""Changes inputs: bytes, words, and JSON's values. The same random numbers make the same changes."""

from __future__ import annotations

import json
import random
from typing import Any

LONGEST = 1 << 16
#: Values that some parser somewhere takes for another.
_VALUES: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    -1,
    1,
    65535,
    65536,
    2**31,
    2**63,
    -(2**63) - 1,
    1e400,
    0.5,
    "",
    "a" * 64,
    "\0",
    "\x1b[31m",
    "\x9b2J",
    "\u202e",
    "\ud800",
    "\r\nx",
    "None",
    "10.96.0.10",
    "010.1.1.1",
    "::1",
    "::ffff:10.0.0.1",
    "fe80::1%eth0",
    "10.0.0.0/33",
    "0.0.0.0/0",
    "*=0",
    "zone/a=65536, node/b=1",
    "2026-11-28T00:00:00Z",
    "9999-99-99T99:99:99Z",
    "NodePort",
    "ExternalName",
    "Local",
    "SCTP",
    "maglev",
    [],
    {},
    [None],
    [[]],
    {"": None},
)
_WORDS = (
    b"\0",
    b"\x1b[2J",
    b"\xff\xfe",
    b"\xed\xa0\x80",
    b"\n",
    b"\r",
    b"\xe2\x80\xa8",
    b"---\n",
    b"- ",
    b": ",
    b"&a ",
    b"*a ",
    b"!!binary ",
    b"!!python/object:x ",
    b"<<: *a",
    b"{",
    b"[",
    b"\\ud800",
    b"\\u0000",
    b"\\u001b[31m",
    b"1e999",
    b"0x_",
    b"99999999999999999999",
    b"*nat\n",
    b":KUBE-SVC-X",
    b"-A KUBE-SERVICES -j KUBE-SVC-X\n",
    b'"',
    b"\\",
)


def mutated(data: bytes, chance: random.Random, others: list[bytes]) -> bytes:
    """A changed input; ``others`` are those that parts may come from."""
    for _ in range(1 + int(chance.expovariate(0.7))):
        if chance.random() < 0.5 and (changed := _json(data, chance)) is not None:
            data = changed
        else:
            data = _bytes(data, chance, others)
    return data[:LONGEST]


def _bytes(data: bytes, chance: random.Random, others: list[bytes]) -> bytes:
    at = chance.randrange(len(data) + 1)
    length = min(len(data) - at, int(chance.expovariate(0.1)) + 1)
    match chance.randrange(8):
        case 0:
            return data[:at] + chance.randbytes(length) + data[at + length :]
        case 1:
            return data[:at] + data[at + length :]
        case 2:
            return data[:at] + chance.choice(_WORDS) + data[at:]
        case 3:
            return data[:at] + data[at : at + length] * chance.randrange(2, 4) + data[at + length :]
        case 4:
            other = chance.choice(others)
            start = chance.randrange(len(other) + 1)
            return data[:at] + other[start : start + chance.randrange(1, 200)] + data[at + length :]
        case 5:
            return data[:at]
        case 6 if at < len(data):
            return data[:at] + bytes([data[at] ^ 1 << chance.randrange(8)]) + data[at + 1 :]
        case _:
            return data[:at] + chance.choice(_WORDS) + data[at + length :]


def _json(data: bytes, chance: random.Random) -> bytes | None:
    """Changes a value in JSON, which one byte may precede; None for anything else."""
    start = data.find(b"{", 0, 2)
    if start < 0:
        return None
    try:
        document = json.loads(data[start:])
    except (ValueError, RecursionError):
        return None
    _change(document, chance)
    return data[:start] + json.dumps(document).encode()


def _change(document: Any, chance: random.Random) -> None:
    places: list[tuple[Any, Any]] = []
    waiting = [document]
    while waiting:
        each = waiting.pop()
        keys = list(each) if isinstance(each, dict) else range(len(each))
        for key in keys:
            places.append((each, key))
            if isinstance(each[key], dict | list):
                waiting.append(each[key])
    if not places:
        return
    holder, key = chance.choice(places)
    match chance.randrange(6):
        case 0:
            del holder[key]
        case 1 if isinstance(holder, dict):
            holder[chance.choice(("", "\x1b[0m", "name", "ip", "port", "ports", "spec"))] = holder[key]
        case 2 if isinstance(holder, list):
            holder.insert(key, holder[key])
        case 3:
            other, where = chance.choice(places)
            if isinstance(other, dict) and where not in other:
                return
            if isinstance(other, list) and where >= len(other):
                return
            if not isinstance(other[where], dict | list):
                holder[key] = other[where]
        case 4 if isinstance(holder[key], str):
            at = chance.randrange(len(holder[key]) + 1)
            holder[key] = (
                holder[key][:at]
                + chance.choice(("\x1b[31m", "\0", "\x85", "é", ",", "/", "0"))
                + holder[key][at:]
            )
        case _:
            holder[key] = chance.choice(_VALUES)
