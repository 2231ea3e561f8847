"""Fills a stand-in with many Services, changes at a given rate, or a recording of a real cluster."""

from __future__ import annotations

import gzip
import json
import random
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tests.apiserver import objects
from tests.apiserver.store import Store

#: The history that is left while changes are made, as a server forgets it after some minutes: 2 kB for each version.
_HISTORY = 20_000


def fill(store: Store, services: int, endpoints: int, node: str) -> None:
    for i in range(services):
        name = f"load-{i}"
        store.put("services", objects.service(name, objects.service_address(i)))
        store.put("endpointslices", objects.endpoint_slice(name, _endpoints(i, endpoints)))
    store.put("nodes", objects.node(node))


def _endpoints(i: int, count: int) -> list[dict[str, Any]]:
    return [objects.endpoint(objects.pod_address(i * count + k), f"node-{k}") for k in range(count)]


def add_bench_service(store: Store, address: str, backend: str) -> None:
    """Adds a Service per family with the ports of tools.bench: the load generator's (both protocols) and iperf3's."""
    ports = [
        {"name": f"{protocol.lower()}-{number}", "protocol": protocol, "port": number}
        for protocol, number in (("TCP", 7777), ("UDP", 7777), ("TCP", 5201))
    ]
    name, family = ("bench6", "IPv6") if ":" in address else ("bench", "IPv4")
    store.put("services", objects.service(name, address, ports=ports, ipFamilies=[family]))
    piece = objects.endpoint_slice(name, [objects.endpoint(backend, "node-a")])
    store.put("endpointslices", {**piece, "ports": ports})


def add_bench_node_port(store: Store, node_port: int, backend: str, number: int) -> None:
    """Adds a NodePort for both protocols of the load generator and the next one for iperf3, in the backend's family."""
    ports = [
        {"name": f"{protocol.lower()}-{target}", "protocol": protocol, "port": target, "nodePort": outside}
        for protocol, target, outside in (
            ("TCP", 7777, node_port),
            ("UDP", 7777, node_port),
            ("TCP", 5201, node_port + 1),
        )
    ]
    name = f"bench-{number}"
    family, address = (
        ("IPv6", f"fd00:10:96:251::{number}") if ":" in backend else ("IPv4", f"10.96.251.{number}")
    )
    service = objects.service(name, address, ports=ports, ipFamilies=[family], type="NodePort")
    store.put("services", service)
    piece = objects.endpoint_slice(name, [objects.endpoint(backend, "node-a")])
    inside = [{"name": p["name"], "protocol": p["protocol"], "port": p["port"]} for p in ports]
    store.put("endpointslices", {**piece, "ports": inside})


def churn(store: Store, services: int, endpoints: int, rate: float, seconds: float) -> dict[str, float]:
    """One endpoint of a random load Service, ``rate`` times a second, its trigger time now.

    Returns the ``changes`` made and the ``seconds`` they took, more than asked for where this is too slow.
    """
    order = random.Random(1)
    began = time.monotonic()
    total = int(rate * seconds)
    for n in range(total):
        wait = began + n / rate - time.monotonic()
        if wait > 0:
            time.sleep(wait)
        i = order.randrange(services)
        found = _endpoints(i, endpoints)
        found[order.randrange(endpoints)] = objects.endpoint(
            objects.pod_address(5_000_000 + order.randrange(1_000_000)), "node-1"
        )
        now = datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
        store.put("endpointslices", objects.endpoint_slice(f"load-{i}", found, trigger=now))
        if n % _HISTORY == _HISTORY - 1:
            store.compact(_HISTORY)
    return {"changes": total, "seconds": time.monotonic() - began}


def fill_from_recordings(store: Store, folder: Path) -> None:
    """Adds the objects at the start of the recording, with resourceVersions of the store."""
    content = json.loads(gzip.decompress((folder / "initial-lists.json.gz").read_bytes()))
    for resource, found in content.items():
        for item in found["items"]:
            store.put(resource, item)


def replay(
    store: Store, folder: Path, speed: float = 0.0, *, between: Callable[[], None] | None = None
) -> int:
    """Replays the recorded changes at once or at ``speed`` times their rate; returns their number.

    ``between`` is called after every 50 of them.
    """
    began, changes = time.monotonic(), 0
    for line in gzip.decompress((folder / "watch-events.jsonl.gz").read_bytes()).splitlines():
        entry = json.loads(line)
        event = json.loads(entry["line"])
        if event["type"] == "BOOKMARK":
            continue
        if speed:
            time.sleep(max(0.0, began + entry["t"] / speed - time.monotonic()))
        if event["type"] == "DELETED":
            meta = event["object"]["metadata"]
            store.delete(entry["resource"], meta.get("namespace", ""), meta["name"])
        else:
            store.put(entry["resource"], event["object"])
        changes += 1
        if between is not None and changes % 50 == 0:
            between()
    return changes
