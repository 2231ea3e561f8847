"""What the page is told, against a real agent, and against what the commands say of the same node."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlencode

import pytest

from ebpfproxy.datapath.kernel import bpf
from tests.e2e.outside_client import HeldConnection, OutsideClientCluster
from tests.e2e.two_node_cluster import BALANCER, NODE_PORT, SERVICE_IPS
from tests.lab import Lab, clients, manifests
from tests.lab.waiting import until
from tests.ui import asgi

pytestmark = pytest.mark.root

Json = dict[str, Any]


@pytest.fixture(scope="module")
def cluster() -> Iterator[OutsideClientCluster]:
    with Lab() as lab:
        made = OutsideClientCluster(lab)
        made.agent("--drift-check-seconds", "0").start()
        yield made


def answer(cluster: OutsideClientCluster, path: str, **query: str) -> asgi.Answer:
    node = cluster.a
    full = f"/api/{path}" + (f"?{urlencode(query)}" if query else "")
    return node.call(asgi.ask, node.bpf_root, node.cni_results, full)


def ask(cluster: OutsideClientCluster, path: str, **query: str) -> Any:
    found = answer(cluster, path, **query)
    assert found.status == 200, found.body
    assert found.headers["content-type"] == "application/json"
    return found.value


def said(cluster: OutsideClientCluster, *words: str) -> Any:
    """What a command says as JSON, whatever its exit code."""
    roots = ["--bpf-root", str(cluster.a.bpf_root)]
    return json.loads(cluster.a.run_command([*words, "-o", "json", *roots]).output)


def names(found: Json) -> list[str]:
    return [f"{each['namespace']}/{each['name']}" for each in found["services"]]


# -- Services


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ["shop/elsewhere", "shop/empty", "shop/second", "shop/web"]),
        ("WE", ["shop/web"]),
        ("shop/e", ["shop/elsewhere", "shop/empty"]),
        ("nothing", []),
        (SERVICE_IPS["v4"], ["shop/web"]),
        (SERVICE_IPS["v6"], ["shop/web"]),
        (f"[{SERVICE_IPS['v6']}]", ["shop/web"]),
        (BALANCER, ["shop/web"]),
        (str(NODE_PORT), ["shop/web"]),
        ("53", ["shop/elsewhere", "shop/empty", "shop/second", "shop/web"]),
        ("W1", ["shop/second", "shop/web"]),
        ("W2", ["shop/elsewhere", "shop/web"]),
        ("192.0.2.1", []),
        ("1" * 5000, []),
    ],
)
def test_services_are_found(cluster: OutsideClientCluster, text: str, expected: list[str]) -> None:
    """W1 and W2 stand for the addresses of these pods."""
    pods = {"W1": cluster.w1.address, "W2": cluster.w2.address6}
    found = ask(cluster, "services", q=pods.get(text, text))
    assert (names(found), found["more"]) == (expected, 0)


def test_refusals_are_counted_for_their_service(cluster: OutsideClientCluster) -> None:
    before = {each["name"]: each for each in ask(cluster, "services")["services"]}
    for _ in range(3):
        cluster.client.call(clients.connect_error, "10.96.0.20", 80)
    cluster.client.call(clients.ask_tcp, SERVICE_IPS["v4"], 80)
    after = {each["name"]: each for each in ask(cluster, "services")["services"]}
    assert after["empty"]["refused"] - before["empty"]["refused"] == 3
    assert after["web"]["chosen"] - before["web"]["chosen"] == 1
    assert "shop/empty" in names(ask(cluster, "services", rejected="1"))
    assert "shop/second" not in names(ask(cluster, "services", rejected="1"))
    assert ask(cluster, "services/shop/empty")["refused"] == after["empty"]["refused"]


def test_what_is_not_measured_says_how_it_would_be(cluster: OutsideClientCluster) -> None:
    found = ask(cluster, "services/shop/web")
    assert (found["connects"], found["traffic"]) == (None, None)
    assert [each.partition(": ")[2] for each in found["unmeasured"]] == [
        "measureConnections (--measure-connections)",
        "measureTraffic (--measure-traffic)",
    ]
    assert [each["connects"] for each in ask(cluster, "services")["services"]] == [None] * 4


def test_a_service_has_the_endpoints_that_explain_has(cluster: OutsideClientCluster) -> None:
    """Each frontend's endpoints, with their reasons, are those that `explain` shows for it."""
    for name in ("web", "elsewhere", "second"):
        for port in ask(cluster, f"services/shop/{name}")["ports"]:
            shown = [each["row"] for each in port["endpoints"]]
            assert shown
            for frontend in port["frontends"]:
                target, _, protocol = frontend["address"].rpartition("/")
                if frontend["type"] == "NodePort":
                    target = f"{cluster.a.address}:{NODE_PORT if port['port'] == 'http' else 30053}"
                    if port["family"] == "IPv6":
                        target = target.replace(cluster.a.address, f"[{cluster.a.address6}]")
                words = ["explain", "host", target, "--protocol", protocol]
                (explained,) = said(cluster, *words)["explanations"]
                assert explained["endpoints"] == shown
                assert explained["frontend"] == frontend["type"]
                assert explained["policy"] == port["policy"]


