"""Distribution of specs over processes."""

from __future__ import annotations

from tests.cluster.e2e import shares

_SLOW = [f"[sig-network] Services should have session affinity timeout work for {each}" for each in "abcd"]
_USUAL = [f"[sig-network] Services should work {number}" for number in range(20)]


def test_every_spec_is_assigned_once_and_slow_ones_apart() -> None:
    dealt = shares([*_USUAL, *_SLOW], 4)
    assert sorted(name for share in dealt for name in share) == sorted([*_USUAL, *_SLOW])
    assert [len({*share} & {*_SLOW}) for share in dealt] == [1, 1, 1, 1]
    assert [len(share) for share in dealt] == [6, 6, 6, 6]


def test_no_share_is_empty() -> None:
    """The suite's binary would run all specs for an empty selection."""
    assert shares(["one"], 4) == [["one"]]
    assert shares([], 4) == []
