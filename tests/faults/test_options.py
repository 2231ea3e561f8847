"""kill -9 at steps of starts with options that change what programs there are, and how they are attached."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator

import pytest

from tests.apiserver import objects
from tests.faults.faulted import Faulted
from tests.faults.ladders import KILL, MARKS, SAMPLED, Ladder
from tests.lab import Lab, ethtool
from tests.lab.waiting import until

pytestmark = [*MARKS, pytest.mark.faults]

#: Attachments of kernels before 6.6, which are no links: they are made by netlink.
_FILTERS = frozenset({"NEWQDISC", "NEWTFILTER", "DELTFILTER", "DELQDISC"})
_CLSACT = ("--without", "tcx")
#: Options that load other programs than those of the start before.
_OTHERS = "--no-localhost-nodeports"


@pytest.fixture(scope="module")
def clsact() -> Iterator[Faulted]:
    with Lab() as lab:
        yield Faulted(lab)


def test_agent_without_tcx_killed_at_every_filter_of_a_first_start(clsact: Faulted) -> None:
    """As on kernels before 6.6: kill -9 before each clsact and filter, and at a step of each kind; the next goes on."""
    ladder = Ladder(KILL, of_kind=SAMPLED - {"LINK_UPDATE"}, all_of=_FILTERS)
    agent = ladder.climb(clsact, *_CLSACT)
    clsact.wait_equal()
    fault = "after kill -9 at every filter of a first start without tcx"
    with clsact.under_load(fault):
        time.sleep(1)
    ladder.report(fault)
    assert ladder.has_done("NEWQDISC", "NEWTFILTER 2 ingress", "NEWTFILTER 2 egress")
    agent.stop()


def test_agent_without_tcx_killed_at_every_filter_of_a_restart(clsact: Faulted) -> None:
    """kill -9 before each filter that is replaced, and at a step of each kind, of a start with other options."""
    clsact.agent(*_CLSACT).start().kill()
    ladder = Ladder(KILL, of_kind=SAMPLED, all_of=_FILTERS)
    fault = "kill -9 at every filter of a restart without tcx"
    with clsact.under_load(fault):
        agent = ladder.climb(clsact, *_CLSACT, _OTHERS)
    ladder.report(fault)
    assert ladder.has_done("NEWTFILTER 2 ingress", "NEWTFILTER 2 egress")
    clsact.wait_equal()
    agent.stop()


@pytest.fixture(scope="module")
def forwarding() -> Iterator[Faulted]:
    """Frames of XDP programs pass in it: checksums are computed by senders, whose devices are no hardware."""
    with Lab(takes_xdp=True) as lab:
        made = Faulted(lab)
        for space in (made.outside, *made.pods.values()):
            space.call(ethtool.turn, "eth0", {"tx-checksum": False})
        made.control("put", objects.node(made.b.name, address=made.b.address), resource="nodes")
        # Direct server return needs an agent where the endpoint is.
        other = made.b.agent("--master", made.url, "--external-traffic-mode", "dsr-accept").start()
        yield made
        other.stop()


@pytest.mark.parametrize(
    "arguments",
    [
        ("--xdp", "native"),
        ("--bypass-netfilter",),
        ("--external-traffic-mode", "dsr"),
    ],
    ids=lambda each: each[0].removeprefix("--"),
)
def test_agent_with_options_killed_at_a_step_of_each_kind(
    forwarding: Faulted, arguments: tuple[str, ...]
) -> None:
    """kill -9 at one step of each kind of a start that loads other programs, with XDP, bypass or direct server return."""
    forwarding.agent(*arguments).start().kill()
    ladder = Ladder(KILL, of_kind=SAMPLED)
    fault = f"kill -9 at a step of each kind of a start with {' '.join(arguments)}"
    with forwarding.under_load(fault):
        before = forwarding.packet_events()["xdp"]
        agent = ladder.climb(forwarding, *arguments, _OTHERS)
        until(lambda: _shows(forwarding, arguments, before), "the option is not in use")
    ladder.report(fault)
    assert {step.name.split()[0] for step in ladder.done} == SAMPLED
    forwarding.wait_equal()
    agent.stop()


def _shows(forwarding: Faulted, arguments: tuple[str, ...], forwarded: int) -> bool:
    """That packets go the way that these options have for them; ``forwarded``: by XDP, before."""
    if "--xdp" in arguments:
        return forwarding.packet_events()["xdp"] > forwarded
    flows = json.loads(forwarding.a.cli("conntrack", "list", "-o", "json"))
    return any(each["dsr"] for each in flows) == ("dsr" in arguments)
