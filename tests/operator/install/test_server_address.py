"""The control plane's address for nodes: order of its sources, and syntax."""

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
def test_url_becomes_host_and_port(url: str, host: str, port: int, text: str) -> None:
    found = server_address.parse(url)
    assert found == Address(host, port)
    assert str(found) == text


@pytest.mark.parametrize(
    ("url", "message"),
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
def test_invalid_host_and_port_is_a_one_line_error(url: str, message: str) -> None:
    with pytest.raises(AddressError, match=message) as caught:
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
def test_loopback_addresses_are_recognized(host: str, expected: bool) -> None:
    assert Address(host, 6443).is_loopback == expected


def cluster_info(server: str) -> str:
    """Returns cluster-info as kubeadm writes it, without name and context."""
    cluster = {"cluster": {"certificate-authority-data": "Q0E=", "server": server}, "name": ""}
    return yaml.safe_dump({"apiVersion": "v1", "kind": "Config", "clusters": [cluster], "contexts": None})


def find(site: StandIn, server: str | None = None) -> tuple[Address | None, str]:
    """``server``: the address in the kubeconfig; requests go to the stand-in anyway, as through a tunnel."""
    path, authority = site.kubeconfig, str(site.kubeconfig.parent / "ca.crt")
    if server is not None:
        path = path.with_name("vpn.conf")
        kubeconfig(path, server, {"token": TOKEN}, **{"certificate-authority": authority})
    api = Api.from_kubeconfigs(str(path), None, site.url)
    message: list[str] = []
    found = server_address.find(api, api.get("ConfigMap", "kube-system", "ebpfproxy"), message.append)
    (line,) = message
    return found, line


def test_cluster_info_takes_precedence_over_the_kubeconfig(site: StandIn) -> None:
    site.config_map("cluster-info", "kube-public", kubeconfig=cluster_info("https://[fd00::5]:6443"))
    found, message = find(site, "https://vpn.example:443")
    assert found == Address("fd00::5", 6443)
    assert message == "control plane: [fd00::5]:6443, from ConfigMap kube-public/cluster-info"


def test_server_of_the_kubeconfig_is_used_without_cluster_info(site: StandIn) -> None:
    found, message = find(site, "https://vpn.example")
    assert found == Address("vpn.example", 443)
    assert message.endswith("from the kubeconfig's server")


@pytest.mark.parametrize("text", ["", "clusters: []", "{", "[]", "clusters: [{cluster: {}}]"])
def test_cluster_info_without_a_server_is_skipped(site: StandIn, text: str) -> None:
    site.config_map("cluster-info", "kube-public", kubeconfig=text)
    assert find(site, "https://vpn.example")[0] == Address("vpn.example", 443)


@pytest.mark.parametrize("host", ["fd00::9", "127.0.0.1"], ids=["address", "a balancer on each node"])
def test_address_of_an_earlier_install_is_kept(site: StandIn, host: str) -> None:
    address = Address(host, 6443)
    assert site.install("--api-server", f"https://{address}").exit_code == 0
    found, message = find(site, "https://vpn.example")
    assert found == address
    assert message.endswith("from ConfigMap kube-system/ebpfproxy")


def test_unknown_address_is_a_one_line_error_with_reasons(site: StandIn) -> None:
    site.config_map("cluster-info", "kube-public", kubeconfig=cluster_info("https://127.0.0.1:40001"))
    found, message = find(site)
    assert found is None
    assert message.count("\n") == 0
    assert "ConfigMap kube-public/cluster-info: 127.0.0.1:40001 is this machine's own" in message
    assert f"the kubeconfig's server: {site.url.removeprefix('https://')} is this machine's own" in message
    assert "--api-server" in message


def test_forbidden_cluster_info_is_part_of_that_line(site: StandIn) -> None:
    site.server.denied.add("get configmaps")
    api = Api.from_kubeconfigs(str(site.kubeconfig))
    message: list[str] = []
    assert server_address.find(api, None, message.append) is None
    assert (
        'ConfigMap kube-public/cluster-info: 403 Forbidden: configmaps "cluster-info" is forbidden'
        in message[0]
    )
