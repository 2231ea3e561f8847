"""EbpfProxyConfiguration: fields, validation and the published JSON schema."""

from __future__ import annotations

import typing
from typing import Any

import msgspec
import pytest
import yaml

from ebpfproxy.config import own as ours
from ebpfproxy.config.datapath import MAGLEV_SIZES
from ebpfproxy.config.flags import OWN_FLAGS
from ebpfproxy.config.load import parse
from ebpfproxy.config.write import own_yaml
from tests.config.files import OWN, errors, merged, nested, own, text_of

FIELDS: dict[str, Any] = {
    "bpfRoot": "/run/bpf",
    "cgroupRoot": "/run/cgroup",
    "manifests": "/etc/manifests",
    "master": "https://192.0.2.1:6443",
    "detectLocalMode": "Devices",
    "localhostNodePorts": False,
    "nodePortGuard": True,
    "podSockets": False,
    "externalIPs": False,
    "devices": ["eth*", "bond0"],
    "serviceCIDRs": ["10.96.0.0/12", "fd00:10:96::/112"],
    "bypassNetfilter": True,
    "xdp": "native",
    "externalTrafficMode": "dsr",
    "masqueradePorts": "20000-29999",
    "lbAlgorithm": "maglev",
    "maglevTableSize": 251,
    "staleTCP": "never",
    "staleTCPSeconds": 1.5,
    "socketSweepSeconds": 30.0,
    "driftCheckSeconds": 7.5,
    "maxConntrack": 1024,
    "maxServices": 1,
    "maxBackends": 1,
    "maxSlots": 1,
    "maxAffinity": 1,
    "maxConnections": 1,
    "maxDatagramSockets": 1,
    "without": ["tcx", "set-retval"],
    "traceDecisions": True,
    "measureConnections": True,
    "measureTraffic": True,
    "metricsServices": 10,
    "metricsBackends": True,
    "otlpEndpoint": "http://10.96.0.9:4318",
    "otlpIntervalSeconds": 30.0,
}
NAMES = [field.encode_name for field in msgspec.structs.fields(ours.EbpfProxyConfiguration)]


def test_the_table_of_fields_has_every_field() -> None:
    assert ["kind", "apiVersion", *FIELDS] == NAMES


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_is_read_and_written(name: str) -> None:
    found = own({name: FIELDS[name]})
    assert yaml.safe_load(own_yaml(found.own))[name] == FIELDS[name]
    assert found.own != ours.DEFAULTS
    assert parse(own_yaml(found.own), "f") == found


@pytest.mark.parametrize("name", FIELDS)
def test_null_equals_an_omitted_field(name: str) -> None:
    assert own({name: None}) == own()


@pytest.mark.parametrize("name", FIELDS)
def test_a_value_of_another_type_is_one_error(name: str) -> None:
    wrong = {"a": 1}
    (message,) = errors(text_of({**OWN, name: wrong}))
    assert message.startswith(f"f: {name}: ")


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("bpfRoot", "", "Expected `str` of length >= 1: ''"),
        ("detectLocalMode", "ClusterCIDR", "'ClusterCIDR' is none of Devices"),
        ("serviceCIDRs", ["10.0.0.0/8", "ten"], "'ten' is not a CIDR"),
        ("devices", ["eth0", " "], "must not be empty"),
        ("masqueradePorts", "9-3", "'9-3': a range of ports begins at 1 or above and ends at 65535 or below"),
        ("masqueradePorts", "9", "Expected `str` matching regex '^([0-9]+-[0-9]+)?$': '9'"),
        ("lbAlgorithm", "best", "unknown algorithm 'best', known are"),
        ("maglevTableSize", 1000, "1000 is none of 251, 509"),
        ("staleTCP", "always", "'always' is none of gone, unready, never"),
        ("socketSweepSeconds", 0, "Expected `float` >= 0.1: 0"),
        ("maxConntrack", 1023, "Expected `int` >= 1024: 1023"),
        ("maxSlots", 0, "Expected `int` >= 1: 0"),
        ("without", ["tcx", "xdp"], "'xdp' is none of set-retval, tcx"),
        ("otlpEndpoint", "collector:4318", "'collector:4318' is not http://HOST:PORT or https://HOST:PORT"),
        ("otlpEndpoint", "ftp://collector", "'ftp://collector' is not http://HOST:PORT"),
        ("otlpEndpoint", "http://", "'http://' is not http://HOST:PORT"),
        ("otlpEndpoint", "http://a:0", "'http://a:0' is not http://HOST:PORT"),
        ("otlpEndpoint", "http://a:x", "'http://a:x' is no URL: Port could not be cast"),
        ("otlpEndpoint", f"http://a:{'9' * 5000}", f"'http://a:{'9' * 5000}' is no URL"),
        ("otlpEndpoint", "http://[::1", "'http://[::1' is no URL"),
        ("otlpEndpoint", "http://a b", "'http://a b' is no URL"),
        ("otlpEndpoint", "http://a/?key=x", "has more than a path"),
        ("otlpEndpoint", "http://a/#x", "has more than a path"),
        ("otlpIntervalSeconds", 0.5, "Expected `float` >= 1.0: 0.5"),
        ("nothing", 1, "unknown field"),
    ],
)
def test_invalid_values_are_reported_by_path(path: str, value: Any, message: str) -> None:
    (found,) = errors(text_of(merged(OWN, nested(path, value))))
    index = "[1]" if isinstance(value, list) else ""
    assert found.startswith(f"f: {path}{index}: {message}")


@pytest.mark.parametrize(
    "url", ["http://user:s3cret@a", "http://user:s3cret@", "https://s3cret@a:4318", "http://a:s3cret@[::1"]
)
def test_an_error_of_a_url_has_no_password(url: str) -> None:
    (found,) = errors(text_of({**OWN, "otlpEndpoint": url}))
    assert found.startswith("f: otlpEndpoint: ")
    assert "s3cret" not in found


@pytest.mark.parametrize("url", ["", "http://10.0.0.1:4318", "https://[fd00::1]/otlp/", "http://a.b"])
def test_urls_of_collectors(url: str) -> None:
    assert own({"otlpEndpoint": url}).own.otlp_endpoint == url


@pytest.mark.parametrize("name", ["rr", "wlc", "mh", "lblc", "round-robin", "Maglev"])
def test_ipvs_names_of_algorithms_are_accepted(name: str) -> None:
    assert own({"lbAlgorithm": name}).own.lb_algorithm == name


def test_every_field_has_a_flag() -> None:
    assert {*OWN_FLAGS.values(), "kind", "apiVersion"} - {"detectLocalMode"} == set(NAMES) - {
        "detectLocalMode"
    }


def test_maglev_table_sizes_are_those_of_the_datapath() -> None:
    assert typing.get_args(ours.MaglevSize) == MAGLEV_SIZES


def test_the_schema_describes_every_field() -> None:
    properties = ours.schema()["$defs"]["EbpfProxyConfiguration"]["properties"]
    assert list(properties) == NAMES
    assert all(properties[name].get("description") for name in FIELDS)
    assert all("default" in properties[name] for name in FIELDS)
