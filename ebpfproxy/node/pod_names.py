"""Names of this node's pods, as their runtime keeps them: the results of CNI plugins (libcni's cache).

containerd and CRI-O write one file for each network of a pod, whichever plugin makes it, and remove it with
the pod. Nothing else on a node has a pod's name and its network namespace at once; no API server is asked.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePath
from typing import NamedTuple

import msgspec

#: libcni's CacheDir, with the folder that it adds.
CNI_RESULTS = Path("/var/lib/cni/results")


class Pod(NamedTuple):
    """``netns``: the file name of its network namespace in one of ``netlink.namespaces.FOLDERS``."""

    namespace: str
    name: str
    netns: str


class _Interface(msgspec.Struct):
    sandbox: str = ""


class _Result(msgspec.Struct):
    interfaces: list[_Interface] | None = None


class _Cached(msgspec.Struct, rename="camel"):
    cni_args: list[list[str]] | None = None
    result: _Result | None = None


_CACHED = msgspec.json.Decoder(_Cached)


def pods(results: Path) -> Iterator[Pod]:
    """The pods in a folder of results, one with several networks more than once. Other files are skipped."""
    with suppress(OSError):
        for path in sorted(each for each in results.iterdir() if each.is_file()):
            with suppress(OSError, msgspec.DecodeError):
                yield from _pods(_CACHED.decode(path.read_bytes()))


def _pods(cached: _Cached) -> Iterator[Pod]:
    arguments = {each[0]: each[1] for each in cached.cni_args or () if len(each) == 2}
    name, namespace = arguments.get("K8S_POD_NAME"), arguments.get("K8S_POD_NAMESPACE")
    interfaces = cached.result.interfaces if cached.result is not None else None
    sandboxes = {each.sandbox for each in interfaces or () if each.sandbox}
    if name and namespace:
        yield from (Pod(namespace, name, PurePath(sandbox).name) for sandbox in sorted(sandboxes))
