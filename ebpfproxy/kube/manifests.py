"""Objects from YAML and JSON files: the source that needs no cluster.

Each file is read on its own and kept: a change re-reads one file, and one that cannot be used is reported
once while its last good content is used. Every change is delivered as complete lists, which the
receiver compares with what it knows.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import watchfiles
import yaml

from ebpfproxy import yaml_text
from ebpfproxy.kube.decode import Unreadable, explain, from_plain
from ebpfproxy.kube.errors import ManifestError
from ebpfproxy.kube.objects import (
    RECORD_TYPES,
    EndpointSlice,
    Event,
    Node,
    Object,
    ObjectKey,
    Reduce,
    Replaced,
    Resource,
    Service,
    ServiceCidr,
    key_of,
)
from ebpfproxy.kube.source_status import SourceStatus, State
from ebpfproxy.kube.watch.listing import reduced_or_why
from ebpfproxy.logs import get_logger
from ebpfproxy.plain_text import plain

log = get_logger(__name__)

_SUFFIXES = (".yaml", ".yml", ".json")
_DEBOUNCE_MS = 50
_KINDS = {
    ("v1", "Service"): Resource.SERVICES,
    ("discovery.k8s.io/v1", "EndpointSlice"): Resource.ENDPOINTSLICES,
    ("v1", "Node"): Resource.NODES,
    ("networking.k8s.io/v1", "ServiceCIDR"): Resource.SERVICECIDRS,
    ("networking.k8s.io/v1beta1", "ServiceCIDR"): Resource.SERVICECIDRS,
}
#: Lists whose items may leave out what the list's kind says.
_LISTS = {f"{kind}List": (version, kind) for version, kind in _KINDS}


class _File(msgspec.Struct):
    """``stamp`` tells one content from the next; ``error`` is what was last reported."""

    stamp: tuple[int, int, int]
    objects: tuple[Object, ...] = ()
    error: str | None = None


class ManifestSource:
    """Watches one folder. :meth:`start` runs a thread; ``statuses`` may be read by any thread."""

    def __init__(
        self,
        directory: Path,
        sink: Callable[[Event], None],
        *,
        node_name: str,
        reduce: Reduce = lambda each: each,
    ) -> None:
        self._directory = directory
        self._sink = sink
        self._reduce = reduce
        self._node_name = node_name
        self._files: dict[Path, _File] = {}
        self._duplicates: set[tuple[type, ObjectKey, Path]] = set()
        self._stop = threading.Event()
        self._since = time.time()
        self._last_event: float | None = None
        self._error: str | None = None
        self._reads = 0

    @property
    def statuses(self) -> list[SourceStatus]:
        """Returns one for each resource, as reflectors do. A broken file makes the source ``failing``."""
        state = State.STARTING if self._last_event is None else State.CONNECTED
        return [
            SourceStatus(
                resource=resource,
                state=State.FAILING if self._error else state,
                since=self._since,
                last_event=self._last_event,
                synced=self._last_event is not None,
                error=self._error,
                lists=self._reads,
            )
            for resource in Resource
        ]

    def start(self) -> None:
        """Reads everything once before it returns. Raises ManifestError where there is no such folder."""
        self.check()
        self.read()
        threading.Thread(target=self._run, name="manifests", daemon=True).start()

    def check(self) -> None:
        """Raises ManifestError where there is no such folder."""
        if not self._directory.is_dir():
            raise ManifestError(f"--manifests {self._directory}: not a folder")

    def stop(self) -> None:
        self._stop.set()

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                changes = watchfiles.watch(
                    self._directory,
                    watch_filter=None,
                    debounce=_DEBOUNCE_MS,
                    step=_DEBOUNCE_MS // 2,
                    stop_event=self._stop,
                    yield_on_timeout=True,
                    rust_timeout=5000,
                )
                # A change before the watch began is seen by the first time-out at the latest.
                for _ in changes:
                    self.read()
            except (FileNotFoundError, RuntimeError) as error:
                self._report_folder(str(error))
                self._stop.wait(1.0)

    def _report_folder(self, error: str | None) -> None:
        if error and not self._error:
            log.warning("cannot watch manifests, trying again", folder=str(self._directory), error=error)
        self._error = error

    def read(self) -> None:
        """Reads what changed and delivers it, if anything did."""
        try:
            found = {
                path: _stamp(path)
                for path in sorted(self._directory.iterdir())
                if path.suffix in _SUFFIXES and not path.name.startswith(".") and path.is_file()
            }
        except OSError as error:
            self._report_folder(f"{self._directory}: {error.strerror}")
            return
        changed = self._last_event is None
        for gone in self._files.keys() - found.keys():
            del self._files[gone]
            changed = True
        for path, stamp in found.items():
            known = self._files.setdefault(path, _File((0, 0, 0)))
            if known.stamp != stamp:
                known.stamp = stamp
                changed |= self._read_file(path, known)
        broken = [f"{path.name}: {f.error}" for path, f in self._files.items() if f.error]
        self._error = "; ".join(broken) or None
        if changed:
            self._deliver()

    def _read_file(self, path: Path, known: _File) -> bool:
        """True if its objects have changed."""
        try:
            objects = tuple(parse(path.read_text(encoding="utf-8")))
        except (OSError, UnicodeDecodeError, ManifestError) as error:
            if known.error != str(error):
                log.warning(
                    "cannot read manifest, keeping its last good state", file=str(path), error=str(error)
                )
            known.error = str(error)
            return False
        if known.error:
            log.info("manifest is valid again", file=str(path))
        known.error = None
        if objects == known.objects:
            return False
        known.objects = objects
        return True

    def _deliver(self) -> None:
        lists: dict[Resource, dict[ObjectKey, object]] = {resource: {} for resource in Resource}
        doubles = set()
        for path in sorted(self._files):
            for each in self._files[path].objects:
                if not self._wanted(each):
                    continue
                mine = lists[_resource_of(each)]
                key = key_of(each)
                if key in mine:
                    doubles.add((type(each), key, path))
                else:
                    reduced = reduced_or_why(self._reduce, key, each)
                    if isinstance(reduced, Unreadable):
                        log.warning("ignoring object", object=str(key), file=str(path), error=reduced.why)
                    else:
                        mine[key] = reduced
        for kind, key, path in sorted(doubles - self._duplicates, key=str):
            log.warning(
                "object is in two manifests, using the first file's",
                object=f"{kind.__name__} {key}",
                ignored=str(path),
            )
        self._duplicates = doubles
        for resource, objects in lists.items():
            self._sink(Replaced(resource, objects))
        self._last_event = time.time()
        self._reads += 1

    def _wanted(self, each: Object) -> bool:
        """True if an API server's selectors would select it."""
        if isinstance(each, Node):
            return each.metadata.name == self._node_name
        if not isinstance(each, EndpointSlice):
            return True
        labels = each.metadata.labels
        return labels is None or labels.headless is None


