"""The agent and kube-proxy on a real API server, one after the other, with the same Services and changes.

Needs ``KUBE_BIN`` (tests/cluster). One node with a kubeadm control plane; nothing serves the endpoints, since nothing is
sent to them.
"""

from __future__ import annotations

import base64
import http.client
import json
import math
import os
import re
import shutil
import ssl
import subprocess
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from tests.cluster import binaries, images
from tests.cluster.cluster import Cluster, own_mounts
from tests.cluster.node_machine import children
from tests.lab.spaces import Space
from tests.lab.waiting import until
from tools.bench.results import Result

SERVICES, ENDPOINTS = 10_000, 10
CHANGES_A_SECOND, CHURN_SECONDS = 100, 20
_WRITERS = 6
_NAMESPACE = "load"
_TICK = os.sysconf("SC_CLK_TCK")
_TRIGGER = "endpoints.kubernetes.io/last-change-trigger-time"
_SLICES = f"/apis/discovery.k8s.io/v1/namespaces/{_NAMESPACE}/endpointslices"
_HEADERS = {"POST": "application/json", "PATCH": "application/merge-patch+json"}

_KUBE_PROXY = """
apiVersion: kubeproxy.config.k8s.io/v1alpha1
kind: KubeProxyConfiguration
mode: nftables
hostnameOverride: node-1
clientConnection: {kubeconfig: /etc/kubernetes/admin.conf}
conntrack: {maxPerCore: 0}
"""


