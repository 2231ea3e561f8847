"""The rate limit of the API client, with a fake clock."""

from __future__ import annotations

import pytest

from ebpfproxy.kube.limits import RateLimit


class Clock:
    def __init__(self) -> None:
        self.now = 0.0
        self.slept: list[float] = []

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


def limit(clock: Clock, qps: float, burst: int) -> RateLimit:
    return RateLimit(qps, burst, clock=lambda: clock.now, sleep=clock.sleep)


def test_burst_is_sent_at_once_and_then_limited_by_rate() -> None:
    clock = Clock()
    found = limit(clock, 5, 10)
    for _ in range(10):
        found.wait()
    assert clock.slept == []
    for _ in range(20):
        found.wait()
    assert clock.now == pytest.approx(4.0)


def test_unused_requests_accumulate_up_to_the_burst() -> None:
    clock = Clock()
    found = limit(clock, 5, 10)
    for _ in range(10):
        found.wait()
    clock.now += 100
    for _ in range(10):
        found.wait()
    assert clock.slept == []
    found.wait()
    assert clock.slept == [pytest.approx(0.2)]


@pytest.mark.parametrize("qps", [0, -1])
def test_no_rate_means_no_limit(qps: float) -> None:
    clock = Clock()
    found = limit(clock, qps, 1)
    for _ in range(100):
        found.wait()
    assert clock.slept == []
