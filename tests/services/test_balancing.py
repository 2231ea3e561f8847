"""Annotations of algorithms and weights, and warnings about invalid ones."""

from __future__ import annotations

import ipaddress

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ebpfproxy.kube.objects import Service
from ebpfproxy.services.balancing import (
    ALGORITHMS,
    MAX_WEIGHT,
    NEAREST,
    Weights,
    parse_algorithm,
    parse_weights,
)
from ebpfproxy.services.frontends import ServiceFrontends, frontends_of
from ebpfproxy.services.model import Algorithm
from tests.examples import examples


def packed(text: str) -> bytes:
    return ipaddress.ip_address(text).packed


def weights_of(text: str) -> Weights:
    """Parses a valid text."""
    found, problems = parse_weights(text)
    assert problems == []
    assert found is not None
    return found


# -- algorithms


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("random", Algorithm.RANDOM),
        ("round-robin", Algorithm.ROUND_ROBIN),
        ("least-connections", Algorithm.LEAST_CONNECTIONS),
        ("shortest-expected-delay", Algorithm.SHORTEST_DELAY),
        ("never-queue", Algorithm.NEVER_QUEUE),
        ("source-hash", Algorithm.SOURCE_HASH),
        ("destination-hash", Algorithm.DESTINATION_HASH),
        ("maglev", Algorithm.MAGLEV),
        ("rr", Algorithm.ROUND_ROBIN),
        ("wrr", Algorithm.ROUND_ROBIN),
        ("lc", Algorithm.LEAST_CONNECTIONS),
        ("wlc", Algorithm.LEAST_CONNECTIONS),
        ("sed", Algorithm.SHORTEST_DELAY),
        ("nq", Algorithm.NEVER_QUEUE),
        ("sh", Algorithm.SOURCE_HASH),
        ("dh", Algorithm.DESTINATION_HASH),
        ("mh", Algorithm.MAGLEV),
    ],
)
def test_every_name_and_every_ipvs_name_is_known(name: str, expected: Algorithm) -> None:
    """Names may be in any case, with white space around them."""
    for text in (name, name.upper(), name.title(), f" {name}", f"\t{name}\n"):
        assert parse_algorithm(text) == (expected, "")


def test_all_names_are_tested() -> None:
    assert len(ALGORITHMS) == 17
    assert set(ALGORITHMS.values()) == set(Algorithm)
    assert all(parse_algorithm(str(each)) == (each, "") for each in Algorithm)


@pytest.mark.parametrize("name", ["lblc", "lblcr", "twos"])
def test_unsupported_ipvs_scheduler_is_replaced_by_the_nearest_with_a_remark(name: str) -> None:
    """Locality-based ones and the power of two choices become least connections, in upper or lower case."""
    assert set(NEAREST) == {"lblc", "lblcr", "twos"}
    for text in (name, f" {name.upper()} "):
        found, remark = parse_algorithm(text)
        assert found is Algorithm.LEAST_CONNECTIONS
        assert remark == f"{name} is not here, the nearest is used: least-connections"


@pytest.mark.parametrize(
    "text", ["", " ", "best", "r r", "round robin", "rr,", "roundrobin", "1", "\0", "\ud800", "fo", "ovf"]
)
def test_unknown_name_is_reported_with_the_known_names(text: str) -> None:
    """Unknown names include fo and ovf of IPVS, which send all to one backend."""
    found, remark = parse_algorithm(text)
    assert found is None
    assert remark.startswith(f"unknown algorithm {text!r}, known are ")
    assert set(remark.partition("known are ")[2].split(", ")) == set(ALGORITHMS)


@given(st.text())
def test_any_name_is_accepted_or_reported(text: str) -> None:
    found, remark = parse_algorithm(text)
    assert (found is None) <= bool(remark)


def test_long_names_are_truncated_in_remarks() -> None:
    assert len(parse_algorithm("x" * 200_000)[1]) < 500


# -- weights


