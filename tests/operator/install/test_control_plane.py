"""The control plane's address for nodes: in which order it is looked for, and how it is written."""

from __future__ import annotations

import pytest
import yaml

from ebpfproxy.operator.api import Api
from ebpfproxy.operator.install import server_address
from ebpfproxy.operator.install.server_address import Address, AddressError
from tests.kube.files import kubeconfig
from tests.kube.test_real_api_server import TOKEN
from tests.operator.install.site import StandIn


@pytest.mark.parametrize(
    ("url", "host", "port", "text"),
    [
        ("https://cp.example:6443", "cp.example", 6443, "cp.example:6443"),
        ("https://CP.example/", "cp.example", 443, "cp.example:443"),
        ("https://10.0.0.1:8443", "10.0.0.1", 8443, "10.0.0.1:8443"),
        ("https://[FD00::1]:6443", "fd00::1", 6443, "[fd00::1]:6443"),
        ("https://[fd00::1]", "fd00::1", 443, "[fd00::1]:443"),
    ],
)
def test_a_url_becomes_host_and_port(url: str, host: str, port: int, text: str) -> None:
    found = server_address.parse(url)
    assert found == Address(host, port)
    assert str(found) == text


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("cp.example:6443", "is not https://HOST:PORT"),
        ("http://cp.example:6443", "is not https://HOST:PORT"),
        ("https://", "is not https://HOST:PORT"),
        ("https://cp.example:70000", "Port out of range"),
        ("https://cp.example:0", "port 0"),
        ("https://[fd00::1:6443", "Invalid IPv6 URL"),
        ("https://rancher.example/k8s/clusters/c-1", "more than host and port"),
        ("https://u:p@cp.example", "more than host and port"),
    ],
)
def test_what_is_no_host_and_port_is_one_line(url: str, said: str) -> None:
    with pytest.raises(AddressError, match=said) as caught:
        server_address.parse(url)
    assert url in str(caught.value)


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("::1", True),
        ("::ffff:127.0.0.1", True),
        ("0.0.0.0", True),
        ("localhost", True),
        ("kind.localhost", True),
        ("10.0.0.1", False),
        ("fd00::1", False),
        ("localhost.example", False),
    ],
)
def test_a_loopback_is_this_machines_own(host: str, expected: bool) -> None:
    assert Address(host, 6443).is_loopback == expected


def cluster_info(server: str) -> str:
    """kubeadm writes neither a name nor a context."""
    cluster = {"cluster": {"certificate-authority-data": "Q0E=", "server": server}, "name": ""}
    return yaml.safe_dump({"apiVersion": "v1", "kind": "Config", "clusters": [cluster], "contexts": None})


def find(site: StandIn, server: str | None = None) -> tuple[Address | None, str]:
    """``server``: what the kubeconfig has; the stand-in is asked all the same, as by a tunnel."""
    path, authority = site.kubeconfig, str(site.kubeconfig.parent / "ca.crt")
    if server is not None:
        path = path.with_name("vpn.conf")
        kubeconfig(path, server, {"token": TOKEN}, **{"certificate-authority": authority})
    api = Api.from_kubeconfigs(str(path), None, site.url)
    said: list[str] = []
    found = server_address.find(api, api.get("ConfigMap", "kube-system", "ebpfproxy"), said.append)
    (line,) = said
    return found, line


def test_cluster_info_goes_before_the_kubeconfig(site: StandIn) -> None:
    site.config_map("cluster-info", "kube-public", kubeconfig=cluster_info("https://[fd00::5]:6443"))
    found, said = find(site, "https://vpn.example:443")
    assert found == Address("fd00::5", 6443)
    assert said == "control plane: [fd00::5]:6443, from ConfigMap kube-public/cluster-info"


def test_without_it_the_kubeconfigs_server_counts(site: StandIn) -> None:
    found, said = find(site, "https://vpn.example")
    assert found == Address("vpn.example", 443)
    assert said.endswith("from the kubeconfig's server")


@pytest.mark.parametrize("text", ["", "clusters: []", "{", "[]", "clusters: [{cluster: {}}]"])
def test_a_cluster_info_without_a_server_is_passed_over(site: StandIn, text: str) -> None:
    site.config_map("cluster-info", "kube-public", kubeconfig=text)
    assert find(site, "https://vpn.example")[0] == Address("vpn.example", 443)


@pytest.mark.parametrize("host", ["fd00::9", "127.0.0.1"], ids=["address", "a balancer on each node"])
def test_what_an_earlier_install_was_told_stays(site: StandIn, host: str) -> None:
    address = Address(host, 6443)
    assert site.install("--api-server", f"https://{address}").exit_code == 0
    found, said = find(site, "https://vpn.example")
    assert found == address
    assert said.endswith("from ConfigMap kube-system/ebpfproxy")


def test_where_nothing_is_known_one_line_says_why(site: StandIn) -> None:
    site.config_map("cluster-info", "kube-public", kubeconfig=cluster_info("https://127.0.0.1:40001"))
    found, said = find(site)
    assert found is None
    assert said.count("\n") == 0
    assert "ConfigMap kube-public/cluster-info: 127.0.0.1:40001 is this machine's own" in said
    assert f"the kubeconfig's server: {site.url.removeprefix('https://')} is this machine's own" in said
    assert "--api-server" in said


def test_a_cluster_info_that_may_not_be_read_is_part_of_that_line(site: StandIn) -> None:
    site.server.denied.add("get configmaps")
    api = Api.from_kubeconfigs(str(site.kubeconfig))
    said: list[str] = []
    assert server_address.find(api, None, said.append) is None
    assert (
        'ConfigMap kube-public/cluster-info: 403 Forbidden: configmaps "cluster-info" is forbidden' in said[0]
    )
