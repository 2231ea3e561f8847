"""Files of one or both documents, and the accepted YAML."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ebpfproxy.config.documents import ConfigurationError
from ebpfproxy.config.load import Configuration, ignored_fields, load, parse
from tests.config.files import KUBE_PROXY, OWN, errors, text_of, used
from tests.config.test_kube_proxy import FIELDS

KP, MINE = {**KUBE_PROXY, "mode": "ipvs"}, {**OWN, "maxServices": 5}


def test_one_document_or_both_in_any_order() -> None:
    both = parse(text_of(KP, MINE), "f")
    assert (both.kube_proxy.mode, both.own.max_services) == ("ipvs", 5)
    assert parse(text_of(MINE, KP), "f") == both
    assert parse(text_of(KP), "f") == Configuration(kube_proxy=both.kube_proxy)
    assert parse(text_of(MINE), "f") == Configuration(own=both.own)
    assert parse(text_of(KUBE_PROXY), "f") == parse(text_of(OWN), "f") == Configuration()


def test_empty_documents_are_skipped_and_counted() -> None:
    assert (
        parse(f"---\n---\n{text_of(KP)}---\n# nothing\n---\n{text_of(MINE)}---\n", "f").own.max_services == 5
    )
    assert errors(f"---\n---\n{text_of(KP)}---\n---\n{text_of({**MINE, 'a': 1})}") == [
        "f: document 4 (EbpfProxyConfiguration): a: unknown field"
    ]


def test_fields_of_older_kube_proxies_are_ignored() -> None:
    found = parse(text_of({**KP, "udpIdleTimeout": "250ms", "resourceContainer": "/kube-proxy"}), "f")
    assert found.kube_proxy == parse(text_of(KP), "f").kube_proxy
    assert ignored_fields(found) == ["resourceContainer", "udpIdleTimeout"]
    assert errors(text_of({**MINE, "udpIdleTimeout": "1s"})) == ["f: udpIdleTimeout: unknown field"]


def test_a_problem_is_one_line() -> None:
    assert errors(text_of({**KP, "featureGates": {"a\n": None}})) == [
        r"f: featureGates.a\n: Expected `bool`, got `null`"
    ]


def test_json_is_accepted() -> None:
    text = '{"kind": "EbpfProxyConfiguration", "apiVersion": "ebpfproxy.io/v1alpha1", "maxServices": 5}'
    assert parse(text, "f") == parse(text_of(MINE), "f")


def test_a_file_is_read(tmp_path: Path) -> None:
    file = tmp_path / "config.conf"
    file.write_text(text_of(KP, MINE))
    assert load(file) == parse(text_of(KP, MINE), "f")
    with pytest.raises(ConfigurationError) as caught:
        load(tmp_path / "none")
    assert str(caught.value) == f"{tmp_path}/none: No such file or directory"
    file.write_bytes(b"\xff\xfe\x00\xd8")
    with pytest.raises(ConfigurationError) as caught:
        load(file)
    assert str(caught.value).startswith(f"{file}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", ["f: has neither a KubeProxyConfiguration nor an EbpfProxyConfiguration"]),
        ("# nothing\n---\n", ["f: has neither a KubeProxyConfiguration nor an EbpfProxyConfiguration"]),
        ("5", ["f: is not a mapping"]),
        ("[]", ["f: is not a mapping"]),
        ("{}", ["f: kind: None is neither KubeProxyConfiguration nor EbpfProxyConfiguration"]),
        (
            text_of({"kind": "ConfigMap", "apiVersion": "v1"}, KUBE_PROXY),
            ["f: document 1: kind: 'ConfigMap' is neither KubeProxyConfiguration nor EbpfProxyConfiguration"],
        ),
        (
            text_of({**KUBE_PROXY, "apiVersion": "kubeproxy.config.k8s.io/v1alpha2"}),
            ["f: apiVersion: 'kubeproxy.config.k8s.io/v1alpha2' is not kubeproxy.config.k8s.io/v1alpha1"],
        ),
        (text_of({"kind": "EbpfProxyConfiguration"}), ["f: apiVersion: None is not ebpfproxy.io/v1alpha1"]),
        (
            text_of(KUBE_PROXY, OWN, KUBE_PROXY, OWN),
            [
                "f: document 3: kind: a second KubeProxyConfiguration",
                "f: document 4: kind: a second EbpfProxyConfiguration",
            ],
        ),
        ("kind: [\n", ["f: line 2, column 1: did not find expected node content"]),
        ("a: b: c", ["f: line 1, column 5: mapping values are not allowed in this context"]),
        ("a: !!python/name:os.system x", None),
        ("? [1]\n: 2", None),
        ("&a [*a]", ["f: is not a mapping"]),
        ("[" * 100_000, ["f: nested more than 100 deep"]),
        (("[" * 10_000).encode("utf-16"), ["f: nested more than 100 deep"]),
        ("\r".join(f"{' ' * i}a:" for i in range(500)), ["f: nested more than 100 deep"]),
        ("\n".join(f"? &a{i} [{f'*a{i - 1}' if i else 'x'}]\n: 1" for i in range(1500)), None),
        ("a: \udcff", None),
        ("a: 0x_", None),
        ('a: !!timestamp "x"', None),
    ],
)
def test_texts_that_are_not_a_configuration_are_rejected(
    text: str | bytes, message: list[str] | None
) -> None:
    found = errors(text)
    assert found == message if message is not None else len(found) == 1 and found[0].startswith("f: ")


def test_repeated_keys_are_errors() -> None:
    text = f"{text_of(KUBE_PROXY)}mode: ipvs\nconntrack:\n  min: 1\n  max: 1\n  min: 2\nmode: iptables\nmode: ipvs\n"
    assert errors(text) == [
        "f: conntrack.min: repeated key, again in line 7",
        "f: mode: repeated key, again in line 8",
        "f: mode: repeated key, again in line 9",
        "f: conntrack.max: unknown field",
    ]


def test_aliases_and_merge_keys_are_accepted() -> None:
    text = (
        text_of(KUBE_PROXY)
        + "iptables: &a {masqueradeAll: true}\nnftables: *a\nwinkernel: {<<: {networkName: x}}\n"
    )
    found = parse(text, "f").kube_proxy
    assert found.iptables.masquerade_all
    assert found.nftables.masquerade_all
    assert found.winkernel.network_name == "x"


def test_timestamps_are_strings() -> None:
    assert (
        parse(text_of(KUBE_PROXY) + "hostnameOverride: 2026-11-20\n", "f").kube_proxy.hostname_override
        == "2026-11-20"
    )


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
    max_leaves=5,
)


# The speed of drawing values depends on the load of the machine.
@given(
    st.dictionaries(st.sampled_from([path.partition(".")[0] for path in FIELDS] + ["devices", "x"]), _JSON)
)
def test_any_values_are_read_or_rejected_with_their_field(values: dict[str, object]) -> None:
    for head in (KUBE_PROXY, OWN):
        for message in errors(text_of({**values, **head})):
            assert message.startswith("f: ")
            assert message.split(": ")[1].partition(".")[0].partition("[")[0] in {
                *values,
                "iptables",
                "nftables",
                "ipvs",
            }


# -- ignored fields


def test_defaults_have_no_ignored_field() -> None:
    for mode in ("iptables", "ipvs", "nftables"):
        assert ignored_fields(used({"mode": mode})) == []
        # A file that names every field has not set it.
        zeros = {
            name: {"syncPeriod": "0s", "minSyncPeriod": "0s"} for name in ("iptables", "ipvs", "nftables")
        }
        assert (
            ignored_fields(used({"mode": mode, "portRange": "", "winkernel": {"enableDSR": False}}, zeros))
            == []
        )


EFFECTIVE = {
    "clientConnection.kubeconfig",
    "clientConnection.qps",
    "clientConnection.burst",
    "logging.format",
    "logging.verbosity",
    "hostnameOverride",
    "healthzBindAddress",
    "metricsBindAddress",
    "bindAddressHardFail",
    "mode",
    "iptables.masqueradeAll",
    "iptables.localhostNodePorts",
    "iptables.syncPeriod",
    "ipvs.syncPeriod",
    "ipvs.scheduler",
    "nftables.masqueradeAll",
    "nftables.syncPeriod",
    "detectLocalMode",
    "detectLocal.bridgeInterface",
    "detectLocal.interfaceNamePrefix",
    "clusterCIDR",
    "nodePortAddresses",
    "oomScoreAdj",
    "conntrack.maxPerCore",
    "conntrack.min",
    "conntrack.tcpEstablishedTimeout",
    "conntrack.tcpCloseWaitTimeout",
    "conntrack.tcpBeLiberal",
    "conntrack.udpTimeout",
    "conntrack.udpStreamTimeout",
}


@pytest.mark.parametrize("path", FIELDS)
def test_fields_without_effect_are_listed_once_they_are_set(path: str) -> None:
    value = {path: FIELDS[path]}
    given: dict[str, object] = {}
    for key, each in value.items():
        *parents, name = key.split(".")
        holder = given
        for parent in parents:
            holder = holder.setdefault(parent, {})  # type: ignore[assignment]
        holder[name] = each
    if path.startswith("logging.options"):
        given["featureGates"] = {"LoggingAlphaOptions": True}
    found = [each for each in ignored_fields(used(given)) if not (each == "featureGates" and path != each)]
    assert found == ([] if path in EFFECTIVE else [path])


def test_unspecified_bind_addresses_are_not_listed_as_ignored() -> None:
    assert ignored_fields(used({"bindAddress": "::"})) == []
