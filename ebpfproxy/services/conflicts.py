"""Two Services that claim the same address, port and protocol: the older one has it."""

from __future__ import annotations

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
    # Its own three fields are the middle ones of a frontend.
    return tuple.__new__(Claim, frontend[1:4])


class Claims:
    """The Services that make each claim, kept up to date claim by claim.

    Of several claimants the one with the smallest age owns the claim: the order of arrival does not matter,
    so that every node decides alike and a restart changes nothing.
    """

    def __init__(self) -> None:
        #: Sorted.
        self._claimants: dict[Claim, tuple[Age, ...]] = {}

    def owner(self, claim: Claim) -> ObjectKey | None:
        claimants = self._claimants.get(claim)
        return _service(claimants[0]) if claimants else None

    def is_owner(self, service: ObjectKey, claim: Claim) -> bool:
        claimants = self._claimants.get(claim)
        return claimants is not None and claimants[0][1:] == service

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
            claimants = self._claimants.pop(claim)
            left = tuple(each for each in claimants if each != age)
            if left:
                self._claimants[claim] = left
                if claimants[0] == age:
                    touched.update(map(_service, left))

    def _add(self, age: Age, claims: Iterable[Claim], touched: set[ObjectKey]) -> None:
        for claim in claims:
            others = self._claimants.get(claim)
            if others is None:
                self._claimants[claim] = (age,)
                continue
            self._claimants[claim] = tuple(sorted((*others, age)))
            if age < others[0]:
                touched.update(map(_service, (*others, age)))


def _service(age: Age) -> ObjectKey:
    return ObjectKey(age[1], age[2])
