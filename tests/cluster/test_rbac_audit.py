"""The ClusterRole, by the audit log of a real API server: enough, and no more."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.cluster import agents, audit, images
from tests.cluster.audit import Grant
from tests.cluster.cluster import Cluster, until

pytestmark = [pytest.mark.root, pytest.mark.cluster, pytest.mark.timeout(600)]

#: What this server does not let the agent need, since it streams lists as watches; one without the feature WatchList
#: (before Kubernetes 1.34, by default) is asked for lists. tests/deploy/test_rbac.py has the agent use each.
_WITHOUT_STREAMING = {
    Grant("", "nodes", "list"),
    Grant("networking.k8s.io", "servicecidrs", "list"),
}

_STRANGE = """
apiVersion: v1
kind: Service
metadata: {name: strange, namespace: default, annotations: {ebpfproxy.io/lb-algorithm: bogus}}
spec: {ports: [{port: 80}]}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: strange-1, namespace: default, labels: {kubernetes.io/service-name: strange}}
addressType: FQDN
ports: [{port: 80}]
endpoints: [{addresses: [strange.example]}]
"""


@pytest.fixture(scope="module")
def asked(cluster: Cluster) -> Iterator[list[dict[str, Any]]]:
    """Of all agents since the cluster was made; those of now have two events to send, about objects of a Service."""
    cluster.ebpfproxy("install", "--image", images.AGENT)
    cluster.apply(_STRANGE)
    until(lambda: _told(cluster) >= 2, "an event about each of the two")
    agents.assert_healthy(cluster)
    yield audit.requests(cluster)
    cluster.kubectl("delete", "service", "strange")
    cluster.ebpfproxy("uninstall", "--cleanup", "--force")


def _told(cluster: Cluster) -> int:
    """Events about values that no agent can use."""
    found = cluster.get("-n", "default", "events.v1.events.k8s.io")["items"]
    return sum(each["reason"] == "ValueNotUsed" for each in found)


def test_nothing_that_agents_asked_for_was_refused(asked: list[dict[str, Any]]) -> None:
    """The API server answered no request of the agents' account with 401 or 403."""
    assert audit.refused(asked) == []


def test_nothing_is_granted_that_no_agent_used(asked: list[dict[str, Any]]) -> None:
    """Agents used every verb of the ClusterRole, but for lists where the server streams them, and no other."""
    used = audit.used(asked)
    assert used <= audit.GRANTED
    assert audit.GRANTED - used == _WITHOUT_STREAMING


def test_an_agent_asks_for_its_own_node_alone(asked: list[dict[str, Any]]) -> None:
    """Each agent watches the Node that it runs on, by name."""
    names = {event["objectRef"].get("name") for event in asked if event["objectRef"]["resource"] == "nodes"}
    assert names == {"node-1", "node-2"}
