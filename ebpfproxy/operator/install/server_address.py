"""The address at which nodes reach the API server without Services: the ConfigMap's ``KUBERNETES_SERVICE_*``.

What a pod is told is the ``kubernetes`` Service's cluster IP, which works only once the agent does. In this
order: ``--api-server``; ``cluster-info`` in kube-public, which kubeadm (and kind) write with the
controlPlaneEndpoint; what an earlier install has found; the kubeconfig's own server, which may be an address
of this machine alone. Where none is known, each node of kubeadm's still finds it in its kubelet.conf
(:mod:`ebpfproxy.kube.control_plane`).
"""

from __future__ import annotations

import ipaddress
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import yaml

from ebpfproxy import yaml_text
from ebpfproxy.operator.api import Api, ApiError, Object, shown
from ebpfproxy.operator.printing import Say
from ebpfproxy.services.values import parse_port

_NAMESPACE, _NAME, _KEY = "kube-public", "cluster-info", "kubeconfig"
_DEFAULT_PORT = 443


class AddressError(ValueError):
    """A URL that cannot be said as host and port; the message says why."""


class Address(NamedTuple):
    """``host``: an IPv6 address without brackets, as ``KUBERNETES_SERVICE_HOST`` has it."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def is_loopback(self) -> bool:
        """This machine's own: a tunnel, a port-forward, kind's published port."""
        if self.host == "localhost" or self.host.endswith(".localhost"):
            return True
        try:
            found = ipaddress.ip_address(self.host)
        except ValueError:
            return False
        if isinstance(found, ipaddress.IPv6Address) and found.ipv4_mapped:
            found = found.ipv4_mapped
        return found.is_loopback or found.is_unspecified


def parse(url: str) -> Address:
    """``https://HOST[:PORT]``. Raises AddressError."""
    try:
        split = urlsplit(url.strip())
        host, port = split.hostname or "", split.port
    except ValueError as error:
        raise AddressError(f"{url!r}: {error}") from error
    if split.scheme != "https" or not host:
        raise AddressError(f"{url!r} is not https://HOST:PORT")
    if split.path.strip("/") or split.query or split.username is not None:
        raise AddressError(f"{url!r} has more than host and port, and pods are told no more")
    if port == 0:
        raise AddressError(f"{url!r}: port 0")
    return Address(host, port or _DEFAULT_PORT)


def find(api: Api, before: Object | None, say: Say) -> Address | None:
    """``before``: our own ConfigMap, as an earlier install has left it. One line says which address was
    chosen, or why none. Raises ApiError where the server cannot be reached."""
    refused: list[str] = []
    try:
        named = _cluster_info(api)
    except ApiError as error:
        if error.status == 0:
            raise
        named = ""
        refused.append(str(error))
    found = _usable(named, shown("ConfigMap", _NAMESPACE, _NAME), refused)
    if found is None:
        found = _earlier(before)
    if found is None:
        found = _usable(api.kubeconfig_server, "the kubeconfig's server", refused)
    if found is not None:
        address, source = found
        say(f"control plane: {address}, from {source}")
        return address
    say(
        f"warning: the control plane's address is not known ({'; '.join(refused)}): kubeadm's nodes have it"
        " in kubelet.conf, others need --api-server once no kube-proxy runs"
    )
    return None


def _usable(url: str, source: str, refused: list[str]) -> tuple[Address, str] | None:
    """The address and its source; None, with a reason in ``refused``, where nodes cannot use it."""
    if not url:
        return None
    try:
        found = parse(url)
    except AddressError as error:
        refused.append(f"{source}: {error}")
        return None
    if found.is_loopback:
        refused.append(f"{source}: {found} is this machine's own")
        return None
    return found, source


def _earlier(before: Object | None) -> tuple[Address, str] | None:
    """Returns the address of an earlier install, a loopback address, too: each node may have a balancer."""
    data = (before or {}).get("data") or {}
    host, port = data.get("KUBERNETES_SERVICE_HOST"), str(data.get("KUBERNETES_SERVICE_PORT", ""))
    if before is None or not host:
        return None
    meta = before["metadata"]
    address = Address(str(host), parse_port(port) or _DEFAULT_PORT)
    return address, shown("ConfigMap", meta["namespace"], meta["name"])


def _cluster_info(api: Api) -> str:
    """Returns the server of kubeadm's file: one cluster, without a name or a context. Raises ApiError."""
    try:
        document: Any = yaml_text.load(api.config(_NAMESPACE, _NAME, _KEY))
        return str(document["clusters"][0]["cluster"]["server"])
    except (yaml.YAMLError, LookupError, TypeError):
        return ""