def _stamp(path: Path) -> tuple[int, int, int]:
    status = path.stat()
    return status.st_mtime_ns, status.st_ino, status.st_size


def _resource_of(each: Object) -> Resource:
    if isinstance(each, Service):
        return Resource.SERVICES
    if isinstance(each, ServiceCidr):
        return Resource.SERVICECIDRS
    return Resource.NODES if isinstance(each, Node) else Resource.ENDPOINTSLICES


def parse(text: str) -> Iterator[Object]:
    """Yields objects of our kinds in all documents of a file; other kinds are ignored.

    Raises ManifestError for the first thing that is wrong.
    """
    try:
        documents = yaml_text.load_all(text)
    except yaml.YAMLError as error:
        raise ManifestError(plain(" ".join(str(error).split()))) from error
    for number, document in enumerate(documents, 1):
        where = f"document {number}"
        if document is None:
            continue
        if not isinstance(document, dict):
            raise ManifestError(f"{where}: not an object")
        yield from _objects(document, where)


def _objects(document: dict[str, Any], where: str) -> Iterator[Object]:
    kind = document.get("kind")
    if not isinstance(kind, str | None):
        raise ManifestError(f"{where}: kind: not a string")
    if kind == "List" or kind in _LISTS:
        items = document.get("items")
        if not isinstance(items, list | None):
            raise ManifestError(f"{where}: items: not a list")
        for i, item in enumerate(items or ()):
            if not isinstance(item, dict):
                raise ManifestError(f"{where}: items[{i}]: not an object")
            if kind in _LISTS:
                version, item_kind = _LISTS[kind]
                item = {"apiVersion": version, "kind": item_kind, **item}  # noqa: PLW2901
            yield from _objects(item, f"{where}, items[{i}]")
        return
    resource = _KINDS.get((str(document.get("apiVersion")), str(kind)))
    if resource is None:
        if kind == "EndpointSlice":
            raise ManifestError(
                f"{where}: apiVersion: {document.get('apiVersion')!r} is not discovery.k8s.io/v1"
            )
        return
    metadata = document.get("metadata")
    name = metadata.get("name") if isinstance(metadata, dict) else None
    try:
        yield from_plain(document, RECORD_TYPES[resource])
    except msgspec.ValidationError as error:
        raise ManifestError(plain(f"{where}, {kind} {name or '(no name)'}: {explain(error)}")) from error
