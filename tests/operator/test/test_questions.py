"""What is asked in clusters of many nodes, and reports: nothing runs."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from ebpfproxy.operator.test import objects, questions
from ebpfproxy.operator.test.objects import CLIENT, HOST
from ebpfproxy.operator.test.questions import Client, Cluster, Server, Service
from ebpfproxy.operator.test.results import Result, failure, junit, report
from ebpfproxy.operator.test.site import Node, _answers


def cluster(count: int) -> Cluster:
    nodes = tuple(
        Node(name=f"node-{i}", addresses=(f"172.18.0.{i}",), node_ports=(f"172.18.0.{i}",))
        for i in range(1, count + 1)
    )
    servers = tuple(Server(f"server-{i}", f"node-{i}", (f"10.244.{i}.2",)) for i in range(1, count + 1))
    ports = {"TCP": 31001, "UDP": 31002}
    names = (objects.ANY, objects.STICKY, objects.LOCAL, objects.ONE)
    services = {name: Service(name, (f"10.96.0.{i}",), ports) for i, name in enumerate(names, 10)}
    services[objects.OVER_SCTP] = Service(objects.OVER_SCTP, ("10.96.0.9",), {"SCTP": 31003})
    return Cluster(nodes, servers, services, "node-1")


def test_number_of_questions_of_a_client_does_not_grow_with_the_cluster() -> None:
    asked = {
        count: questions.of_client(Client("client", CLIENT, cluster(count).nodes[count - 2]), cluster(count))
        for count in (8, 100)
    }
    assert len(asked[8]) == len(asked[100])
    (own,) = {each.decided_on for each in asked[100] if each.check == questions.CLUSTER_IP}
    assert own == "node-99"
    assert {each.decided_on for each in asked[100] if each.check == questions.NODE_PORT} == {
        "node-99",
        "node-100",
        *(f"node-{i}" for i in range(1, 7)),
    }


def test_policies_of_a_node_without_a_server() -> None:
    """The Service ``one`` has its server on node-1: a client on node-2 gets no answer inside, nor at NodePorts of others."""
    found = questions.of_client(Client("client", CLIENT, cluster(3).nodes[1]), cluster(3))
    of_one = {
        (each.check, each.address): (each.by, each.sources) for each in found if each.service == objects.ONE
    }
    assert of_one == {
        (questions.INTERNAL, "10.96.0.13"): ((), None),
        (questions.EXTERNAL, "172.18.0.2"): (("server-1",), None),
        (questions.EXTERNAL, "172.18.0.3"): ((), ("172.18.0.2",)),
        (questions.EXTERNAL, "172.18.0.1"): (("server-1",), ("172.18.0.2",)),
    }


def test_pods_ask_over_sctp_where_a_server_has_it() -> None:
    found = questions.of_client(Client("client", CLIENT, cluster(2).nodes[0]), cluster(2))
    assert [(each.check, each.port) for each in found if each.protocol == "SCTP"] == [
        (questions.CLUSTER_IP, 80),
        (questions.NODE_PORT, 31003),
        (questions.NODE_PORT, 31003),
    ]
    found = questions.of_client(Client("host", HOST, cluster(2).nodes[0]), cluster(2))
    assert [each for each in found if each.protocol == "SCTP"] == []


@pytest.mark.parametrize(
    ("selection", "answers"),
    [
        ((), True),
        (("primary",), True),
        (("localhost",), False),
        (("localhost", "all"), True),
        (("172.18.0.0/16",), True),
        (("10.0.0.0/8", "fd00::/8"), False),
    ],
)
def test_node_port_addresses_select_what_is_asked(selection: tuple[str, ...], answers: bool) -> None:
    assert _answers("172.18.0.2", selection) == answers


def test_junit_has_a_case_for_each_check() -> None:
    wrong = failure(
        "node-a itself", "Service any", "10.96.0.1:80/TCP", "an answer", "none", explain="explain"
    )
    results = [
        Result(check="NodePort", protocol="TCP", family="IPv4", asked=5),
        Result(check="NodePort", protocol="TCP", family="IPv4", asked=1, failure=wrong),
        Result(check="NodePort", protocol="SCTP", skipped="no SCTP"),
        Result(check="hairpin", asked=5),
    ]
    suite = ElementTree.fromstring(junit(report(results, "2 nodes", ())))
    assert suite.attrib == {"name": "ebpfproxy test: 2 nodes", "tests": "3", "failures": "1", "skipped": "1"}
    found = {case.get("name"): [(each.tag, each.get("message")) for each in case] for case in suite}
    sentence = "node-a itself asked Service any at 10.96.0.1:80/TCP and expected an answer, but: none."
    assert found == {
        "NodePort TCP IPv4": [("failure", sentence)],
        "NodePort SCTP": [("skipped", "no SCTP")],
        "hairpin": [],
    }


def test_report_without_any_result_is_not_good() -> None:
    assert not report([Result(check="hairpin", skipped="no")], "1 node", ()).good
