"""XDP programs of others, which libxdp's dispatcher calls before ours: ``make test-kernels`` has xdp-tools.

The other program is xdp-filter's, which counts and drops packets by their ports.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.e2e import connection_load
from tests.e2e.outside_client import HeldConnection
from tests.e2e.two_node_cluster import NODE_PORT
from tests.field.test_check import check
from tests.field.test_xdp_forwarding import MODE, PACKETS, UDP_PORT, XdpCluster, echo, links
from tests.lab import Agent, Lab
from tests.lab.waiting import until

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(
        "EBPFPROXY_OWN_MACHINE" not in os.environ or shutil.which("xdp-filter") is None,
        reason="has no pins of libxdp to itself, or no xdp-tools: make test-kernels",
    ),
]

CHAINED = f"{MODE}, in libxdp's dispatcher"
FILTER = "xdpfilt_alw_all"
TOOL_MODE = {"native": "native", "generic": "skb"}[MODE]
#: Ports of netfilter and of kube-proxy are not known to xdp-filter, which sees the client's destination.
UDP_FILTER = ("xdp-filter", "port", str(UDP_PORT), "--mode", "dst", "--proto", "udp")


class ChainCluster(XdpCluster):
    def load_filter(self) -> None:
        self.a.run(["xdp-filter", "load", "eth0", "--mode", TOOL_MODE])

    def unload_all(self) -> None:
        self.a.run(["xdp-loader", "unload", "eth0", "--all"], check=False)

    def programs(self) -> dict[int, str]:
        """Names of the programs in the dispatcher of eth0, in the order of their run, by their ids."""
        text = self.a.run(["xdp-loader", "status", "eth0"])
        return {int(found[2]): found[1] for found in re.finditer(r"=>\s+\d+\s+(\S+)\s+(\d+)", text)}

    def is_forwarding(self) -> bool:
        before = self.forwarded()
        assert self.outside.call(echo, self.a.address, UDP_PORT, PACKETS) == PACKETS
        return self.forwarded() > before

    def assert_filter_works(self) -> None:
        self.a.run(list(UDP_FILTER))
        try:
            with pytest.raises(TimeoutError):
                self.outside.call(echo, self.a.address, UDP_PORT, PACKETS)
        finally:
            self.a.run([*UDP_FILTER, "--remove"])
        assert self.outside.call(echo, self.a.address, UDP_PORT, PACKETS) == PACKETS


@pytest.fixture(scope="module")
def cluster() -> Iterator[ChainCluster]:
    with Lab(takes_xdp=True) as lab:
        yield ChainCluster(lab)


@pytest.fixture
def agent(cluster: ChainCluster) -> Iterator[Agent]:
    """An agent that has found xdp-filter at its uplink."""
    cluster.load_filter()
    made = cluster.agent("--xdp", MODE).start()
    try:
        cluster.wait_for_state(f"{CHAINED} with {FILTER}")
        yield made
    finally:
        if made.process is not None and made.process.poll() is None:
            made.stop()
        cluster.a.cli("cleanup")
        cluster.unload_all()
        assert not list(Path("/sys/fs/bpf/xdp").glob("dispatch-*"))


def test_a_filter_runs_before_our_program_and_stays_after_it(cluster: ChainCluster, agent: Agent) -> None:
    assert f"{CHAINED} with {FILTER}" in cluster.a.cli("status")
    (foreign, own) = cluster.programs().items()
    assert (foreign[1], own[1]) == (FILTER, "ebpfproxy")
    assert cluster.is_forwarding()
    cluster.assert_filter_works()
    agent.stop()
    assert dict([foreign, own]) == cluster.programs()
    assert "detached xdp-" in cluster.a.cli("cleanup")
    assert cluster.programs() == dict([foreign])
    without = cluster.agent().start()
    cluster.assert_filter_works()
    without.stop()


def test_the_filter_is_a_warning_and_no_drift(cluster: ChainCluster, agent: Agent) -> None:
    (foreign, _) = cluster.programs()
    (found,) = [each for each in check(cluster.a, good=True)["findings"] if each["kind"] == "foreign"]
    assert (found["where"], found["what"]) == ("devices", f"eth0 xdp: program {foreign} {FILTER}")


def test_another_program_of_ours_takes_the_place_of_the_one_before(
    cluster: ChainCluster, agent: Agent
) -> None:
    before = cluster.programs()
    with connection_load.running(cluster.outside, cluster.a.address, NODE_PORT) as running:
        agent.kill()
        agent.start()
        assert cluster.programs() == before
        agent.stop()
        # Other constants make another program.
        other = cluster.agent("--xdp", MODE, "--masquerade-all").start()
        until(lambda: cluster.programs() != before)
        held = HeldConnection(cluster.outside, cluster.a.address, NODE_PORT)
        assert list(cluster.programs().values()) == [FILTER, "ebpfproxy"]
        assert cluster.is_forwarding()
        assert held.ask() == "alive"
        other.stop()
        without = cluster.agent().start()
        until(lambda: list(cluster.programs().values()) == [FILTER], "the program stays")
        without.stop()
    assert running.result["errors"] == []
    assert running.result["count"] > 50


def test_a_program_that_others_remove_is_attached_again(cluster: ChainCluster, agent: Agent) -> None:
    (foreign, own) = cluster.programs()
    cluster.a.run(["xdp-loader", "unload", "eth0", "--id", str(own)])
    assert list(cluster.programs()) == [foreign]
    until(lambda: list(cluster.programs()) == [foreign, own], "the program is not attached")
    assert cluster.is_forwarding()


def test_programs_of_others_come_and_go(cluster: ChainCluster, agent: Agent) -> None:
    """Once the dispatcher is gone, our program is alone again."""
    cluster.a.run(["xdp-filter", "unload", "eth0"])
    until(lambda: cluster.state() == CHAINED)
    assert cluster.is_forwarding()
    cluster.load_filter()
    until(lambda: cluster.state() == f"{CHAINED} with {FILTER}")
    cluster.unload_all()
    until(lambda: cluster.state() == MODE, "the program is not attached")
    assert cluster.is_forwarding()
    assert [path.name.partition("-")[2].partition("-")[2] for path in links(cluster)] == [MODE]


@contextmanager
def without_libxdp() -> Iterator[None]:
    (library,) = Path("/usr/lib").glob("*/libxdp.so.1")
    target = library.readlink()
    library.unlink()
    try:
        yield
    finally:
        library.symlink_to(target)


def test_without_libxdp_the_filter_is_left_alone(cluster: ChainCluster) -> None:
    cluster.load_filter()
    try:
        with without_libxdp():
            other = cluster.agent("--xdp", MODE).start()
            cluster.wait_for_state("by libxdp: libxdp.so.1 is not installed, which could chain ours")
            assert not cluster.is_forwarding()
        other.stop()
        other.start()
        cluster.wait_for_state(f"{CHAINED} with {FILTER}")
        other.stop()
        with without_libxdp():
            assert "stays attached: program" in cluster.a.cli("cleanup")
        assert list(cluster.programs().values()) == [FILTER, "ebpfproxy"]
    finally:
        cluster.a.cli("cleanup")
        cluster.unload_all()
