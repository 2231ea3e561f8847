"""Status objects and bookmarks with the texts of a real API server (``recordings/responses.json``)."""

from __future__ import annotations

from typing import Any

from tests.apiserver.store import KINDS, encode

_GROUPS = {
    "services": "",
    "nodes": "",
    "endpointslices": "discovery.k8s.io",
    "servicecidrs": "networking.k8s.io",
}

NOT_FOUND = "the server could not find the requested resource"
TOO_OLD_TO_CONTINUE = (
    "The provided continue parameter is too old to display a consistent list result. You can start a new list "
    "without the continue parameter, or use the continue token in this response to retrieve the remainder of "
    "the results. Continuing with the provided token results in an inconsistent list - objects that were "
    "created, modified, or deleted between the time the first chunk was returned and now may show up in the "
    "list."
)
NO_STREAMING_LIST = (
    "WatchOptions.meta.k8s.io is invalid: sendInitialEvents: Forbidden: "
    "sendInitialEvents is forbidden for watch unless the WatchList feature gate is enabled"
)


def status(code: int, reason: str, message: str, details: dict[str, Any] | None = None) -> bytes:
    body: dict[str, Any] = {
        "kind": "Status",
        "apiVersion": "v1",
        "metadata": {},
        "status": "Failure",
        "message": message,
        "reason": reason,
    }
    if details is not None:
        body["details"] = details
    return encode({**body, "code": code}) + b"\n"


def forbidden(user: str, verb: str, resource: str) -> bytes:
    message = (
        f'{resource} is forbidden: User "{user}" cannot {verb} resource "{resource}" '
        f'in API group "{_GROUPS[resource]}" at the cluster scope'
    )
    details = {"group": _GROUPS[resource], "kind": resource}
    return status(403, "Forbidden", message, {k: v for k, v in details.items() if v})


def too_old(version: int, oldest: int) -> bytes:
    return status(410, "Expired", f"too old resource version: {version} ({oldest})")


def bookmark(resource: str, version: int, *, initial_end: bool = False) -> bytes:
    api_version, kind, _ = KINDS[resource]
    meta: dict[str, Any] = {"resourceVersion": str(version)}
    if initial_end:
        meta["annotations"] = {"k8s.io/initial-events-end": "true"}
    body: dict[str, Any] = {"kind": kind, "apiVersion": api_version, "metadata": meta}
    if kind == "EndpointSlice":
        body |= {"addressType": "", "endpoints": None, "ports": None}
    elif kind == "ServiceCIDR":
        body |= {"spec": {"cidrs": None}, "status": {}}
    elif kind == "Service":
        body |= {"spec": {}, "status": {"loadBalancer": {}}}
    else:
        body |= {"spec": {}, "status": {"daemonEndpoints": {"kubeletEndpoint": {"Port": 0}}, "nodeInfo": {}}}
    return encode({"type": "BOOKMARK", "object": body}) + b"\n"
