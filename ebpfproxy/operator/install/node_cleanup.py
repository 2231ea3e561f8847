"""Removes what is pinned on nodes: by a DaemonSet whose pods call ``ebpfproxy cleanup`` first, then wait.

Its pods have what the agent's have and no more: the same user, capabilities and bpffs. A DaemonSet's pods are
for ever, so cleaning is an init container's, and one that does nothing follows: once it runs, the node is
clean.
The agent's DaemonSet must be gone: ``cleanup`` is refused beside an agent, and an agent would load again.
"""

from __future__ import annotations

import copy

from ebpfproxy.operator.api import Object
from ebpfproxy.operator.install.render import containers
from ebpfproxy.operator.names import AGENT, APP

CLEANUP = f"{AGENT}-cleanup"
_VARIABLE, _VOLUME = "EBPFPROXY_BPF_ROOT", "bpffs"
_AS_THEY_ARE = (
    "dnsPolicy",
    "hostNetwork",
    "imagePullSecrets",
    "nodeSelector",
    "priorityClassName",
    "securityContext",
    "tolerations",
)


def image_of(daemon_set: Object) -> str:
    return str(_agent(daemon_set)["image"])


def cleanup(daemon_set: Object, image: str) -> Object:
    """Derives it from the agent's DaemonSet, of the cluster or the base: it runs on the same nodes."""
    pod, agent = daemon_set["spec"]["template"]["spec"], _agent(daemon_set)
    labels = {APP: CLEANUP}
    spec: Object = {name: copy.deepcopy(pod[name]) for name in _AS_THEY_ARE if name in pod}
    # It sends no requests; the agent's own account is deleted meanwhile.
    spec["automountServiceAccountToken"] = False
    # What waits is process 1, which SIGTERM does not end.
    spec["terminationGracePeriodSeconds"] = 1
    spec["initContainers"] = [
        {
            "name": "cleanup",
            "image": image,
            "imagePullPolicy": agent.get("imagePullPolicy", "IfNotPresent"),
            "terminationMessagePolicy": "FallbackToLogsOnError",
            "command": ["ebpfproxy", "cleanup"],
            "env": [copy.deepcopy(each) for each in agent.get("env", ()) if each["name"] == _VARIABLE],
            "resources": {"requests": {"cpu": "10m", "memory": "64Mi"}},
            "securityContext": copy.deepcopy(agent["securityContext"]),
            "volumeMounts": [
                copy.deepcopy(each) for each in agent["volumeMounts"] if each["name"] == _VOLUME
            ],
        }
    ]
    spec["containers"] = [
        {
            "name": "clean",
            "image": image,
            "imagePullPolicy": agent.get("imagePullPolicy", "IfNotPresent"),
            # An image need not have more programs than the agent's.
            "command": ["python3", "-c", "import signal; signal.pause()"],
            "resources": {"requests": {"cpu": "1m", "memory": "16Mi"}},
            "securityContext": {
                "runAsUser": 65534,
                "runAsGroup": 65534,
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            },
        }
    ]
    spec["volumes"] = [copy.deepcopy(each) for each in pod["volumes"] if each["name"] == _VOLUME]
    return {
        "apiVersion": daemon_set.get("apiVersion", "apps/v1"),
        "kind": "DaemonSet",
        "metadata": {"name": CLEANUP, "namespace": daemon_set["metadata"]["namespace"], "labels": labels},
        "spec": {
            "selector": {"matchLabels": labels},
            "template": {"metadata": {"labels": labels}, "spec": spec},
        },
    }


def _agent(daemon_set: Object) -> Object:
    spec = daemon_set["spec"]["template"]["spec"]
    (found,) = (each for each in containers(spec) if each["name"] == AGENT)
    return dict(found)
