"""Two Services that claim the same address, port and protocol: the older one has it."""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable, Set
from typing import NamedTuple

from ebpfproxy.kube.objects import ObjectKey
from ebpfproxy.services.model import Frontend, Protocol

#: Creation timestamp (RFC 3339 sorts as text), namespace, name.
Age = tuple[str, str, str]


class Claim(NamedTuple):
    """Address, port and protocol that one Service only can have. A NodePort's address is all zeros."""

    address: bytes
    port: int
    protocol: Protocol


def claim_of(frontend: Frontend) -> Claim:
    return Claim(frontend.address, frontend.port, frontend.protocol)


class Claims:
    """The Services that make each claim, kept up to date claim by claim.

    Of several claimants the one with the smallest age owns the claim: the order of arrival does not matter,
    so that every node decides alike and a restart changes nothing.
    """

    def __init__(self) -> None:
        self._claimants: dict[Claim, list[Age]] = {}

    def owner(self, claim: Claim) -> ObjectKey | None:
        claimants = self._claimants.get(claim)
        return _service(claimants[0]) if claimants else None

    def replace(self, old_age: Age, old: Set[Claim], age: Age, new: Set[Claim]) -> set[ObjectKey]:
        """A Service's claims are ``new`` ones now; it may have been made again with another age.

        Returns the Services for which the owner of a claim is another one now, itself possibly among them.
        """
        touched: set[ObjectKey] = set()
        self._remove(old_age, old if old_age != age else old - new, touched)
        self._add(age, new if old_age != age else new - old, touched)
        return touched

    def _remove(self, age: Age, claims: Iterable[Claim], touched: set[ObjectKey]) -> None:
        for claim in claims:
            claimants = self._claimants[claim]
            owned = claimants[0] == age
            claimants.remove(age)
            if not claimants:
                del self._claimants[claim]
            elif owned:
                touched.update(map(_service, claimants))

    def _add(self, age: Age, claims: Iterable[Claim], touched: set[ObjectKey]) -> None:
        for claim in claims:
            claimants = self._claimants.get(claim)
            if claimants is None:
                self._claimants[claim] = [age]
                continue
            insort(claimants, age)
            if claimants[0] == age:
                touched.update(map(_service, claimants))


def _service(age: Age) -> ObjectKey:
    return ObjectKey(age[1], age[2])