def test_the_documented_syntax() -> None:
    found = weights_of("10.0.0.7=3, node/worker-1=5, zone/eu-1a=10, *=2")
    assert found == Weights({packed("10.0.0.7"): 3}, {"worker-1": 5}, {"eu-1a": 10}, 2)


@pytest.mark.parametrize(
    "text",
    [
        "10.0.0.7=3,10.0.0.8=4",
        "10.0.0.7=3 10.0.0.8=4",
        " 10.0.0.7=3\t,\n10.0.0.8=4 , ",
        ",,10.0.0.7=3,,,10.0.0.8=4,",
        "10.0.0.8=4\n10.0.0.7=3\n",
        "10.0.0.7=003,10.0.0.8=0000000004",
    ],
)
def test_parts_are_separated_by_commas_and_white_space(text: str) -> None:
    assert weights_of(text) == Weights({packed("10.0.0.7"): 3, packed("10.0.0.8"): 4})


@pytest.mark.parametrize("text", ["", " ", ",", " , ,\n"])
def test_empty_text_has_no_weights_and_no_errors(text: str) -> None:
    assert parse_weights(text) == (None, [])


def test_most_specific_key_determines_the_weight() -> None:
    """Address takes precedence over node, node over zone, zone over the default, in any order and for all values."""
    found = weights_of("*=7 zone/z=6 node/n=5 10.0.0.1=4")
    one, other = packed("10.0.0.1"), packed("10.0.0.2")
    assert found.of(one, "n", "z") == 4
    assert found.of(other, "n", "z") == 5
    assert found.of(other, "m", "z") == 6
    assert found.of(other, "m", "y") == 7
    assert found.of(one, "", "") == 4
    assert found.of(other, "", "") == 7, "keys of node and zone do not match an endpoint without them"


def test_weight_zero_is_a_weight() -> None:
    found = weights_of("*=7 zone/z=6 node/n=0 10.0.0.1=0")
    assert found.of(packed("10.0.0.1"), "m", "z") == 0
    assert found.of(packed("10.0.0.2"), "n", "z") == 0
    assert weights_of("*=0").of(packed("10.0.0.1"), "n", "z") == 0


def test_default_weight_is_one() -> None:
    found = weights_of("10.0.0.1=4 node/n=5")
    assert found.others == 1
    assert found.of(packed("10.0.0.2"), "m", "z") == 1
    assert Weights().of(packed("10.0.0.2"), "m", "z") == 1


def test_last_entry_of_a_repeated_key_counts() -> None:
    found = weights_of("10.0.0.1=1 node/n=1 zone/z=1 *=1 10.0.0.1=2 node/n=3 zone/z=4 *=5")
    assert found == Weights({packed("10.0.0.1"): 2}, {"n": 3}, {"z": 4}, 5)


def test_ipv6_addresses_are_matched_in_any_spelling() -> None:
    found = weights_of("fd00::1=3 fd00:0:0::0:2=4 ::=5 FD00::a=6 fd00::192.0.2.1=7")
    assert found.addresses == {
        packed("fd00::1"): 3,
        packed("fd00::2"): 4,
        packed("::"): 5,
        packed("fd00::a"): 6,
        packed("fd00::c000:201"): 7,
    }
    assert weights_of("fd00::1=3 fd00:0::1=4") == Weights({packed("fd00::1"): 4})


def test_names_of_nodes_and_zones_may_be_any_single_word() -> None:
    found = weights_of("node/ip-10-0-0-1.eu.internal=2 zone/10.0.0.1=3 node/*=4 node/fd00::1=5 zone/node=6")
    assert found == Weights(
        nodes={"ip-10-0-0-1.eu.internal": 2, "*": 4, "fd00::1": 5}, zones={"10.0.0.1": 3, "node": 6}
    )


@pytest.mark.parametrize("weight", [0, 1, 65535])
def test_weights_from_zero_to_the_maximum_of_ipvs(weight: int) -> None:
    assert MAX_WEIGHT == 65535
    assert weights_of(f"10.0.0.1={weight}").of(packed("10.0.0.1"), "", "") == weight


