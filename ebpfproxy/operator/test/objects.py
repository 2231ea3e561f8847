"""The test's objects: a namespace, Services, and pods of the agent's image without any rights."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from ebpfproxy.operator.api import Object
from ebpfproxy.operator.image import Image

#: Each object has it; its value is the pod's role.
LABEL = "ebpfproxy.io/test"
SERVER, CLIENT, HOST, LOAD = "server", "client", "host", "load"
#: Labels of servers on the first node, and of those whose kernel has SCTP.
FIRST, SCTP = "ebpfproxy.io/test-first", "ebpfproxy.io/test-sctp"
YES = "yes"

ANY, STICKY, LOCAL, ONE, HEADLESS, OVER_SCTP = "any", "sticky", "local", "one", "headless", "sctp"
PORT, TARGET_PORT = 80, 8080
#: The kubelet ends pods after this time, should the command be killed.
_MOST_SECONDS = 3600
_NOBODY = 65534


def namespace(name: str) -> Object:
    # Pods of the nodes' network are allowed at this level only.
    labels = {LABEL: YES, "pod-security.kubernetes.io/enforce": "privileged"}
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}}


def services(namespace: str) -> Iterator[Object]:
    """Those of the servers. :func:`over_sctp` follows once it is known whose kernel has SCTP."""
    local = {"internalTrafficPolicy": "Local", "externalTrafficPolicy": "Local"}
    for name, spec, selected in (
        (ANY, {"type": "NodePort"}, {}),
        (STICKY, {"sessionAffinity": "ClientIP"}, {}),
        (LOCAL, {"type": "NodePort", **local}, {}),
        (ONE, {"type": "NodePort", **local}, {FIRST: YES}),
        (HEADLESS, {"clusterIP": "None"}, {}),
    ):
        yield _service(namespace, name, ("TCP", "UDP"), {LABEL: SERVER, **selected}, spec)


def over_sctp(namespace: str) -> Object:
    return _service(namespace, OVER_SCTP, ("SCTP",), {LABEL: SERVER, SCTP: YES}, {"type": "NodePort"})


def _service(
    namespace: str, name: str, protocols: tuple[str, ...], selector: dict[str, str], spec: Object
) -> Object:
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name, "namespace": namespace, "labels": {LABEL: YES}},
        "spec": {
            "ipFamilyPolicy": "PreferDualStack",
            "selector": selector,
            "ports": [
                {"name": each.lower(), "protocol": each, "port": PORT, "targetPort": TARGET_PORT}
                for each in protocols
            ],
            **spec,
        },
    }


def pod(place: tuple[str, str], role: str, node: str, image: Image, plan: Object, **labels: str) -> Object:
    """``place``: namespace and name; ``plan`` is what the module ``pod`` reads.

    It needs no scheduler, token, volume or capability.
    """
    namespace, name = place
    container: Object = {
        "name": role,
        "image": image.name,
        "imagePullPolicy": image.pull_policy,
        # An image of an older version has no such module, which its last line says.
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "command": ["python3", "-m", "ebpfproxy.operator.test.pod"],
        "args": [msgspec.json.encode(plan).decode()],
        "resources": {"requests": {"cpu": "10m", "memory": "32Mi"}},
        "securityContext": {
            "runAsUser": _NOBODY,
            "runAsGroup": _NOBODY,
            "runAsNonRoot": True,
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
    }
    if role == SERVER:
        container["readinessProbe"] = {"tcpSocket": {"port": TARGET_PORT}, "periodSeconds": 1}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": namespace, "labels": {LABEL: role, **labels}},
        "spec": {
            "nodeName": node,
            "hostNetwork": role == HOST,
            "restartPolicy": "Never",
            "activeDeadlineSeconds": _MOST_SECONDS,
            "terminationGracePeriodSeconds": 1,
            "automountServiceAccountToken": False,
            "enableServiceLinks": False,
            "tolerations": [{"operator": "Exists"}],
            "imagePullSecrets": [{"name": each} for each in image.pull_secrets],
            "securityContext": {"seccompProfile": {"type": "RuntimeDefault"}},
            "containers": [container],
        },
    }
