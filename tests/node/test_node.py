"""The node's name and namespace, from a kernel with namespaces of its own."""

from __future__ import annotations

import socket

import pytest

from ebpfproxy.netlink.namespaces import netns_cookie
from ebpfproxy.node.identity import NodeNameError, node_name
from tests.lab import Lab


def test_node_names_follow_kube_proxy() -> None:
    assert node_name(" Node-A ") == "node-a"
    assert node_name(None) == socket.gethostname().lower()
    with pytest.raises(NodeNameError):
        node_name("  ")


@pytest.mark.root
def test_cookies_of_namespaces_differ() -> None:
    with Lab() as lab:
        node = lab.node("node-a")
        pod = node.pod("pod")
        assert len({netns_cookie(), node.call(netns_cookie), pod.call(netns_cookie)}) == 3
