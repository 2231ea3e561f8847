"""What decodes that which others send: for each a function of bytes, and inputs to begin with.

A function returns where the input is good, or is refused by the error that its callers know, in text that can be
printed. Whatever else it raises is a fault. Targets are in the order of data through the product.
"""

from __future__ import annotations

import functools
import gzip
import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import msgspec
import yaml

from ebpfproxy.config.documents import ConfigurationError
from ebpfproxy.config.durations import parse_duration
from ebpfproxy.config.load import effective
from ebpfproxy.config.load import parse as parse_configuration
from ebpfproxy.datapath.abi import decision_layout, flow_layout, layout, node_layout, socket_layout
from ebpfproxy.kube import decode, failures, kubeconfig
from ebpfproxy.kube.errors import ManifestError
from ebpfproxy.kube.manifests import parse as parse_manifest
from ebpfproxy.kube.objects import Changed, Deleted, ObjectKey, Resource, key_of
from ebpfproxy.kube.watch.chunks import ChunkedContent
from ebpfproxy.kube.watch.lines import LineSplitter
from ebpfproxy.kube.watch.listing import Listing
from ebpfproxy.netlink import codec, ctnetlink, namespace_ids, routes, rtnetlink, sock_diag, traffic_control
from ebpfproxy.node import kernel_tables, pod_names
from ebpfproxy.operator.migrate.node import nfacct
from ebpfproxy.services.model import Family, Protocol, ServicePortKey
from ebpfproxy.services.reduce import reducer
from ebpfproxy.services.tracker import Tracker
from tests.data import RECORDINGS, SAMPLES
from tests.fuzz import answer_targets, tool_targets
from tests.fuzz.target import Target, printable

_CASES = Path(__file__).parents[1] / "cases"
_NODE = "node-a"


# -- kube


@functools.cache
def _watch_lines() -> dict[Resource, list[bytes]]:
    found: dict[Resource, list[bytes]] = {resource: [] for resource in Resource}
    for line in gzip.decompress((RECORDINGS / "watch-events.jsonl.gz").read_bytes()).splitlines():
        entry = json.loads(line)
        found[Resource(entry["resource"])].append(entry["line"].encode())
    found[Resource.SERVICECIDRS].append(
        b'{"type":"ADDED","object":{"metadata":{"name":"kubernetes"},"spec":{"cidrs":["10.96.0.0/16"]}}}'
    )
    return found


