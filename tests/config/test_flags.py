"""Flags set their fields and override the file; errors name the flag."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ebpfproxy.cli.run import command as run
from ebpfproxy.config.datapath import StaleTcp
from ebpfproxy.config.documents import ConfigurationError
from ebpfproxy.config.durations import seconds
from ebpfproxy.config.flags import KUBE_PROXY_FLAGS, NO_FIELD, OWN_FLAGS
from ebpfproxy.config.load import Configuration, effective
from ebpfproxy.config.write import configz
from tests.config.files import flag_errors, kube_proxy, own, used
from tests.config.test_kube_proxy import FIELDS, at
from tests.config.test_own import FIELDS as OWN_FIELDS
from tests.data import SAMPLES


def shown(configuration: Configuration, group: str, path: str) -> Any:
    return at(configz(configuration)[group], path)


def as_text(value: Any) -> str:
    """Returns a value as written on a command line."""
    if isinstance(value, list):
        return ",".join(
            f"{each['filePattern']}={each['verbosity']}" if isinstance(each, dict) else each for each in value
        )
    if isinstance(value, dict):
        return ",".join(f"{name}={str(each).lower()}" for name, each in value.items())
    return str(value).lower() if isinstance(value, bool) else str(value)


_ALPHA = {"feature-gates": "LoggingAlphaOptions=true"}


def test_every_flag_of_a_real_kube_proxy_is_known() -> None:
    names = {
        line.split()[0 if not line.startswith("-v,") and not line.startswith("-h,") else 1].strip("-,")
        for line in (SAMPLES / "flags.txt").read_text().splitlines()
    }
    assert names - set(KUBE_PROXY_FLAGS) - NO_FIELD == {"master"}
    assert "master" in OWN_FLAGS


def test_every_option_of_run_is_known() -> None:
    names = {parameter.name.replace("_", "-") for parameter in run.params if parameter.name}
    assert names <= {*KUBE_PROXY_FLAGS, *OWN_FLAGS, *NO_FIELD}
    assert names >= {*KUBE_PROXY_FLAGS, *OWN_FLAGS} - {"v"}, "v is --verbosity"


@pytest.mark.parametrize("flag", KUBE_PROXY_FLAGS)
def test_every_flag_of_kube_proxy_sets_its_field(flag: str) -> None:
    path = KUBE_PROXY_FLAGS[flag]
    extra = _ALPHA if path.startswith("logging.options") else {}
    found = effective(Configuration(), {flag: as_text(FIELDS[path]), **extra})
    assert shown(found, "kubeproxy.config.k8s.io", path) == FIELDS[path]


@pytest.mark.parametrize("flag", OWN_FLAGS)
def test_every_flag_of_our_document_sets_its_field(flag: str) -> None:
    path = OWN_FLAGS[flag]
    found = effective(Configuration(), {flag: as_text(OWN_FIELDS[path])})
    assert shown(found, "ebpfproxy.io", path) == OWN_FIELDS[path]


def test_values_that_click_converted_are_accepted() -> None:
    found = effective(
        Configuration(),
        {
            "conntrack_udp_timeout": 1.5,
            "--config-sync-period": seconds(60),
            "oom_score_adj": -5,
            "masquerade_all": True,
            "kubeconfig": Path("/etc/k"),
            "devices": ("eth0", "eth1"),
            "stale_tcp": StaleTcp.NEVER,
            "without": ("tcx",),
            "maglev_table_size": "251",
            "max_slots": None,
            "verbosity": 5,
            "config": "ignored",
        },
    )
    assert str(found.kube_proxy.conntrack.udp_timeout) == "1.5s"
    assert found.kube_proxy.config_sync_period == seconds(60)
    assert found.kube_proxy.oom_score_adj == -5
    assert found.kube_proxy.iptables.masquerade_all
    assert found.kube_proxy.client_connection.kubeconfig == "/etc/k"
    assert found.own.devices == ("eth0", "eth1")
    assert found.own.stale_tcp is StaleTcp.NEVER
    assert found.own.without == ("tcx",)
    assert (found.own.maglev_table_size, found.own.max_slots) == (251, None)
    assert found.kube_proxy.logging.verbosity == 5


def test_an_unknown_flag_raises_key_error() -> None:
    with pytest.raises(KeyError):
        effective(Configuration(), {"no-such-flag": "x"})


def test_flags_override_the_file() -> None:
    file = kube_proxy({"oomScoreAdj": 7, "mode": "ipvs", "nodePortAddresses": ["10.0.0.0/8"]})
    found = effective(file, {"oom-score-adj": 8, "nodeport-addresses": ""}).kube_proxy
    assert (found.oom_score_adj, found.mode, found.node_port_addresses) == (8, "ipvs", ())
    assert effective(own({"maxServices": 5}), {"max-services": 6}).own.max_services == 6


def test_a_mode_from_a_flag_has_its_defaults() -> None:
    found = used(flags={"proxy-mode": "nftables", "masquerade-all": True}).kube_proxy
    assert found.node_port_addresses == ("primary",)
    assert found.nftables.masquerade_all
    assert not found.iptables.masquerade_all
    assert found.nftables.sync_period == seconds(30)
    assert used({"mode": "nftables"}, flags={"masquerade-all": True}).kube_proxy.masquerade_all


@pytest.mark.parametrize(("mode", "section"), [("", "iptables"), ("nftables", "nftables"), ("ipvs", "ipvs")])
def test_min_sync_period_of_iptables_is_that_of_all_modes_but_ipvs(mode: str, section: str) -> None:
    """kube-proxy's processV1Alpha1Flags; the masquerade bit of iptables is no other mode's."""
    given = {"iptables-min-sync-period": "7s", "iptables-masquerade-bit": 15, "ipvs-min-sync-period": "8s"}
    found = used(flags={**given, "proxy-mode": mode}).kube_proxy
    assert getattr(found, section).min_sync_period == seconds(8 if mode == "ipvs" else 7)
    assert (found.iptables.masquerade_bit, found.nftables.masquerade_bit) == (15, 14)


def test_addresses_of_flags_may_be_empty_or_only_a_port() -> None:
    found = used(flags={"healthz-bind-address": "", "metrics-bind-address": ":0"}).kube_proxy
    assert (found.healthz_bind_address, found.metrics_bind_address) == ("", ":0")
    found = used(flags={"healthz-bind-address": "127.0.0.1", "metrics-bind-address": "::1"}).kube_proxy
    assert (found.healthz_bind_address, found.metrics_bind_address) == ("127.0.0.1:10256", "[::1]:10249")


def test_default_addresses_follow_bind_address() -> None:
    found = used(flags={"bind-address": "::"}).kube_proxy
    assert (found.healthz_bind_address, found.metrics_bind_address) == ("[::]:10256", "[::1]:10249")
    found = used(
        {"healthzBindAddress": "0.0.0.0:1"}, flags={"bind-address": "::", "metrics-bind-address": ""}
    ).kube_proxy
    assert (found.healthz_bind_address, found.metrics_bind_address) == ("0.0.0.0:1", "")


def test_local_mode_devices_sets_our_document() -> None:
    found = used({"detectLocalMode": "NodeCIDR"}, flags={"detect-local-mode": "Devices"})
    assert (found.own.detect_local_mode, found.kube_proxy.detect_local_mode) == ("Devices", "NodeCIDR")
    back = effective(own({"detectLocalMode": "Devices"}), {"detect-local-mode": "NodeCIDR"})
    assert (back.own.detect_local_mode, back.kube_proxy.detect_local_mode) == (None, "NodeCIDR")


def test_flags_of_kube_proxy_override_our_document() -> None:
    file = own({"lbAlgorithm": "maglev", "localhostNodePorts": False})
    found = effective(file, {"ipvs-scheduler": "rr", "iptables-localhost-nodeports": True})
    assert (found.own.lb_algorithm, found.own.localhost_node_ports) == (None, None)
    found = effective(file, {"ipvs-scheduler": "rr", "lb-algorithm": "sh"})
    assert found.own.lb_algorithm == "sh"


def test_a_flag_for_one_source_overrides_another_source_in_the_file() -> None:
    file = kube_proxy({"clientConnection": {"kubeconfig": "/etc/k"}})
    found = effective(file, {"manifests": "/m"})
    assert (found.own.manifests, found.kube_proxy.client_connection.kubeconfig) == ("/m", "")
    assert effective(own({"manifests": "/m"}), {"master": "https://x"}).own.manifests == ""
    assert effective(own({"manifests": "/m"}), {"kubeconfig": "/k"}).own.manifests == ""
    message = ["--manifests: excludes --kubeconfig (clientConnection.kubeconfig) and --master"]
    assert flag_errors({"manifests": "/m", "kubeconfig": "/k"}) == message
    assert flag_errors({"manifests": "/m", "master": "https://x"}) == message


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            {"nodeport-addresses": "10.0.0.1"},
            ["--nodeport-addresses: '10.0.0.1' is not a CIDR: it has no prefix length"],
        ),
        (
            {"nodeport-addresses": "primary,localhost,eth0"},
            [
                "--nodeport-addresses: 'eth0' is neither a CIDR nor one of 'primary', 'localhost', 'all': 'eth0' does "
                "not appear to be an IPv4 or IPv6 network"
            ],
        ),
        ({"cluster-cidr": "10.0.0.0/33"}, ["--cluster-cidr: '10.0.0.0/33' is not a CIDR"]),
        ({"service-cidr": "ten"}, ["--service-cidr: 'ten' is not a CIDR"]),
        (
            {"detect-local-mode": "BridgeInterface"},
            [
                "detectLocal.bridgeInterface: must not be empty: BridgeInterface needs --pod-bridge-interface, "
                "or this field"
            ],
        ),
        (
            {"conntrack-udp-timeout": "soon"},
            ["--conntrack-udp-timeout: 'soon' is not a duration such as 30s or 1h30m"],
        ),
        ({"conntrack-min": "-1"}, ["--conntrack-min: -1 is below 0"]),
        ({"conntrack-min": "many"}, ["--conntrack-min: Expected `int`, got `str`: 'many'"]),
        ({"max-services": 0}, ["--max-services: Expected `int` >= 1: 0"]),
        ({"lb-algorithm": "best"}, ["--lb-algorithm: unknown algorithm 'best', known are"]),
        ({"metrics-bind-address": "x"}, ["--metrics-bind-address: 'x' is not IP:port"]),
        ({"profiling": "perhaps"}, ["--profiling: Expected `bool`, got `str`: 'perhaps'"]),
        ({"feature-gates": "A"}, ["--feature-gates: A: Expected `bool`, got `str`: ''"]),
        (
            {"oom-score-adj": 2000, "proxy-mode": "x"},
            ["--proxy-mode: 'x' is none of", "--oom-score-adj: 2000 is not"],
        ),
        ({"maglev-table-size": "7"}, ["--maglev-table-size: 7 is none of"]),
        ({"without": "xdp"}, ["--without: [0]: 'xdp' is none of set-retval, tcx"]),
    ],
)
def test_errors_of_flags_name_the_flag(flags: dict[str, Any], message: list[str]) -> None:
    found = flag_errors(flags)
    assert len(found) == len(message)
    assert all(each.startswith(start) for each, start in zip(found, message, strict=True)), found


def test_errors_of_combinations_name_the_path() -> None:
    with pytest.raises(ConfigurationError, match=r"detectLocal\.bridgeInterface: must not be empty"):
        effective(kube_proxy(), {"detect-local-mode": "BridgeInterface"})