class Api:
    """Requests of an administrator, by one connection for each thread."""

    def __init__(self, kubeconfig: Path) -> None:
        content = yaml.safe_load(kubeconfig.read_text())
        self._host = content["clusters"][0]["cluster"]["server"].removeprefix("https://")
        user = content["users"][0]["user"]
        self._context = ssl._create_unverified_context()
        with tempfile.NamedTemporaryFile() as file:
            for key in ("client-certificate-data", "client-key-data"):
                file.write(base64.b64decode(user[key]))
            file.flush()
            self._context.load_cert_chain(file.name)

    def send(self, requests: Iterator[tuple[str, str, dict[str, Any]]], writers: int = _WRITERS) -> None:
        """Sends (method, path, body) of an iterator, in parallel. Raises RuntimeError for an answer above 299."""
        lock, errors = threading.Lock(), list[str]()

        def write() -> None:
            connection = http.client.HTTPSConnection(self._host, context=self._context, timeout=60)
            while not errors:
                with lock:
                    request = next(requests, None)
                if request is None:
                    return
                method, path, body = request
                connection.request(method, path, json.dumps(body), {"Content-Type": _HEADERS[method]})
                answer = connection.getresponse()
                text = answer.read()
                if answer.status > 299:
                    errors.append(f"{method} {path}: {answer.status} {text[:300]!r}")

        threads = [threading.Thread(target=write) for _ in range(writers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise RuntimeError(errors[0])


def _objects() -> Iterator[tuple[str, str, dict[str, Any]]]:
    yield "POST", "/api/v1/namespaces", {"metadata": {"name": _NAMESPACE}}
    for number in range(SERVICES):
        name = f"svc-{number}"
        ports = [{"name": "http", "port": 80, "targetPort": 8080}]
        yield (
            "POST",
            f"/api/v1/namespaces/{_NAMESPACE}/services",
            {"metadata": {"name": name, "labels": {"app": name}}, "spec": {"ports": ports}},
        )
        labels = {"kubernetes.io/service-name": name, "endpointslice.kubernetes.io/managed-by": "bench"}
        body = {
            "metadata": {"name": f"{name}-a", "labels": labels},
            "addressType": "IPv4",
            "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}],
            "endpoints": [_endpoint(number * ENDPOINTS + each) for each in range(ENDPOINTS)],
        }
        yield "POST", _SLICES, body


def _endpoint(number: int) -> dict[str, Any]:
    address = f"10.{64 + (number >> 16)}.{number >> 8 & 255}.{number & 255}"
    return {"addresses": [address], "conditions": {"ready": True}, "nodeName": "node-2"}


def _changes() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """At the rate that is asked for: another Service's first endpoint becomes another address each time."""
    began = time.monotonic()
    for number in range(CHANGES_A_SECOND * CHURN_SECONDS):
        time.sleep(max(0.0, began + number / CHANGES_A_SECOND - time.monotonic()))
        service = number * 7 % SERVICES
        moved = _endpoint(SERVICES * ENDPOINTS + number)
        rest = [_endpoint(service * ENDPOINTS + each) for each in range(1, ENDPOINTS)]
        stamp = datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
        body = {"metadata": {"annotations": {_TRIGGER: stamp}}, "endpoints": [moved, *rest]}
        yield "PATCH", f"{_SLICES}/svc-{service}-a", body


def fill(kubeconfig: Path) -> None:
    everything = _objects()
    api = Api(kubeconfig)
    api.send(iter([next(everything)]), 1)
    api.send(everything)


def change(kubeconfig: Path) -> None:
    Api(kubeconfig).send(_changes())


def wait_healthy(timeout: float) -> float:
    """The time (``time.monotonic()``) at which ``/healthz`` became good."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        with suppress(OSError), urllib.request.urlopen("http://127.0.0.1:10256/healthz", timeout=5):
            return time.monotonic()
        time.sleep(0.02)
    raise TimeoutError(f"/healthz is not good after {timeout} s")


def histogram() -> dict[float, float]:
    """Cumulative counts of ``kubeproxy_network_programming_duration_seconds``, by bound in seconds."""
    with urllib.request.urlopen("http://127.0.0.1:10249/metrics", timeout=60) as answer:
        text = answer.read().decode()
    pattern = r'^kubeproxy_network_programming_duration_seconds_bucket\{(?:.*,)?le="([^"]+)".*?\} (\S+)$'
    found: dict[float, float] = {}
    for bound, count in re.findall(pattern, text, re.M):
        found[float(bound)] = found.get(float(bound), 0.0) + float(count)
    return found


def _quantile(counts: dict[float, float], part: float) -> float:
    """Infinite where nothing was counted."""
    total = counts.get(math.inf, 0)
    return next((bound for bound in sorted(counts) if total and counts[bound] >= part * total), math.inf)


def measure(cluster: Cluster, name: str, command: list[str], timeout: float) -> list[Result]:
    """Starts a proxy on the first node, changes endpoints, ends it."""
    node = cluster.nodes[0]
    space = Space(cluster.network.netns(1), None)
    began = time.monotonic()
    process = node.popen(command, log=cluster.folder / f"{name}.log")
    healthy = space.call(wait_healthy, timeout, timeout=timeout + 10)
    (own,) = children(process.pid)
    cpu = _cpu_seconds(own)
    before = space.call(histogram)
    cluster.outside.call(change, cluster.kubeconfig, timeout=CHURN_SECONDS * 10)
    wanted = CHANGES_A_SECOND * CHURN_SECONDS
    counts: dict[float, float] = {}

    def all_seen() -> bool:
        after = space.call(histogram)
        counts.update({bound: after[bound] - before.get(bound, 0.0) for bound in after})
        # There is no histogram before the first change.
        return counts.get(math.inf, 0) >= wanted

    with suppress(AssertionError):
        until(all_seen, f"{name} does not catch up", 120, every=0.5)
    peak = int(re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{own}/status").read_text())[1]) / 1000  # type: ignore[index]
    total = _cpu_seconds(own)
    subprocess.run(["kill", str(own)], check=True)
    process.wait(60)
    what = f"{counts.get(math.inf, 0):.0f} of {wanted} changes, at {CHANGES_A_SECOND}/s"
    return [
        Result(
            f"{name}: exec to /healthz", healthy - began, "s", detail=f"{SERVICES} Services x {ENDPOINTS}"
        ),
        Result(f"{name}: CPU of the start", cpu, "s"),
        Result(f"{name}: peak memory", peak, "MB", detail="VmHWM, 1 MB = 1000 kB"),
        Result(f"{name}: CPU of the changes", total - cpu, "s", detail=what),
        Result(
            f"{name}: change to rules, p50", _quantile(counts, 0.5), "s", detail="upper bound of the bucket"
        ),
        Result(
            f"{name}: change to rules, p99", _quantile(counts, 0.99), "s", detail="upper bound of the bucket"
        ),
    ]


def _cpu_seconds(pid: int) -> float:
    """Of the process and of its children that ended."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / _TICK


def run() -> list[Result]:
    """Nothing where KUBE_BIN names no binaries."""
    lacking = binaries.missing()
    if lacking:
        print(f"a real API server: not measured, KUBE_BIN has no {', '.join(lacking)}")
        return []
    own_mounts()
    folder = images.KEPT / f"bench-{os.getpid()}"
    try:
        with Cluster(folder, count=1) as cluster:
            folder.mkdir(parents=True)
            cluster.boot()
            cluster.init(proxy=False)
            cluster.outside.call(fill, cluster.kubeconfig, timeout=900)
            agent = ["env", "-C", "/opt/checkout", cluster.python, "-m", "ebpfproxy", "run"]
            agent += ["--kubeconfig=/etc/kubernetes/admin.conf", "--hostname-override=node-1"]
            results = measure(cluster, "ebpfproxy", agent, 120)
            if binaries.has("kube-proxy"):
                cluster.nodes[0].run([cluster.python, "-m", "ebpfproxy", "cleanup"])
                cluster.nodes[0].write("/etc/kubernetes/kube-proxy.yaml", _KUBE_PROXY)
                proxy = ["/opt/kube/kube-proxy", "--config=/etc/kubernetes/kube-proxy.yaml"]
                results += measure(cluster, "kube-proxy (nftables)", proxy, 600)
            return results
    finally:
        shutil.rmtree(folder, ignore_errors=True)
