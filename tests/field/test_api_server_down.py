"""An agent that starts while the API server is down."""

from __future__ import annotations

import subprocess
import sys

import pytest

from ebpfproxy.datapath.abi.layout import U32, unpack_address
from ebpfproxy.datapath.abi.node_layout import CIDR, CidrFlags
from ebpfproxy.datapath.kernel.maps import open_pinned
from ebpfproxy.services.model import format_address
from tests.lab import Lab, LabNode
from tests.lab.lab import OUTSIDE

pytestmark = pytest.mark.root


def _api(node: LabNode, port: int) -> tuple[subprocess.Popen[bytes], str]:
    command = [sys.executable, "-m", "tests.apiserver", "--services", "2", "--port", str(port)]
    process = node.popen(command, join_cgroup=False, stdout=subprocess.PIPE)
    assert process.stdout is not None
    return process, process.stdout.readline().decode().strip()


def _known(node: LabNode) -> tuple[set[str], set[tuple[str, int]]]:
    """The addresses that serve NodePorts, and the CIDRs of this node's pods."""
    maps = open_pinned(next((node.bpf_root / "ebpfproxy").glob("v*")))
    try:
        addresses = {format_address(unpack_address(key)) for key, _ in maps["node_addresses"].items()}
        pods = set()
        for key, value in maps["cidrs"].items():
            length, address = CIDR.unpack(key)
            if U32.unpack(value)[0] & CidrFlags.PODS:
                pods.add((format_address(unpack_address(address)), length))
        return addresses, pods
    finally:
        maps.close()


def test_node_addresses_and_pod_cidrs_persist_until_the_node_is_listed_again() -> None:
    """NodePort addresses and pod CIDRs are not derived from routes while the Node is unknown."""
    with Lab() as lab:
        node = lab.node("node-a")
        # The source address of the default route is not the Node's InternalIP.
        node.run(["ip", "addr", "add", "172.18.0.77/24", "dev", "eth0"])
        node.run(["ip", "route", "replace", "default", "via", OUTSIDE, "src", "172.18.0.77"])
        api, url = _api(node, 0)
        options = ["--nodeport-addresses", "primary", "--detect-local-mode", "NodeCIDR"]
        agent = node.agent("--master", url, *options).start()
        before = _known(node)
        assert node.address in before[0]
        assert "172.18.0.77" not in before[0]
        assert before[1] == {("10.244.1.0", 96 + 24)}
        for end in (agent.stop, agent.kill):
            end()
            api.kill()
            api.wait()
            agent.start(wait=False)
            agent.wait_log("watch is failing", times=agent.text.count("watch is failing") + 1)
            assert _known(node) == before
            api, _ = _api(node, int(url.rpartition(":")[2]))
            agent.wait_ready()
            assert _known(node) == before