def _few(lines: list[bytes]) -> list[bytes]:
    """Some of each length: most lines of a recording are alike."""
    ordered = sorted(set(lines), key=len)
    return ordered[:: max(1, len(ordered) // 12)]


_DECODERS = {resource: decode.Decoder(resource) for resource in Resource}
_RESOURCES = list(Resource)
_REDUCE = reducer(_NODE)


def _use(tracker: Tracker) -> None:
    for warning in tracker.drain().warnings:
        str(warning)
    for key in {ObjectKey(port.key.namespace, port.key.name) for port in tracker.service_ports()}:
        assert tracker.reasons(key) is not None


def watch_line(data: bytes) -> None:
    """Lines of a watch, of the resource that the first byte names, up to what the tracker makes of them."""
    resource = _RESOURCES[data[0] % len(_RESOURCES)] if data else Resource.SERVICES
    tracker, splitter = Tracker(_NODE), LineSplitter()
    half = len(data) // 2
    for line in [*splitter.feed(data[1:half]), *splitter.feed(data[half:] + b"\n")]:
        try:
            event = _DECODERS[resource].line(line)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            continue
        if event.status is not None:
            failures.of_status(event.status)
            continue
        listing = Listing(_REDUCE)
        listing.add(event)
        for unreadable in listing.unreadable.values():
            assert not unreadable.why.startswith("unexpected error"), unreadable.why
        for key, each in listing.objects.items():
            tracker.apply(Changed(resource, key, each, 0.0))
        if event.type is decode.EventType.DELETED and event.key.name:
            tracker.apply(Deleted(resource, event.key))
    _use(tracker)


def _watch_line_seeds() -> Iterator[bytes]:
    for number, resource in enumerate(_RESOURCES):
        for line in _few(_watch_lines()[resource]):
            yield bytes([number]) + line + b"\n"
    yield b'\0{"type":"ERROR","object":{"kind":"Status","code":410,"reason":"Expired","message":"too old"}}'
    yield b'\0{"type":"BOOKMARK","object":{"metadata":{"resourceVersion":"7"}}}'


def _content(*pieces: bytes) -> tuple[bytes, int, bool] | None:
    chunks = ChunkedContent()
    try:
        return b"".join(map(chunks.feed, pieces)), chunks.missing, chunks.is_complete
    except ValueError as error:
        printable(str(error))
        return None


def chunked_stream(data: bytes) -> None:
    """Chunked content is the same in pieces as at once, or an error in both."""
    half = len(data) // 2
    assert _content(data[:half], data[half:]) == _content(data)


def _chunked_seeds() -> Iterator[bytes]:
    yield b"5\r\nabcde\r\n10;name=value\r\n0123456789abcdef\r\n0\r\n\r\n"
    yield b"1\r\na\r\n0\r\nName: value\r\n\r\n"


def list_page(data: bytes) -> None:
    """A page of a list, of the resource that the first byte names."""
    resource = _RESOURCES[data[0] % len(_RESOURCES)] if data else Resource.SERVICES
    try:
        page = _DECODERS[resource].page(data[1:])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        decode.decode_status(data[1:], 500)
        return
    tracker = Tracker(_NODE)
    listing = Listing(_REDUCE)
    for each in page.objects:
        listing.put(key_of(each), each)
    for unreadable in listing.unreadable.values():
        assert not unreadable.why.startswith("unexpected error"), unreadable.why
    for key, reduced in listing.objects.items():
        tracker.apply(Changed(resource, key, reduced, 0.0))
    _use(tracker)


def _page_seeds() -> Iterator[bytes]:
    lists = json.loads(gzip.decompress((RECORDINGS / "initial-lists.json.gz").read_bytes()))
    for number, resource in enumerate(_RESOURCES):
        content = lists.get(resource.value, {"metadata": {}, "items": []})
        for item in content["items"][:4]:
            yield bytes([number]) + json.dumps({**content, "items": [item]}).encode()
    yield b'\0{"kind":"Status","code":500,"message":"etcd"}'


def manifest(data: bytes) -> None:
    """A manifest in the folder, as services take it."""
    try:
        found = list(parse_manifest(data.decode()))
    except UnicodeDecodeError:
        return
    except ManifestError as error:
        printable(str(error))
        return
    for each in found:
        _REDUCE(each)


def _manifest_seeds() -> Iterator[bytes]:
    for path in sorted(_CASES.glob("*.yaml"))[::4]:
        yield path.read_bytes()
    yield b'{"kind": "List", "apiVersion": "v1", "items": [{"kind": "Service", "apiVersion": "v1"}]}'


def kubeconfig_file(data: bytes) -> None:
    """A kubeconfig, of a user or of kubeadm's cluster-info."""
    try:
        file = kubeconfig.parse(data)
    except (yaml.YAMLError, ValueError, msgspec.ValidationError):
        return
    kubeconfig.server_of(file)


_KUBECONFIG = b"""
apiVersion: v1
kind: Config
current-context: a@c
contexts: [{name: a@c, context: {cluster: c, user: a, namespace: x}}]
clusters: [{name: c, cluster: {server: "https://172.18.0.2:6443", certificate-authority-data: Zm9v,
  insecure-skip-tls-verify: false, tls-server-name: n, proxy-url: "http://p:1"}}]
users: [{name: a, user: {token: t, exec: {command: aws, args: [x], env: [{name: A, value: b}]}}},
  {name: b, user: {client-certificate-data: Zm9v, client-key: /x, username: u, password: p}}]
"""


def cni_result(data: bytes) -> None:
    """What a container runtime keeps of a pod's network."""
    try:
        found = pod_names._CACHED.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return
    list(pod_names._pods(found))


_CNI_RESULT = b"""{"kind": "cniCacheV1", "ifName": "eth0", "cniArgs": [["K8S_POD_NAMESPACE", "shop"],
  ["K8S_POD_NAME", "web-1"], ["x"]], "result": {"interfaces": [{"name": "eth0", "sandbox": "/run/netns/cni-1"}]}}"""


# -- configuration


def configuration(data: bytes) -> None:
    """kube-proxy's and our own, up to the values that the agent uses."""
    try:
        effective(parse_configuration(data, "config.yaml"))
    except ConfigurationError as error:
        printable(str(error))


def _configuration_seeds() -> Iterator[bytes]:
    yield (SAMPLES / "defaults.yaml").read_bytes()
    for mode in ("iptables", "nftables"):
        inner = json.loads((SAMPLES / f"configz-{mode}.json").read_text())
        for each in inner.values():
            document = {
                "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
                "kind": "KubeProxyConfiguration",
                **each,
            }
            yield json.dumps(document).encode()
    yield b"""apiVersion: ebpfproxy.io/v1alpha1
kind: EbpfProxyConfiguration
balancing: {algorithm: maglev, maglevTableSize: 251}
maps: {maxServices: 100, maxConntrack: 5000}
masqueradePorts: 61000-61999
serviceCIDRs: ["10.96.0.0/16"]
xdp: none
"""
    yield b"kind: EbpfProxyConfiguration\napiVersion: ebpfproxy.io/v1alpha1\n---\nkind: x\n---\n[1]\n"


def duration(data: bytes) -> None:
    """A duration as Go writes it."""
    try:
        parse_duration(data.decode(errors="replace"))
    except ValueError:
        return


# -- the kernel's answers


_REFUSED = OSError


def netlink(data: bytes) -> None:
    """A datagram of netlink, read as an answer to any request."""
    readers: list[Callable[[memoryview], object]] = [
        lambda payload: ctnetlink._read_entry(payload, translated=True, has_ipvs=True),
        routes._way,
        traffic_control._filter,
        rtnetlink._index_of,
        kernel_tables._link,
        kernel_tables._address,
        kernel_tables._head_of,
        lambda payload: kernel_tables._ways_of(2, codec.attributes(payload)),
        nfacct._name,
        lambda payload: sock_diag._connected(2, 6, bytes(payload), Path("/")),
    ]
    try:
        found = list(codec.messages(data))
    except _REFUSED as error:
        printable(str(error))
        return
    for message in found:
        _take(namespace_ids._id, message)
        _take(_error_of, message)
        for reader in readers:
            _take(reader, message.payload)


T = TypeVar("T")


def _take(read: Callable[[T], object], what: T) -> None:
    try:
        read(what)
    except _REFUSED as error:
        printable(str(error))


def _error_of(message: codec.Message) -> OSError | None:
    return message.error


def _netlink_seeds() -> Iterator[bytes]:
    end = codec.nested(
        1, codec.attribute(1, bytes([10, 0, 0, 1])), codec.attribute(2, bytes([10, 0, 0, 2]))
    ) + codec.nested(
        2,
        codec.attribute(1, b"\6"),
        codec.attribute(2, struct.pack("!H", 80)),
        codec.attribute(3, struct.pack("!H", 8080)),
    )
    flow = codec.nested(1, end) + codec.nested(2, end) + codec.attribute(3, struct.pack("!I", 32))
    yield codec.pack(1 << 8, 0, flow)
    yield codec.pack(1 << 8, 0, end)
    route = bytes([2, 24, 0, 0, 254, 3, 0, 1, 0, 0, 0, 0])
    route += codec.attribute(4, struct.pack("=I", 2)) + codec.attribute(7, bytes([10, 0, 0, 1]))
    yield codec.pack(24, 0, route)
    options = codec.nested(2, codec.attribute(7, b"ebpfproxy\0"))
    yield codec.pack(44, 0, struct.pack("=BxxxiIII", 0, 2, 1, 3, 0) + codec.attribute(1, b"bpf\0") + options)
    yield codec.pack(88, 0, bytes(4) + codec.attribute(1, struct.pack("=i", 5)))
    yield codec.pack(2, 0, struct.pack("=i", -2) + bytes(16))
    yield codec.pack(16, 0, bytes(16)) + codec.pack(20, 0, bytes(72)) + codec.pack(3, 0, struct.pack("=i", 0))


# -- what maps and rings hold

_RECORDS: tuple[tuple[int, Callable[[bytes], object]], ...] = (
    (decision_layout.DECISION.size, decision_layout.unpack_decision),
    (layout.NAME.size, layout.unpack_name),
    (layout.SERVICE4_KEY.size, layout.unpack_service_key),
    (layout.SERVICE6_KEY.size, layout.unpack_service_key),
    (layout.SERVICE.size, layout.unpack_service),
    (layout.BACKEND_SIZE, layout.unpack_backend),
    (layout.SOURCE_RANGE.size, layout.unpack_source_range),
    (flow_layout.FLOW.size, flow_layout.unpack_flow),
    (flow_layout.NAT.size, flow_layout.unpack_nat),
    (flow_layout.AFFINITY_KEY.size, flow_layout.unpack_affinity_key),
    (node_layout.DEVICE.size, node_layout.unpack_device),
    (node_layout.CIDR.size, node_layout.unpack_cidr),
    (socket_layout.REDIRECT.size, socket_layout.unpack_redirect),
)


def map_record(data: bytes) -> None:
    """A record of a map or of the ring, of the kind that the first byte names."""
    if not data:
        return
    size, read = _RECORDS[data[0] % len(_RECORDS)]
    try:
        read(data[1 : 1 + size].ljust(size, b"\0"))
    except (ValueError, IndexError):
        return


def _record_seeds() -> Iterator[bytes]:
    for number, (size, _) in enumerate(_RECORDS):
        yield bytes([number]) + bytes(size)
        yield bytes([number]) + bytes([6, 4] * (size // 2))
    key = ServicePortKey("shop", "web", "http", Protocol.TCP, Family.IPV4)
    yield b"\1" + layout.pack_name(key)
    yield b"\2" + layout.pack_service_key(bytes([10, 96, 0, 10]), 80, 6, 0)


TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target(chunked_stream, _chunked_seeds),
        Target(watch_line, _watch_line_seeds),
        Target(list_page, _page_seeds),
        Target(manifest, _manifest_seeds),
        Target(kubeconfig_file, lambda: [_KUBECONFIG]),
        Target(cni_result, lambda: [_CNI_RESULT]),
        Target(configuration, _configuration_seeds),
        Target(duration, lambda: [b"1h30m", b"0.5s", b"100us", b"-1ns", "3\u00b5s".encode()]),
        *tool_targets.TARGETS,
        *answer_targets.TARGETS,
        Target(netlink, _netlink_seeds),
        Target(map_record, _record_seeds),
    )
}
