"""Who a client at a socket is: the name and addresses of its network namespace, and the pod of its cgroup."""

from __future__ import annotations

import os
import re
import time
from contextlib import suppress
from pathlib import Path

import msgspec

from ebpfproxy.netlink.namespaces import NO_ENTRY, may_enter, names_by_cookie
from ebpfproxy.node.clients import namespace_cookies

#: Namespaces and cgroups are looked for again where one is not known, but not more often than this.
_SECONDS = 2.0
_LOWER_HALF = 0xFFFFFFFF
#: As the kubelet names cgroups of pods, with either of its cgroup drivers.
_POD = re.compile(r"pod([0-9a-f]{8}(?:[-_][0-9a-f]{4}){3}[-_][0-9a-f]{12})")
#: The kubelet's folder, with a folder NAMESPACE_NAME_UID for each pod of this node.
_POD_LOGS = Path("/var/log/pods")


class Namespace(msgspec.Struct, frozen=True):
    """A network namespace; ``name`` as in :func:`ebpfproxy.netlink.namespaces.names_by_cookie`."""

    name: str
    addresses: tuple[bytes, ...] = ()


class ClientNames:
    """Network namespaces and cgroups of this node, found when they are asked for. One thread uses it."""

    def __init__(self, cgroup_root: Path) -> None:
        self._cgroup_root = cgroup_root
        self._namespaces: dict[int, Namespace] = {}
        self._pods: dict[int, str] = {}
        self._next_namespaces = self._next_cgroups = 0.0

    def namespace(self, cookie: int) -> Namespace | None:
        """The network namespace with this lower half of its cookie; None where this process sees none."""
        if cookie not in self._namespaces and time.monotonic() >= self._next_namespaces:
            self._find_namespaces()
        return self._namespaces.get(cookie)

    def cookie_with(self, address: bytes) -> int | None:
        """The lower half of the cookie of the namespace that has an address."""
        self._find_namespaces()
        return next((number for number, each in self._namespaces.items() if address in each.addresses), None)

    def cookie_named(self, name: str) -> int | None:
        """The same of the namespace with this name."""
        self._find_namespaces()
        return next((number for number, each in self._namespaces.items() if each.name == name), None)

    def why_unknown(self) -> str:
        """What keeps this process from seeing other network namespaces; empty where nothing does."""
        return "" if may_enter() else NO_ENTRY

    def pod(self, cgroup: int) -> str:
        """The pod whose processes are in the cgroup with this id: ``namespace/name``, else a uid, else empty.

        The name is known only where the kubelet's folder of logs can be read.
        """
        if cgroup not in self._pods and time.monotonic() >= self._next_cgroups:
            self._find_cgroups()
        return self._pods.get(cgroup, "")

    def _find_namespaces(self) -> None:
        addresses: dict[int, list[bytes]] = {}
        for address, cookie in namespace_cookies().items():
            addresses.setdefault(cookie, []).append(address)
        self._namespaces = {
            cookie & _LOWER_HALF: Namespace(name, tuple(addresses.get(cookie, ())))
            for cookie, name in names_by_cookie().items()
        }
        self._next_namespaces = time.monotonic() + _SECONDS

    def _find_cgroups(self) -> None:
        names = _names_by_uid()
        self._pods = {}
        for folder, _, _ in os.walk(self._cgroup_root):
            # The kernel's id of a cgroup is the number of its folder.
            with suppress(OSError):
                uids = _POD.findall(folder)
                uid = uids[-1].replace("_", "-") if uids else ""
                self._pods[Path(folder).stat().st_ino] = names.get(uid, uid)
        self._next_cgroups = time.monotonic() + _SECONDS


def _names_by_uid() -> dict[str, str]:
    found = {}
    with suppress(OSError):
        for entry in _POD_LOGS.iterdir():
            namespace, _, rest = entry.name.partition("_")
            name, _, uid = rest.partition("_")
            found[uid] = f"{namespace}/{name}"
    return found
