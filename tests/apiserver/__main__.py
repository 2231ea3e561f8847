"""``python -m tests.apiserver``: the stand-in as a process of its own, full of Services, for benchmarks.

``POST /control/churn?rate=1000&seconds=10`` changes one endpoint of another Service ``rate`` times a
second, with the trigger-time annotation set to now; the answer comes when it is done.
"""

from __future__ import annotations

import argparse
import random
import time
from datetime import UTC, datetime
from typing import Any

from tests.apiserver import ApiServer, Store, objects


def fill(store: Store, services: int, endpoints: int, node: str) -> None:
    for i in range(services):
        name = f"load-{i}"
        store.put("services", objects.service(name, objects.service_address(i)))
        store.put("endpointslices", objects.endpoint_slice(name, _endpoints(i, endpoints)))
    store.put("nodes", objects.node(node))


def _endpoints(i: int, count: int) -> list[dict[str, Any]]:
    return [objects.endpoint(objects.pod_address(i * count + k), f"node-{k}") for k in range(count)]


def add_bench_service(store: Store, address: str, backend: str) -> None:
    """Ports of tests.bench: the load generator's for both protocols, and iperf3's."""
    ports = [
        {"name": f"{protocol.lower()}-{number}", "protocol": protocol, "port": number}
        for protocol, number in (("TCP", 7777), ("UDP", 7777), ("TCP", 5201))
    ]
    store.put("services", objects.service("bench", address, ports=ports))
    piece = objects.endpoint_slice("bench", [objects.endpoint(backend, "node-a")])
    store.put("endpointslices", {**piece, "ports": ports})


def churn(store: Store, services: int, endpoints: int, rate: float, seconds: float) -> dict[str, float]:
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
    return {"changes": total, "seconds": time.monotonic() - began}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--services", type=int, default=10)
    parser.add_argument("--endpoints", type=int, default=10)
    parser.add_argument("--node", default="node-a")
    parser.add_argument("--bench-service", metavar="IP=BACKEND", help="one more, on the load's ports")
    parser.add_argument("--pages", action="store_true", help="no streaming lists")
    options = parser.parse_args()
    store = Store()
    fill(store, options.services, options.endpoints, options.node)
    if options.bench_service:
        add_bench_service(store, *options.bench_service.split("="))
    server = ApiServer(store, host=options.host, port=options.port, streaming_list=not options.pages)

    def control(path: str, query: dict[str, list[str]]) -> dict[str, float]:
        assert path == "/control/churn"
        rate, seconds = float(query["rate"][0]), float(query["seconds"][0])
        return churn(store, options.services, options.endpoints, rate, seconds)

    server.control = control
    with server:
        print(server.url, flush=True)
        while True:
            time.sleep(3600)


if __name__ == "__main__":
    main()
