"""Explanations against real connections in the lab: from a pod, the host and outside, in both families."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.e2e.outside_client import HeldConnection, OutsideClientCluster
from tests.e2e.two_node_cluster import SERVICE_IPS
from tests.lab import Lab, Pod, clients
from tests.lab.command import Done
from tests.lab.spaces import Space
from tests.lab.waiting import READY_SECONDS, until

pytestmark = pytest.mark.root

Json = dict[str, Any]
BALANCERS = ["203.0.113.51", "2001:db8:113::51"]


@pytest.fixture(scope="module")
def cluster() -> Iterator[OutsideClientCluster]:
    with Lab() as lab:
        made = OutsideClientCluster(lab)
        made.outside.route("2001:db8:113::/64", made.a)
        made.agent("--stale-tcp-seconds", "0.5", "--service-cidr", "10.96.0.0/16,fd00:10:96::/112").start()
        yield made


def run(cluster: OutsideClientCluster, source: str, target: str, *options: str) -> Done:
    node = cluster.a
    roots = ["--bpf-root", str(node.bpf_root), "--cni-results", str(node.cni_results)]
    return node.run_command(["explain", *roots, source, target, *options])


def ask(cluster: OutsideClientCluster, source: str, target: str, *options: str) -> Json:
    """The report; its exit code says whether it works."""
    done = run(cluster, source, target, *options, "-o", "json")
    assert done.errors == ""
    report: Json = json.loads(done.output)
    assert done.code == (0 if report["works"] else 1)
    return report


def explained(cluster: OutsideClientCluster, source: str, target: str, *options: str) -> list[Json]:
    report = ask(cluster, source, target, *options)
    assert report["without_agent"] == ""
    found: list[Json] = report["explanations"]
    assert found, report["why"]
    return found


def split(target: str) -> tuple[str, int, str]:
    endpoint, _, protocol = target.rpartition("/")
    host, _, port = endpoint.rpartition(":")
    return host.strip("[]"), int(port), protocol


def datagram(host: str, port: int, timeout: float) -> str:
    """Sends from an unconnected socket; the name of the error, ``connected`` or ``TimeoutError`` as TCP's."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(timeout)
        # Only a socket with this option gets the errors of its datagrams when it is not connected.
        sock.setsockopt(*((socket.IPPROTO_IPV6, 25) if ":" in host else (socket.IPPROTO_IP, 11)), 1)
        try:
            sock.sendto(b"?", (host, port))
            sock.recv(4096)
        except TimeoutError:
            return "TimeoutError"
        except OSError as error:
            return clients._name(error)
    return "connected"


def connect(space: Space, answer: Json, expected: str) -> str:
    """Only where no answer is expected, little time is enough."""
    host, port, protocol = split(answer["target"])
    patience = 0.5 if expected == "TimeoutError" else READY_SECONDS / 20
    if protocol == "UDP":
        return space.call(datagram, host, port, patience)
    return space.call(clients.connect_error, host, port, patience)


def reached(cluster: OutsideClientCluster, space: Space, answer: Json) -> set[str]:
    """The addresses of the pods that answer."""
    host, port, protocol = split(answer["target"])
    spread: Callable[..., Any] = clients.spread_udp if protocol == "UDP" else clients.spread_tcp
    pods = {pod.name: pod for pod in (cluster.w1, cluster.w2)}
    names = space.call(spread, host, port, clients.ENOUGH)
    return {pods[name].address6 if ":" in host else pods[name].address for name in names}


def agrees(cluster: OutsideClientCluster, space: Space, answer: Json) -> None:
    error: str = {"": "connected", "timeout": "TimeoutError"}.get(answer["error"]) or answer["error"]
    assert connect(space, answer, error) == error, answer
    if answer["outcome"] == "translated":
        used = {
            each["address"].rpartition(":")[0].strip("[]") for each in answer["endpoints"] if each["used"]
        }
        assert reached(cluster, space, answer) == used, answer