BAD_WEIGHTS = [
    "10.0.0.1=65536",
    "10.0.0.1=-1",
    "10.0.0.1=+1",
    "10.0.0.1=1.5",
    "10.0.0.1=0x10",
    "10.0.0.1=1_0",
    "10.0.0.1=",
    "10.0.0.1",
    "10.0.0.1=\u0661",  # a digit one, though not ASCII
    "10.0.0.1=\u00b2",
    "node/n=many",
    "node/n",
    "*=-0",
    "*",
    "=",
    "10.0.0.1==",
    "*=99999999999999999999",
]
BAD_KEYS = [
    "=5",
    "==5",
    "10.0.0.300=5",
    "10.0.0.256=5",
    "10.0.0.0/24=5",
    "10.0.0.1:80=5",
    "[fd00::1]=5",
    "fe80::1%eth0=5",
    "::ffff:10.0.0.1=5",
    "10.0.0.1=5=5",
    "node/=5",
    "zone/=5",
    "node=5",
    "/n=5",
    "Node/n=5",
    "pod/n=5",
    "node/a/b=5",
    "node/a=5=5",
    "**=5",
    "\ud800=5",
]


@pytest.mark.parametrize("part", BAD_WEIGHTS)
def test_entry_with_an_invalid_weight_is_reported_and_others_used(part: str) -> None:
    problem = f"{part!r} is not KEY=WEIGHT with a weight of 0 to 65535"
    assert parse_weights(part) == (None, [problem])
    for text in (f"{part},10.0.0.9=2", f"10.0.0.9=2 {part}"):
        assert parse_weights(text) == (Weights({packed("10.0.0.9"): 2}), [problem])


@pytest.mark.parametrize("part", BAD_KEYS)
def test_entry_with_an_invalid_key_is_reported_and_others_used(part: str) -> None:
    problem = f"{part!r} names neither an address nor node/NAME, zone/NAME or *"
    assert parse_weights(part) == (None, [problem])
    for text in (f"{part},10.0.0.9=2", f"10.0.0.9=2 {part}"):
        assert parse_weights(text) == (Weights({packed("10.0.0.9"): 2}), [problem])


def test_white_space_splits_an_entry() -> None:
    found, problems = parse_weights("10.0.0.1 = 5")
    assert found is None
    assert [problem.partition(" ")[0] for problem in problems] == ["'10.0.0.1'", "'='", "'5'"]


names = st.from_regex(r"[a-z0-9]([a-z0-9.-]{0,20}[a-z0-9])?", fullmatch=True)
weights = st.integers(0, MAX_WEIGHT)
some_weights = st.builds(
    Weights,
    st.dictionaries(st.ip_addresses().map(lambda a: a.packed), weights, max_size=5).filter(
        lambda found: not any(a.startswith(bytes(10) + b"\xff\xff") for a in found)
    ),
    st.dictionaries(names, weights, max_size=3),
    st.dictionaries(names, weights, max_size=3),
    weights,
)
separators = st.text(", \t\n", min_size=1, max_size=3)


def parts_of(found: Weights) -> list[str]:
    return [
        *(f"{ipaddress.ip_address(address)}={weight}" for address, weight in found.addresses.items()),
        *(f"node/{name}={weight}" for name, weight in found.nodes.items()),
        *(f"zone/{name}={weight}" for name, weight in found.zones.items()),
        f"*={found.others}",
    ]


@given(some_weights, st.data())
def test_documented_syntax_round_trips(found: Weights, data: st.DataObject) -> None:
    parts = data.draw(st.permutations(parts_of(found)))
    assert weights_of("".join(part + data.draw(separators) for part in parts)) == found