def test_frontends_are_those_of_the_maps(cluster: OutsideClientCluster) -> None:
    rows = said(cluster, "service", "get", "shop/web")
    expected = {(row["frontend"], row["type"], row["scope"], row["algorithm"]) for row in rows}
    found = {
        (each["address"], each["type"], scope, each["algorithm"])
        for port in ask(cluster, "services/shop/web")["ports"]
        for each in port["frontends"]
        for scope in each["scopes"]
    }
    assert found == expected


def test_an_endpoint_that_is_left_out_says_why(cluster: OutsideClientCluster) -> None:
    for port in ask(cluster, "services/shop/elsewhere")["ports"]:
        (endpoint,) = port["endpoints"]
        assert port["policy"] == "Local"
        assert not endpoint["row"]["used"]
        assert endpoint["row"]["why"] == "policy Local: it is on node-b"


def test_open_connections_of_an_endpoint_are_counted(cluster: OutsideClientCluster) -> None:
    ip = "10.96.8.1"
    cluster.add("held", ip, [cluster.endpoint_on_b()])
    until(lambda: cluster.client.call(clients.connect_error, ip, 80) == "connected")

    def opened() -> list[tuple[int, bool, str]]:
        (port,) = (each for each in ask(cluster, "services/shop/held")["ports"] if each["port"] == "http")
        return [(each["open"], each["row"]["used"], each["row"]["reason"]) for each in port["endpoints"]]

    until(lambda: opened() == [(0, True, "used")])
    held = HeldConnection(cluster.client, ip, 80)
    assert opened() == [(1, True, "used")]
    # A backend that has left the choice keeps what is open.
    cluster.add("held", ip, [cluster.endpoint_on_b(ready=False, terminating=True), cluster.endpoint_on_a()])
    until(lambda: sorted(opened()) == [(0, True, "used"), (1, False, "terminating")])
    assert held.ask() == "alive"
    cluster.remove("held")


def test_services_without_frontends_are_explained_by_the_agent(cluster: OutsideClientCluster) -> None:
    cluster.add("head", "None", [cluster.endpoint_on_a()])
    until(lambda: answer(cluster, "services/shop/head").status == 200)
    found = ask(cluster, "services/shop/head")
    assert "headless" in found["unserved"]
    assert found["ports"] == []
    cluster.remove("head")


def test_a_frontend_that_another_service_has_is_named(cluster: OutsideClientCluster) -> None:
    cluster.add("taker", "10.96.0.40", [cluster.endpoint_on_a()])
    until(lambda: answer(cluster, "services/shop/taker").status == 200)
    found = ask(cluster, "services/shop/taker")
    notes = [note for port in found["ports"] for note in port["notes"]]
    assert "10.96.0.40:80/TCP is asked for, but belongs to shop/second" in notes
    cluster.remove("taker")


@pytest.mark.parametrize(
    "path", ["shop/nothing", "shop/%3Cb%3E", "shop/a%20b", "x/%0d%0a", "shop/w%3Fx", "ü/ü"]
)
def test_unknown_services_are_not_found(cluster: OutsideClientCluster, path: str) -> None:
    found = answer(cluster, f"services/{path}")
    assert found.status == 404
    assert found.value["error"].startswith("no Service")


# -- the others


def test_status_is_what_the_command_says(cluster: OutsideClientCluster) -> None:
    def lasting(status: dict[str, Any]) -> dict[str, Any]:
        status["agent"].pop("written")
        status["agent"]["watches"] = [
            (watch["resource"], watch["state"]) for watch in status["agent"]["watches"]
        ]
        return status

    while True:
        before, found, after = said(cluster, "status"), ask(cluster, "status"), said(cluster, "status")
        # Flows end meanwhile, and their entries are counted.
        if lasting(before) == lasting(after):
            break
    assert lasting(found["status"]) == after
    assert found["status"]["healthy"]
    assert ["health", "healthy"] in found["facts"]