@pytest.mark.parametrize("protocol", ["http", "udp"])
@pytest.mark.parametrize("service", ["web", "empty", "elsewhere"])
@pytest.mark.parametrize("place", ["pod", "host"])
def test_cluster_ips_do_what_was_explained(
    cluster: OutsideClientCluster, place: str, service: str, protocol: str
) -> None:
    space, source = (cluster.client, "shop/client") if place == "pod" else (cluster.a, "host")
    answers = explained(cluster, source, f"shop/{service}:{protocol}")
    assert [":" in split(each["target"])[0] for each in answers] == [False, True]
    for answer in answers:
        assert (answer["place"], answer["hook"]) == (place, "socket")
        assert answer["works"] is (service == "web")
        agrees(cluster, space, answer)


@pytest.mark.parametrize("protocol", ["http", "udp"])
def test_outside_clients_get_what_was_explained(cluster: OutsideClientCluster, protocol: str) -> None:
    for source in (cluster.outside.address, cluster.outside.address6):
        answers = explained(cluster, source, f"shop/web:{protocol}")
        kinds = {answer["frontend"] for answer in answers}
        assert kinds == ({"NodePort"} if ":" in source else {"NodePort", "LoadBalancer", "ExternalIP"})
        for answer in answers:
            assert (answer["place"], answer["hook"], answer["scope"]) == ("outside", "tc-ingress", "external")
            agrees(cluster, cluster.outside, answer)


def masked_as(cluster: OutsideClientCluster, space: Space, answer: Json) -> set[str]:
    host, port, _ = split(answer["target"])
    return {space.call(clients.ask_tcp, host, port)["peer"] for _ in range(20)}


def test_backends_see_the_addresses_that_were_explained(cluster: OutsideClientCluster) -> None:
    cluster.add_load_balancer(
        "kept",
        "10.96.2.1",
        BALANCERS[0],
        [cluster.endpoint_on_a(), cluster.endpoint_on_b()],
        externalTrafficPolicy="Local",
    )
    until(lambda: ask(cluster, cluster.outside.address, f"{BALANCERS[0]}:80")["explanations"][0]["service"])
    for frontend, applies in ((f"{cluster.a.address}:30080", True), (f"{BALANCERS[0]}:80", False)):
        (answer,) = explained(cluster, cluster.outside.address, frontend)
        assert answer["masquerade"]["applies"] is applies
        expected = set(answer["masquerade"]["addresses"]) if applies else {cluster.outside.address}
        assert masked_as(cluster, cluster.outside, answer) == expected
        agrees(cluster, cluster.outside, answer)
    cluster.remove("kept")


def test_policy_local_without_a_local_endpoint_drops_and_without_any_rejects(
    cluster: OutsideClientCluster,
) -> None:
    cluster.add_load_balancer(
        "far", "10.96.2.2", "203.0.113.52", [cluster.endpoint_on_b()], externalTrafficPolicy="Local"
    )
    cluster.add_load_balancer("none", "10.96.2.3", "203.0.113.53", [], externalTrafficPolicy="Local")
    until(lambda: ask(cluster, "host", "203.0.113.53:80")["explanations"][0]["service"])
    until(lambda: ask(cluster, "host", "203.0.113.52:80")["explanations"][0]["works"])
    (far,) = explained(cluster, cluster.outside.address, "203.0.113.52:80")
    assert (far["outcome"], far["policy"], far["policy_from"]) == (
        "dropped",
        "Local",
        "externalTrafficPolicy",
    )
    assert [(each["reason"], each["used"]) for each in far["endpoints"]] == [("other-node", False)]
    agrees(cluster, cluster.outside, far)
    (none,) = explained(cluster, cluster.outside.address, "203.0.113.53:80")
    assert (none["outcome"], none["endpoints"]) == ("refused", [])
    agrees(cluster, cluster.outside, none)
    # A client in the cluster uses all endpoints.
    (inside,) = explained(cluster, "shop/client", "203.0.113.52:80")
    agrees(cluster, cluster.client, inside)
    cluster.remove("far")
    cluster.remove("none")


