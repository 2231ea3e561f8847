"""The pod that runs the one-node command on a node.

It is named after the node, so that two calls cannot work on one node at once. It has no label of the
DaemonSet's, which would adopt it, and no token.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from ebpfproxy.operator.api import Object
from ebpfproxy.operator.image import Image

CONTAINER = "migrate"
LABELS = {"app.kubernetes.io/name": "ebpfproxy-migrate"}
#: API servers before 1.30 know no ``appArmorProfile``; later ones accept both where they agree.
_APP_ARMOR = {f"container.apparmor.security.beta.kubernetes.io/{CONTAINER}": "unconfined"}
_PREFIX = "ebpfproxy-migrate-"
#: A pod's name is a DNS subdomain, which has this length at most.
_LONGEST = 253
_HASH = 10


def name_of(node: str) -> str:
    name = f"{_PREFIX}{node}"
    if len(name) <= _LONGEST:
        return name
    return f"{name[: _LONGEST - _HASH - 1]}-{hashlib.sha256(node.encode()).hexdigest()[:_HASH]}"


def manifest(node: str, namespace: str, image: Image, arguments: Iterable[str], *, seconds: float) -> Object:
    """``arguments`` follow ``ebpfproxy migrate``; the kubelet ends the pod after ``seconds``."""
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": name_of(node),
            "namespace": namespace,
            "labels": LABELS,
            "annotations": _APP_ARMOR,
        },
        "spec": {
            # The pod is bound to the node without a scheduler.
            "nodeName": node,
            "restartPolicy": "Never",
            "activeDeadlineSeconds": int(seconds),
            "hostNetwork": True,
            # The command looks for a kube-proxy among the node's processes.
            "hostPID": True,
            "dnsPolicy": "Default",
            "enableServiceLinks": False,
            "automountServiceAccountToken": False,
            "priorityClassName": "system-node-critical",
            "tolerations": [{"operator": "Exists"}],
            "imagePullSecrets": [{"name": each} for each in image.pull_secrets],
            # The same type of privileged containers is in deploy/base.
            "securityContext": {
                "seccompProfile": {"type": "RuntimeDefault"},
                "seLinuxOptions": {"level": "s0", "type": "spc_t"},
            },
            "containers": [
                {
                    "name": CONTAINER,
                    "image": image.name,
                    "imagePullPolicy": image.pull_policy,
                    "command": ["ebpfproxy", "migrate"],
                    "args": [*arguments],
                    "env": [{"name": "EBPFPROXY_BPF_ROOT", "value": "/host/bpf"}],
                    # The last lines explain a failure where logs cannot be read.
                    "terminationMessagePolicy": "FallbackToLogsOnError",
                    # Requests are left out: on a full node the kubelet would evict others for a critical pod.
                    "securityContext": _security(),
                    "volumeMounts": [
                        {"name": "bpffs", "mountPath": "/host/bpf"},
                        {"name": "xtables-lock", "mountPath": "/run/xtables.lock"},
                    ],
                }
            ],
            "volumes": [
                {"name": "bpffs", "hostPath": {"path": "/sys/fs/bpf", "type": "Directory"}},
                # Every change of iptables-legacy's tables on the node takes this lock.
                {
                    "name": "xtables-lock",
                    "hostPath": {"path": "/run/xtables.lock", "type": "FileOrCreate"},
                },
            ],
        },
    }


def _security() -> Object:
    """tests/operator/migrate/test_pod.py fails without any one of these capabilities."""
    return {
        "runAsUser": 0,
        "runAsGroup": 0,
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        # The runtimes' default profile forbids reading processes of other profiles, such as kube-proxy's.
        "appArmorProfile": {"type": "Unconfined"},
        "capabilities": {
            "drop": ["ALL"],
            "add": [
                "BPF",  # maps; the kernel is probed by loading programs
                "NET_ADMIN",  # netfilter, conntrack, IPVS; filters of devices
                "NET_RAW",  # iptables-legacy asks by a raw socket
                "SYS_ADMIN",  # CRI-O's and podman's seccomp profile lets nobody else call bpf()
                "SYS_PTRACE",  # /proc/PID/ns and root of kube-proxy, which has more capabilities
            ],
        },
    }
