"""Finds the client that somebody names: a pod of this node, this host, or any address."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from ebpfproxy.explain.path import Client, Place
from ebpfproxy.inspection.failures import ClosedNamespacesError, QuestionError
from ebpfproxy.netlink.namespaces import FOLDERS, NO_ENTRY, may_enter
from ebpfproxy.node.clients import Namespace, visible_namespaces
from ebpfproxy.node.pod_names import pods
from ebpfproxy.services.model import format_address
from ebpfproxy.services.values import LOOPBACK, parse_address, unusable_address

HOST = "host"


class Found(NamedTuple):
    """The client, and the namespace that names without one belong to, as in its pod's DNS.

    ``doubt``: why it may be somebody else; empty where that is known.
    """

    client: Client
    namespace: str
    doubt: str = ""


def find_client(text: str, results: Path, device_to: Callable[[bytes], int | None]) -> Found:
    """Finds ``host``, an address, a pod by name with or without its namespace, or by its network namespace's.

    ``results``: where the runtime keeps what CNI plugins returned. Raises QuestionError for an unknown name,
    and ClosedNamespacesError where pods cannot be looked for.
    """
    visible = list(visible_namespaces())
    if text == HOST:
        return Found(_host(visible), "default")
    names = _names(results)
    address = parse_address(text.strip("[]"))
    if address is not None:
        if (why := unusable_address(address)) is LOOPBACK:
            return Found(_host(visible), "default")
        if why is not None:
            raise QuestionError(f"{text} {why}: that is no one client's")
        return _by_address(address, visible, names, device_to)
    namespace, _, name = text.rpartition("/")
    matches = {each: pod for each, pod in names.items() if pod[1] == name and namespace in ("", pod[0])}
    if len(matches) > 1:
        found = ", ".join(sorted(f"{pod[0]}/{pod[1]}" for pod in matches.values()))
        raise QuestionError(f"several pods are named {name}: {found}")
    wanted = next(iter(matches), name)
    for each in visible:
        is_pod = wanted in names or each.is_linked
        if is_pod and each.path.parent in FOLDERS and each.path.name == wanted:
            pod_namespace, pod = names.get(wanted, ("", wanted))
            return Found(_pod(each, _pod_name(pod_namespace, pod), device_to), pod_namespace or "default")
    if not may_enter():
        raise ClosedNamespacesError(f"a pod {text!r} is not looked for: {NO_ENTRY}")
    raise QuestionError(
        f"no pod {text!r} on this node: name one of its pods (those in {results}), an address, or {HOST}"
    )


def _names(results: Path) -> dict[str, tuple[str, str]]:
    """Namespaces and names of pods by their network namespaces' file names."""
    return {pod.netns: (pod.namespace, pod.name) for pod in pods(results)}


def _pod_name(namespace: str, name: str) -> str:
    return f"{namespace}/{name}" if namespace else name


def _host(visible: list[Namespace]) -> Client:
    own = next(each for each in visible if each.is_own)
    return Client(Place.HOST, HOST, own.addresses, own.cookie)


def _pod(each: Namespace, name: str, device_to: Callable[[bytes], int | None]) -> Client:
    devices = (device_to(address) for address in each.addresses)
    ifindex = next((device for device in devices if device is not None), None)
    return Client(Place.POD, name, each.addresses, each.cookie, ifindex)


def _by_address(
    address: bytes,
    visible: list[Namespace],
    names: dict[str, tuple[str, str]],
    device_to: Callable[[bytes], int | None],
) -> Found:
    owners = [each for each in visible if address in each.addresses and (each.is_own or each.is_linked)]
    if any(each.is_own for each in owners):
        return Found(_host(visible), "default")
    if len(owners) == 1:
        namespace, name = names.get(owners[0].path.name, ("", format_address(address)))
        return Found(_pod(owners[0], _pod_name(namespace, name), device_to), namespace or "default")
    outside = Client(Place.OUTSIDE, format_address(address), (address,), 0, device_to(address))
    doubt = ""
    if not owners and not may_enter():
        doubt = f"{outside.name} is taken for a client outside, and may be a pod's: {NO_ENTRY}"
    return Found(outside, "default", doubt)