def test_explain_is_what_the_command_says(cluster: OutsideClientCluster) -> None:
    for source, target, protocol in (
        ("shop/client", "web:http", ""),
        ("host", "10.96.0.10:53", "UDP"),
        (cluster.outside.address, "shop/web:http", ""),
        ("host", "shop/elsewhere:http", "TCP"),
        ("host", "shop/nothing", ""),
    ):
        found = ask(cluster, "explain", **{"from": source, "to": target, "protocol": protocol})
        words = ["explain", source, target, "--cni-results", str(cluster.a.cni_results)]
        assert found["report"] == said(cluster, *words, *(["--protocol", protocol] if protocol else []))
        assert len(found["told"]) == len(found["report"]["explanations"])
    found = ask(cluster, "explain", **{"from": "host", "to": "shop/elsewhere:http"})
    assert "DOES NOT WORK: EHOSTUNREACH" in found["told"][0]["headline"]


@pytest.mark.parametrize(
    ("query", "why"),
    [
        ({"from": "nobody", "to": "shop/web:http"}, "no pod 'nobody' on this node"),
        ({"from": "host", "to": "shop/web"}, "several ports"),
        ({"from": "host", "to": "10.96.0.10"}, "needs a port"),
        ({"from": "host", "to": f"10.96.0.10:{'1' * 5000}"}, "is no port of an address"),
        ({"from": "host", "to": "10.96.0.10:80", "protocol": "ICMP"}, "'ICMP' is no protocol"),
        ({"from": "host"}, "is neither a Service"),
        ({}, "no pod ''"),
    ],
)
def test_what_cannot_be_explained_is_said(
    cluster: OutsideClientCluster, query: dict[str, str], why: str
) -> None:
    found = answer(cluster, "explain", **query)
    assert found.status == 400
    assert why in found.value["error"]


def test_clients_are_the_pods_of_the_node(cluster: OutsideClientCluster) -> None:
    assert ask(cluster, "clients") == ["host", "shop/client", "shop/w1"]


def test_check_finds_what_somebody_has_changed_and_leaves_it(cluster: OutsideClientCluster) -> None:
    def wrong() -> list[tuple[str, str, str]]:
        findings = ask(cluster, "check")["findings"]
        return [(each["where"], each["kind"], each["what"]) for each in findings if not each["warning"]]

    before = wrong()
    services = bpf.get_pinned(next(cluster.a.bpf_root.glob("ebpfproxy/v*/maps/services4")))
    key = bytes([10, 96, 0, 40, 0, 80, 6, 0])
    assert bpf.map_delete(services, key)
    found = wrong()
    assert [each for each in found if each not in before] == [
        ("services4", "missing", "10.96.0.40:80/TCP (internal)")
    ]
    assert wrong() == found
    cluster.a.cli("check", "--repair", check=False)
    assert wrong() == before
    assert ask(cluster, "check")["earlier"][0]["finding"]["what"] == "10.96.0.40:80/TCP (internal)"


def test_names_of_others_are_told_as_they_are(cluster: OutsideClientCluster) -> None:
    """A zone is anybody's text: the page alone makes it harmless."""
    zone = "<img src=x onerror=alert(1)>"
    endpoint = {**cluster.endpoint_on_a(), "zone": zone}
    manifests.write(
        cluster.manifests / "odd.yaml",
        manifests.service("odd", clusterIPs=["10.96.8.2"]),
        manifests.slice_of("odd", [endpoint]),
    )
    until(lambda: answer(cluster, "services/shop/odd").status == 200)
    until(lambda: ask(cluster, "services/shop/odd")["ports"][0]["endpoints"])
    (port,) = ask(cluster, "services/shop/odd")["ports"]
    assert port["endpoints"][0]["row"]["zone"] == zone
    cluster.remove("odd")


def test_without_an_agent_the_maps_are_shown_and_it_is_said(cluster: OutsideClientCluster) -> None:
    agent = cluster.lab.agents[-1]
    agent.stop()
    found = ask(cluster, "services/shop/web")
    assert "no agent runs" in found["without_agent"]
    whys = {each["row"]["why"] for port in found["ports"] for each in port["endpoints"]}
    assert whys == {"in the maps"}
    assert not ask(cluster, "status")["status"]["healthy"]
    assert ask(cluster, "check")["agent"] == "not running"
    assert (
        "no agent runs"
        in ask(cluster, "explain", **{"from": "host", "to": "shop/web:http"})["report"]["without_agent"]
    )
    assert answer(cluster, "services/shop/nothing").status == 404
    agent.start()
    until(lambda: not ask(cluster, "services/shop/web")["without_agent"])


def test_in_another_network_namespace_explain_says_so(cluster: OutsideClientCluster) -> None:
    found = cluster.client.call(
        asgi.ask, cluster.a.bpf_root, cluster.a.cni_results, "/api/explain?from=host&to=10.96.0.10:80"
    )
    assert found.status == 503
    assert "network namespace" in found.value["error"]
    # The maps are the same from everywhere.
    found = cluster.client.call(asgi.ask, cluster.a.bpf_root, cluster.a.cni_results, "/api/services")
    assert len(found.value["services"]) == 4
