"""A sample of ``make fuzz``: each decoder of what others send gets the same few hundred changed inputs each time."""

from __future__ import annotations

import random

import pytest

from tests.examples import examples
from tests.fuzz import engine
from tests.fuzz.mutate import mutated
from tests.fuzz.targets import TARGETS

#: Those that take longer for an input get fewer.
_SLOW = {"configuration": 60, "kube_proxy_config": 60, "manifest": 150, "watch_line": 150, "list_page": 150}
_OTHERS = 600
#: Inputs that once were a fault.
FOUND = {
    "iptables_save": (b":KUBE-SVC-X - [0:0]\n", b"-A KUBE-SVC-X -j DROP\n", b"*nat\n:KUBE-SVC-X"),
    "ip_vs": (b"TCP  [f:0096:0000:0001]:01BB rr\n",),
    "iptables_frontends": (
        b"*nat\n-A KUBE-SERVICES -d 10.: --dport 443 -p tcp -j DROP\n",
        b"*nat\n-A KUBE-SERVICES --dport 443 -j DROP\n",
        b"*nat\n-A KUBE-SERVICES -p tcp --dport 443 -j KUBE-SEP-A\n-A KUBE-SEP-A -j DNAT\n",
    ),
    "nft_frontends": (
        b"{}",
        b"[]",
        b'{"nftables": [[]]}',
        b'{"nftables": [{"map": {"family": "ip"}}]}',
        b"[" * 10000,
    ),
    "node_plan": (b'{\n"\\ud800": 1}', b'{\n"a": ' + b"[" * 10000),
    "agent_record": (bytes(16) + b'{"node": "\xff"}', bytes(16) + b'{"a": ' + b"[" * 2000),
    "agent_answer": (b'{"namespace": "\xff"}',),
    "top_line": (b'{"packets": "\xff"}',),
    "cgroup": (b"0", b"0:\n1"),
    "nft_tables": (b"", b"[]", b'{"nftables": [1]}', b'{"nftables": [{"table": {}}]}', b"[" * 10000),
    "netlink": (b"\x11\0\0\0\2\0\0\0\0\0\0\0\0\0\0\0\0", b"\x08\0\0\0" + bytes(12)),
    "manifest": (
        b'{"kind": [], "items": -1}',
        b"kind: {}",
        b'{"kind": "List", "items": [{"kind": [1]}]}',
        b'{"apiVersion": "v1", "kind": "Service", "metadata": {"name": "a\\u2028\\u001b"}}',
    ),
    "map_record": (b"\0" + b"\xff" * 88, b"\1" + b"\xff" * 200, b"\2\x0a\x60\0\x0a\0\x50\x09\x07"),
}


@pytest.mark.parametrize("name", TARGETS)
def test_no_input_raises_anything_but_the_error_that_callers_know(name: str) -> None:
    fault = engine.sample(name, examples(_SLOW.get(name, _OTHERS)))
    assert fault is None, f"{fault.data!r}\n{fault.trace}" if fault else ""


@pytest.mark.parametrize("name", FOUND)
def test_what_once_was_a_fault_is_refused_or_served(name: str) -> None:
    for data in FOUND[name]:
        fault = engine.attempt(name, data)
        assert fault is None, f"{data!r}\n{fault.trace}" if fault else ""


def test_changes_are_the_same_for_the_same_random_numbers() -> None:
    """A fault can be made again from the numbers that were printed."""
    seeds = list(TARGETS["watch_line"].seeds())
    first, second = (
        [mutated(chance.choice(seeds), chance, seeds) for _ in range(20)]
        for chance in (random.Random(7), random.Random(7))
    )
    assert first == second
