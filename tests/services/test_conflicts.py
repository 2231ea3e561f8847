"""Claims, changed step by step, against their rule: the oldest claimant owns."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ebpfproxy.kube.objects import ObjectKey
from ebpfproxy.services.conflicts import Age, Claim, Claims
from ebpfproxy.services.model import Protocol

CLAIMS = [
    Claim(bytes([10, 96, 0, n]), 80, protocol) for n in (1, 2) for protocol in (Protocol.TCP, Protocol.UDP)
]

#: A Service's name, its creation time and its current claims; none if it is deleted.
steps = st.lists(
    st.tuples(
        st.sampled_from(["a", "b", "c"]),
        st.sampled_from(["2026-01-01T00:00:00Z", "2026-01-02T00:00:00Z"]),
        st.frozensets(st.sampled_from(CLAIMS)),
    ),
    max_size=25,
)


def owner(stored: dict[str, tuple[Age, frozenset[Claim]]], claim: Claim) -> ObjectKey | None:
    ages = [age for age, claims in stored.values() if claim in claims]
    return ObjectKey(*min(ages)[1:]) if ages else None


@given(steps)
def test_oldest_claimant_owns_and_every_claimant_is_told_of_a_new_owner(
    steps: list[tuple[str, str, frozenset[Claim]]],
) -> None:
    claims = Claims()
    stored: dict[str, tuple[Age, frozenset[Claim]]] = {}
    for name, created, wanted in steps:
        before = {claim: owner(stored, claim) for claim in CLAIMS}
        age: Age = (created, "shop", name)
        touched = claims.replace(*stored.get(name, (age, frozenset())), age, wanted)
        stored[name] = (age, wanted)
        for claim in CLAIMS:
            now = owner(stored, claim)
            assert claims.owner(claim) == now
            if now != before[claim]:
                others = {n for n, (_, claimed) in stored.items() if claim in claimed} - {name}
                assert {ObjectKey("shop", n) for n in others} <= touched


def test_recreated_service_loses_its_address_to_one_created_before() -> None:
    claim = CLAIMS[0]
    old, young, again = (
        ("2026-01-01", "shop", "a"),
        ("2026-01-02", "shop", "b"),
        ("2026-01-03", "shop", "a"),
    )
    claims = Claims()
    claims.replace(old, set(), old, {claim})
    claims.replace(young, set(), young, {claim})
    assert claims.owner(claim) == ObjectKey("shop", "a")
    assert claims.replace(old, {claim}, again, {claim}) == {ObjectKey("shop", "b")}
    assert claims.owner(claim) == ObjectKey("shop", "b")