def test_source_ranges_allow_and_deny_as_explained(cluster: OutsideClientCluster) -> None:
    cluster.add_load_balancer(
        "ranged",
        "10.96.2.4",
        "203.0.113.54",
        [cluster.endpoint_on_b()],
        loadBalancerSourceRanges=[f"{cluster.outside.address}/32"],
    )
    until(lambda: ask(cluster, cluster.outside.address, "203.0.113.54:80")["explanations"][0]["service"])
    for source, space, ranges, hook in (
        (cluster.outside.address, cluster.outside, "allowed", "tc-ingress"),
        ("shop/client", cluster.client, "denied", "tc-ingress"),
        ("host", cluster.a, "denied", "tc-egress"),
    ):
        (answer,) = explained(cluster, source, "203.0.113.54:80")
        assert (answer["source_ranges"], answer["hook"]) == (ranges, hook)
        assert answer["works"] is (ranges == "allowed")
        agrees(cluster, space, answer)
    cluster.add_load_balancer(
        "ranged",
        "10.96.2.4",
        "203.0.113.54",
        [cluster.endpoint_on_b()],
        loadBalancerSourceRanges=[f"{cluster.a.address}/32"],
    )
    until(lambda: ask(cluster, "host", "203.0.113.54:80")["works"])
    (answer,) = explained(cluster, "host", "203.0.113.54:80")
    assert (answer["source_ranges"], answer["hook"]) == ("allowed", "socket")
    agrees(cluster, cluster.a, answer)
    cluster.remove("ranged")


def test_addresses_that_no_service_has(cluster: OutsideClientCluster) -> None:
    for target, outcome, error in (
        ("10.96.0.10:81", "refused", "ECONNREFUSED"),
        ("[fd00:10:96::10]:81", "refused", "ECONNREFUSED"),
        ("10.96.200.200:80", "dropped", "EHOSTUNREACH"),
        (f"{cluster.w2.address}:8080", "untouched", ""),
    ):
        for source, space in (("shop/client", cluster.client), ("host", cluster.a)):
            (answer,) = explained(cluster, source, target)
            assert (answer["outcome"], answer["error"], answer["service"]) == (outcome, error, "")
            agrees(cluster, space, answer)
    # A packet to such an address is dropped where it would leave the node.
    cluster.outside.route("10.96.200.200", cluster.a)
    (answer,) = explained(cluster, cluster.outside.address, "10.96.200.200:80")
    assert (answer["outcome"], answer["hook"], answer["error"]) == ("dropped", "tc-egress", "timeout")
    agrees(cluster, cluster.outside, answer)


def test_node_ports_at_this_nodes_addresses_are_translated_at_the_socket(
    cluster: OutsideClientCluster,
) -> None:
    targets = ("172.18.0.1:30080", "[fd00:172:18::1]:30080", "10.244.1.1:30080")
    for source, space in (("shop/client", cluster.client), ("host", cluster.a)):
        for target in targets:
            (answer,) = explained(cluster, source, target)
            assert (answer["frontend"], answer["hook"]) == ("NodePort", "socket")
            agrees(cluster, space, answer)
        (answer,) = explained(cluster, source, "172.18.0.1:30053", "--protocol", "udp")
        agrees(cluster, space, answer)
    # A NodePort of another node is that node's.
    (answer,) = explained(cluster, "shop/client", f"{cluster.b.address}:30080")
    assert answer["outcome"] == "untouched"


def test_a_node_port_on_the_loopback_is_the_hosts_alone(cluster: OutsideClientCluster) -> None:
    (answer,) = explained(cluster, "host", "127.0.0.1:30080")
    assert (answer["frontend"], answer["hook"], answer["works"]) == ("NodePort", "socket", True)
    agrees(cluster, cluster.a, answer)
    (answer,) = explained(cluster, "shop/client", "127.0.0.1:30080")
    assert answer["outcome"] == "untouched"


def test_affinity_names_the_backend_that_the_client_keeps(cluster: OutsideClientCluster) -> None:
    cluster.add(
        "sticky", "10.96.2.5", [cluster.endpoint_on_a(), cluster.endpoint_on_b()], sessionAffinity="ClientIP"
    )
    until(lambda: ask(cluster, "shop/client", "10.96.2.5:80")["explanations"][0]["works"])
    (before,) = explained(cluster, "shop/client", "10.96.2.5:80")
    assert (before["affinity"]["seconds"], before["affinity"]["backend"]) == (10800, "")
    pods = {pod.name: f"{pod.address}:8080" for pod in (cluster.w1, cluster.w2)}
    kept = pods[cluster.client.call(clients.ask_tcp, "10.96.2.5", 80)["name"]]
    (after,) = explained(cluster, "shop/client", "10.96.2.5:80")
    assert after["affinity"]["backend"] == kept and 10700 < after["affinity"]["expires"] <= 10800
    assert "WITHOUT AFFINITY" in run(cluster, "shop/client", "10.96.2.5:80").output
    assert kept in after["why"]
    assert pods[cluster.client.call(clients.ask_tcp, "10.96.2.5", 80)["name"]] == kept
    cluster.remove("sticky")


