"""Requests of agents from the audit log of the API server."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from tests.cluster import kubeadm
from tests.cluster.cluster import Cluster
from tests.deploy.objects import base

_USER = "system:serviceaccount:kube-system:ebpfproxy"
_REFUSED = (401, 403)
_DECISION = "authorization.k8s.io/decision"


class Grant(NamedTuple):
    group: str
    resource: str
    verb: str


#: Returns all that the ClusterRole grants.
GRANTED = {
    Grant(group, resource, verb)
    for rule in base()["ClusterRole", "ebpfproxy"]["rules"]
    for group in rule["apiGroups"]
    for resource in rule["resources"]
    for verb in rule["verbs"]
}


def requests(cluster: Cluster) -> list[dict[str, Any]]:
    """Returns the agents' requests that were or are being served, oldest first."""
    lines = cluster.nodes[0].path(kubeadm.AUDIT_LOG).read_text().splitlines()
    return [event for line in lines if (event := json.loads(line))["user"]["username"] == _USER]


def refused(found: list[dict[str, Any]]) -> list[str]:
    """Returns requests that failed authentication or authorization, with the server's message.

    An event about an object of a namespace that is being deleted is a 403, too, but of admission, after authorization.
    """
    return [
        f"{event['verb']} {event['requestURI']}: {event['responseStatus'].get('message', '')}"
        for event in found
        if event.get("responseStatus", {}).get("code") in _REFUSED
        and event.get("annotations", {}).get(_DECISION) != "allow"
    ]


def used(found: list[dict[str, Any]]) -> set[Grant]:
    return {
        Grant(event["objectRef"].get("apiGroup", ""), event["objectRef"]["resource"], event["verb"])
        for event in found
        if "objectRef" in event
    }
