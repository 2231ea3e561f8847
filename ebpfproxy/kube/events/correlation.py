"""Decides which events are sent: equal ones seldom, and not many about one object.

It has the rules and numbers of client-go's EventCorrelator (tools/record/events_cache.go): an object's events
are limited by a token bucket, and what repeats within ten minutes is counted. Where client-go then patches
the event, this sends another, since ``create`` is all that a role has to grant.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TypeVar

import msgspec

from ebpfproxy.kube.events.event import KubeEvent, Reference, Series

_REPEAT_SECONDS = 600.0
_BURST = 25
_REFILL_SECONDS = 300.0
_MOST_KNOWN = 1024

K = TypeVar("K")
V = TypeVar("V")


class _Sent(msgspec.Struct):
    """Times are monotonic seconds, but for ``first``: Unix seconds of the first that is not sent yet."""

    at: float
    repeated: int = 0
    first: float = 0.0


class _Bucket(msgspec.Struct):
    tokens: float
    at: float


class Correlator:
    """Not for more than one thread at a time. It forgets the least recently used."""

    def __init__(self) -> None:
        self._sent: OrderedDict[KubeEvent, _Sent] = OrderedDict()
        self._buckets: OrderedDict[Reference, _Bucket] = OrderedDict()

    def take(self, event: KubeEvent, *, monotonic: float, unix: float) -> Series | str:
        """Returns what to send now, or why nothing is sent: ``repeated`` or ``limited``."""
        sent = self._sent.get(event)
        if sent is not None and monotonic - sent.at < _REPEAT_SECONDS:
            sent.first = sent.first or unix
            sent.repeated += 1
            self._sent.move_to_end(event)
            return "repeated"
        if not self._has_token(event.regarding, monotonic):
            return "limited"
        _put(self._sent, event, _Sent(monotonic))
        if sent is None or not sent.repeated:
            return Series(unix, unix, 1)
        return Series(sent.first, unix, sent.repeated + 1)

    def _has_token(self, about: Reference, now: float) -> bool:
        bucket = self._buckets.get(about) or _Bucket(_BURST, now)
        bucket.tokens = min(_BURST, bucket.tokens + (now - bucket.at) / _REFILL_SECONDS)
        bucket.at = now
        _put(self._buckets, about, bucket)
        if bucket.tokens < 1:
            return False
        bucket.tokens -= 1
        return True


def _put(known: OrderedDict[K, V], key: K, value: V) -> None:
    known[key] = value
    known.move_to_end(key)
    if len(known) > _MOST_KNOWN:
        known.popitem(last=False)