def test_open_sockets_and_flows_are_shown_with_what_becomes_of_them(cluster: OutsideClientCluster) -> None:
    cluster.add_load_balancer("held", "10.96.2.6", "203.0.113.56", [cluster.endpoint_on_a()])
    until(lambda: ask(cluster, "shop/client", "10.96.2.6:80")["explanations"][0]["works"])
    inside, outside = (
        HeldConnection(cluster.client, "10.96.2.6", 80),
        HeldConnection(cluster.outside, "203.0.113.56", 80),
    )
    (answer,) = explained(cluster, "shop/client", "10.96.2.6:80")
    backend = f"{cluster.w1.address}:8080"
    assert answer["sockets"] == [{"backend": backend, "state": "ready", "sockets": 1, "what": "stays"}]
    (answer,) = explained(cluster, cluster.outside.address, "203.0.113.56:80")
    assert [(each["backend"], each["state"]) for each in answer["flows"]] == [(backend, "ESTABLISHED")]
    cluster.add_load_balancer(
        "held",
        "10.96.2.6",
        "203.0.113.56",
        [cluster.endpoint_on_a(ready=False, terminating=True), cluster.endpoint_on_b()],
    )

    def terminating() -> bool:
        (found,) = explained(cluster, "shop/client", "10.96.2.6:80")
        return bool(
            [each for each in found["endpoints"] if each["reason"] == "terminating"] and found["works"]
        )

    until(terminating)
    (answer,) = explained(cluster, "shop/client", "10.96.2.6:80")
    assert {each["address"]: each["why"] for each in answer["endpoints"]}[backend].startswith("terminating")
    (row,) = answer["sockets"]
    assert (row["backend"], row["state"], row["what"]) == (
        backend,
        "terminating",
        "stays; new ones go elsewhere",
    )
    (flow,) = explained(cluster, cluster.outside.address, "203.0.113.56:80")[0]["flows"]
    assert (flow["backend"], flow["what"]) == (backend, "stays; new ones go elsewhere")
    assert (inside.ask(), outside.ask()) == ("alive", "alive")
    agrees(cluster, cluster.client, answer)
    cluster.remove("held")


def test_services_that_have_no_frontend_say_why(cluster: OutsideClientCluster) -> None:
    cluster.add("head", "None", [cluster.endpoint_on_a()])
    until(lambda: "headless" in ask(cluster, "host", "shop/head")["why"])
    assert "no Service shop/nothing" in ask(cluster, "host", "shop/nothing")["why"]
    assert "has no port 99; it has http (80/TCP), udp (53/UDP)" in ask(cluster, "host", "shop/web:99")["why"]
    # In the namespace of the pod, as its DNS does.
    assert explained(cluster, "shop/client", "web:http")[0]["service"] == "shop/web:http"
    assert ask(cluster, "host", "web:http")["why"].startswith("no Service default/web")
    cluster.remove("head")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("shop/client", "shop/web"), "shop/web has several ports, name one of them: http/TCP, udp/UDP"),
        (("nobody", "shop/web:http"), "no pod 'nobody' on this node"),
        (("", "shop/web:http"), "no pod '' on this node"),
        (("0.0.0.0", "shop/web:http"), "0.0.0.0 is unspecified"),
        (("ff02::1", "shop/web:http"), "ff02::1 is multicast"),
        (("fe80::1", "shop/web:http"), "fe80::1 is link-local"),
        (("255.255.255.255", "shop/web:http"), "255.255.255.255 is broadcast"),
        (("fd00::7", "10.96.0.10:80"), "fd00::7 sends no packet to 10.96.0.10, of the other family"),
        (("192.0.2.7", "[fd00:10:96::10]:53"), "192.0.2.7 sends no packet to fd00:10:96::10, of the other"),
        (("host", "shop/web?x:http"), "is neither a Service"),
        (("host", "shop/we#b:http"), "is neither a Service"),
        (("host", "[::ffff:10.96.0.10]:80"), "is neither a Service"),
        (("host", "10.96.0.10"), "needs a port"),
        (("host", "10.96.0.10:http"), "is no port of an address"),
        (("host", "fd00:10:96::10"), "needs a port"),
        (("host", "/web"), "is neither a Service"),
        (("host", "shop/ü:http"), "is neither a Service"),
        (("host", "shop/web:http", "--bpf-root", "/nowhere"), "nothing is pinned below /nowhere"),
    ],
)
def test_what_cannot_be_explained_has_a_code_of_its_own(
    cluster: OutsideClientCluster, words: tuple[str, ...], said: str
) -> None:
    done = run(cluster, *words)
    assert done.code == 2
    assert said in done.errors


