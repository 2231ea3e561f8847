"""A sample of ``make test-kernels``: Debian's own kernel, which is older than most that tests run on, in an emulator."""

from __future__ import annotations

import pytest

from tests.kernels import machine
from tests.kernels.root import TOP
from tests.kernels.shared_root import VIRTIOFSD, SharedRoot

PACKAGE = "linux-image-cloud-amd64"
_FILE = "tests/field/test_every_kernel.py"
#: The agent starts once for them: its programs are accepted by the verifier, and translate in both families.
TESTS = [
    f"{_FILE}::{name}"
    for name in (
        "test_pods_and_the_node_reach_a_cluster_ip_at_sockets[default-v4-ask_tcp]",
        "test_pods_and_the_node_reach_a_cluster_ip_at_sockets[default-v6-ask_udp_connected]",
        "test_hosts_outside_reach_a_node_port_in_packets[default-v4-ask_udp]",
        "test_hosts_outside_reach_a_node_port_in_packets[default-v6-ask_tcp]",
        "test_a_service_without_endpoints_refuses[default-v4]",
        "test_a_service_without_endpoints_refuses[default-v6]",
        "test_status_is_healthy[default]",
    )
]

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(
        not VIRTIOFSD.exists(), reason=f"no {VIRTIOFSD}: qemu-system-common of Debian 12 has it"
    ),
]


def test_all_ways_of_traffic_on_the_kernel_of_this_suite() -> None:
    root = SharedRoot(TOP / ".kernels/shared", PACKAGE)
    with root.booting(TESTS) as arguments:
        run = machine.boot(arguments, root.folder / "console", minutes=9)
    assert run.machine["release"] == root.release
    assert [each for each in run.results if each.outcome != "passed"] == []
    assert {each.test for each in run.results} == set(TESTS)
