"""The ClusterRole compared with the audit log of a real API server: it grants exactly what agents use."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.cluster import agents, audit, images
from tests.cluster.audit import Grant
from tests.cluster.cluster import Cluster, until

pytestmark = [pytest.mark.root, pytest.mark.cluster, pytest.mark.timeout(600)]

#: The agent does not use these with this server, which streams lists as watches; one without the feature WatchList
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


def test_no_request_of_agents_was_unauthorized_or_forbidden(asked: list[dict[str, Any]]) -> None:
    """The API server answered no request of the agents' account with 401 or 403."""
    assert audit.refused(asked) == []


def test_every_granted_verb_is_used(asked: list[dict[str, Any]]) -> None:
    """Agents used every verb of the ClusterRole, but for lists where the server streams them, and no other."""
    used = audit.used(asked)
    assert used <= audit.GRANTED
    assert audit.GRANTED - used == _WITHOUT_STREAMING


def test_agent_watches_its_own_node_only(asked: list[dict[str, Any]]) -> None:
    """Each agent watches the Node that it runs on, by name."""
    names = {event["objectRef"].get("name") for event in asked if event["objectRef"]["resource"] == "nodes"}
    assert names == {"node-1", "node-2"}