def test_text_names_the_answer_first(cluster: OutsideClientCluster) -> None:
    done = run(cluster, "shop/client", "shop/elsewhere:http")
    first = done.output.splitlines()[0]
    assert first == "shop/client → shop/elsewhere:http 10.96.0.30:80/TCP  DOES NOT WORK: EHOSTUNREACH"
    assert "policy Local: it is on node-b" in done.output


def test_without_an_agent_the_maps_are_explained_and_it_is_said(cluster: OutsideClientCluster) -> None:
    cluster.lab.agents[-1].stop()
    report = ask(cluster, "shop/client", "shop/web:http")
    assert report["works"] and "no agent runs" in report["without_agent"]
    for answer in report["explanations"]:
        assert {(each["used"], each["why"]) for each in answer["endpoints"]} == {(True, "in the maps")}
        agrees(cluster, cluster.client, answer)
    assert "The maps alone are explained" in run(cluster, "shop/client", "shop/web:http").output
    cluster.lab.agents[-1].start()
    until(lambda: not ask(cluster, "shop/client", "shop/web:http")["without_agent"])


def test_missing_programs_are_seen(cluster: OutsideClientCluster) -> None:
    """Without a program at connect4 the packets are translated; without one at its device nothing is."""
    links = cluster.a.bpf_root / "ebpfproxy" / "links"
    (links / "connect4").unlink()
    (answer,) = explained(cluster, "shop/client", f"{SERVICE_IPS['v4']}:80")
    assert (answer["hook"], answer["steps"]) == ("tc-ingress", ["the socket has no program at connect4"])
    agrees(cluster, cluster.client, answer)
    (answer,) = explained(cluster, "shop/client", f"[{SERVICE_IPS['v6']}]:80")
    assert answer["hook"] == "socket"
    agent = cluster.lab.agents[-1]
    agent.stop()
    device = cluster.a.call(socket.if_nametoindex, "p1")
    for link in links.glob(f"tc-{device}-*"):
        link.unlink()
    (answer,) = ask(cluster, "shop/client", f"{SERVICE_IPS['v4']}:80")["explanations"]
    assert (answer["outcome"], answer["hook"], answer["error"]) == ("unserved", "none", "timeout")
    assert connect(cluster.client, answer, "TimeoutError") == "TimeoutError"
    agent.start()
    until(
        lambda: ask(cluster, "shop/client", f"{SERVICE_IPS['v4']}:80")["explanations"][0]["hook"] == "socket"
    )
    until(lambda: not ask(cluster, "shop/client", "shop/web:http")["without_agent"])


def test_a_loopback_address_is_the_hosts(cluster: OutsideClientCluster) -> None:
    for name in ("host", "127.0.0.1", "::1"):
        (answer, *_) = explained(cluster, name, "shop/web:http")
        assert (answer["client"], answer["place"]) == ("host", "host")


def test_a_pod_is_named_by_its_address_and_its_namespace_too(cluster: OutsideClientCluster) -> None:
    pod: Pod = cluster.client
    for name in (pod.name, f"shop/{pod.name}", pod.address, pod.address6, pod.netns):
        (answer, *_) = explained(cluster, name, "shop/web:http")
        assert (answer["client"], answer["place"]) == (f"shop/{pod.name}", "pod")