@given(some_weights, st.lists(st.sampled_from(BAD_WEIGHTS + BAD_KEYS), max_size=10), st.data())
def test_every_invalid_entry_is_reported_once_and_others_used(
    found: Weights, garbage: list[str], data: st.DataObject
) -> None:
    parts = data.draw(st.permutations([*parts_of(found), *garbage]))
    again, problems = parse_weights(data.draw(separators).join(parts))
    assert again == found
    assert sorted(problems) == sorted(problem for each in garbage for problem in parse_weights(each)[1])


@settings(max_examples=examples(500))
@given(st.one_of(st.text(), st.text("0159=*/,. :nodezfab-"), st.lists(names).map("=1,".join)))
def test_any_text_is_parsed_or_reported(text: str) -> None:
    found, problems = parse_weights(text)
    parts = text.replace(",", " ").split()
    assert len(problems) <= len(parts)
    assert (found is None) <= (len(problems) == min(len(parts), 11))
    if found is not None:
        assert weights_of(" ".join(parts_of(found))) == found


@pytest.mark.parametrize(
    "text", ["*=" + "9" * 5000, "*=" + "0" * 5000 + "65536", "9" * 100_000, "=" * 100_000]
)
def test_very_long_entry_is_invalid_and_truncated_in_the_report(text: str) -> None:
    """int() refuses more than 4,300 digits."""
    found, problems = parse_weights(text)
    assert found is None
    assert len(problems) == 1
    assert len(problems[0]) < 250


def test_leading_zeros_of_weights_are_ignored() -> None:
    assert weights_of("*=" + "0" * 5000 + "7") == Weights(others=7)


def test_of_many_invalid_entries_some_are_named_and_others_counted() -> None:
    found, problems = parse_weights("*=2 " + " ".join(f"bad{n}" for n in range(1000)))
    assert found == Weights(others=2)
    assert len(problems) == 11
    assert problems[-1] == "and 990 parts more"


# -- annotations


def reduced(algorithm: Algorithm = Algorithm.RANDOM, **annotations: str) -> ServiceFrontends:
    meta = {
        "name": "web",
        "namespace": "shop",
        "annotations": {f"ebpfproxy.io/{key.replace('_', '-')}": text for key, text in annotations.items()},
    }
    spec = {"clusterIP": "10.96.0.1", "ports": [{"port": 80}, {"name": "more", "port": 81}]}
    return frontends_of(msgspec.convert({"metadata": meta, "spec": spec}, Service), algorithm=algorithm)


def test_algorithm_of_a_port_is_its_services_or_the_clusters() -> None:
    for default in Algorithm:
        assert {port.algorithm for port in reduced(default).ports} == {default}
        named = reduced(default, lb_algorithm="wlc")
        assert {port.algorithm for port in named.ports} == {Algorithm.LEAST_CONNECTIONS}
        assert named.warnings == ()


def test_warning_about_an_unknown_algorithm_names_service_and_algorithm_in_use() -> None:
    found = reduced(Algorithm.MAGLEV, lb_algorithm="best")
    assert {port.algorithm for port in found.ports} == {Algorithm.MAGLEV}
    (warning,) = map(str, found.warnings)
    assert warning.startswith(
        "services shop/web: metadata.annotations[ebpfproxy.io/lb-algorithm]: unknown algorithm 'best', known"
    )
    assert warning.endswith("; maglev is used")


def test_nearest_algorithm_is_used_for_any_algorithm_of_the_cluster() -> None:
    found = reduced(Algorithm.MAGLEV, lb_algorithm="lblcr")
    assert {port.algorithm for port in found.ports} == {Algorithm.LEAST_CONNECTIONS}
    (warning,) = found.warnings
    assert warning.message == "lblcr is not here, the nearest is used: least-connections"


def test_every_invalid_entry_of_the_weights_is_a_warning() -> None:
    found = reduced(weights="bad, *=70000, *=3")
    assert found.weights == Weights(others=3)
    assert [warning.field for warning in found.warnings] == ["metadata.annotations[ebpfproxy.io/weights]"] * 2
    assert reduced(weights="bad").weights is None
    assert reduced().weights is None
