"""Connected UDP sockets whose backend is replaced are redirected without an error; resolvers of libraries."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.two_node_cluster import SERVICE_IPS, TwoNodeCluster
from tests.field.remote import Remote
from tests.lab import Lab, Pod, clients, manifests
from tests.lab.spaces import Space
from tests.lab.waiting import AT_ONCE, until

pytestmark = pytest.mark.root

DNS = "10.96.0.53"
#: Resolves distinct names until standard input ends; prints the numbers of successes and failures.
RESOLVES = r"""
#include <netdb.h>
#include <poll.h>
#include <stdio.h>
#include <sys/socket.h>

int main(void)
{
	struct pollfd in = { .fd = 0, .events = POLLIN };
	struct addrinfo hints = { .ai_family = AF_INET, .ai_socktype = SOCK_DGRAM }, *found;
	int good = 0, bad = 0;
	char name[64];

	while (!poll(&in, 1, 5)) {
		snprintf(name, sizeof(name), "n%d.test", good + bad);
		if (getaddrinfo(name, "80", &hints, &found)) {
			bad++;
			continue;
		}
		good++;
		freeaddrinfo(found);
		if (good == 1) {
			puts("begun");
			fflush(stdout);
		}
	}
	printf("%d %d\n", good, bad);
}
"""


class DnsCluster(TwoNodeCluster):
    """Adds a DNS Service with one endpoint, w1 or w2."""

    def __init__(self, lab: Lab) -> None:
        super().__init__(lab)
        self.names: dict[str, subprocess.Popen[bytes]] = {}
        for pod in (self.w1, self.w2):
            process = pod.popen([sys.executable, "-m", "tests.field.dns_server", "5353"], stdout=-1)
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            self.names[pod.name] = process
        self.write_dns(self.w1)

    def write_dns(self, pod: Pod) -> None:
        port = {"name": "dns", "port": 53, "protocol": "UDP"}
        manifests.write(
            self.manifests / "dns.yaml",
            manifests.service("dns", clusterIPs=[DNS], ports=[port]),
            manifests.slice_of(
                "dns", [manifests.endpoint(pod.address, pod.node.name)], ports=[{**port, "port": 5353}]
            ),
        )

    def replace_dns(self, times: int) -> None:
        """Replaces the endpoint several times, and stops the process of the old one."""
        for turn in range(times):
            new, old = (self.w2, self.w1) if turn % 2 == 0 else (self.w1, self.w2)
            os.kill(self.names[new.name].pid, signal.SIGCONT)
            self.write_dns(new)
            until(lambda n=new: self.backend_of(DNS) == f"{n.address}:5353")  # type: ignore[misc]
            os.kill(self.names[old.name].pid, signal.SIGSTOP)
            time.sleep(0.3)
        for process in self.names.values():
            os.kill(process.pid, signal.SIGCONT)

    def backend_of(self, ip: str) -> str:
        rows = json.loads(self.a.cli("service", "list", "-o", "json"))
        return next(
            (row["backends"][0]["address"] for row in rows if row["frontend"].startswith(f"{ip}:")), ""
        )

    def fill(self, name: str) -> int:
        status = json.loads(self.a.cli("status", "-o", "json"))
        return int(next(each["entries"] for each in status["maps"] if each["name"] == name))


@pytest.fixture(scope="module")
def cluster() -> Iterator[DnsCluster]:
    with Lab() as lab:
        found = DnsCluster(lab)
        found.agent().start()
        yield found


@pytest.fixture(params=SERVICE_IPS)
def host(request: pytest.FixtureRequest) -> str:
    return SERVICE_IPS[request.param]


@pytest.mark.parametrize("where", ["pod", "host"])
def test_connected_socket_is_redirected_without_an_error(cluster: DnsCluster, host: str, where: str) -> None:
    """While there is no endpoint send() is refused; later the socket is served again."""
    space: Space = cluster.client if where == "pod" else cluster.a
    cluster.write_web(cluster.w1)
    until(lambda: space.call(_name, host) == "w1")
    with Remote(space, host) as sock:
        sock.connect(host, 53)
        assert sock.ask() == "w1"
        cluster.write_web(cluster.w2)
        until(lambda: sock.ask(0.3) == "w2", "the socket is not redirected", AT_ONCE)
        cluster.write_web()
        until(lambda: sock.ask(0.3) == "ECONNREFUSED", "send() is not refused", AT_ONCE)
        cluster.write_web(cluster.w2)
        until(lambda: sock.ask(0.3) == "w2", "the socket is not served again", AT_ONCE)
        assert {sock.ask() for _ in range(10)} == {"w2"}


def _name(host: str) -> str:
    """The names of all that reply: a Service's endpoints before a change may be among them."""
    try:
        return " ".join(sorted(clients.spread_udp(host, 53, clients.ENOUGH)))
    except OSError as error:
        return str(error)


def test_send_does_not_fail_while_a_socket_is_redirected(cluster: DnsCluster) -> None:
    """No send() fails (EDESTADDRREQ), as clients such as those of statsd ignore errors."""
    host = SERVICE_IPS["v4"]
    cluster.write_web(cluster.w1)
    until(lambda: cluster.client.call(_name, host) == "w1")
    with Remote(cluster.client, host) as sock:
        sock.connect(host, 53)
        cluster.write_web(cluster.w2)
        until(lambda: cluster.client.call(_name, host) == "w2")
        assert {sock.send() for _ in range(50)} == {None}
        until(lambda: sock.ask(0.3) == "w2", "the socket is not redirected", AT_ONCE)


def test_connected_socket_is_refused_while_its_service_is_deleted(cluster: DnsCluster) -> None:
    host = SERVICE_IPS["v4"]
    cluster.write_web(cluster.w1)
    until(lambda: cluster.client.call(_name, host) == "w1")
    kept = manifests.read(cluster.manifests / "web.yaml")
    with Remote(cluster.client, host) as sock:
        sock.connect(host, 53)
        assert sock.ask() == "w1"
        (cluster.manifests / "web.yaml").unlink()
        until(lambda: sock.ask(0.3) == "ECONNREFUSED", "send() is not refused", AT_ONCE)
        manifests.write(cluster.manifests / "web.yaml", *kept)
        until(lambda: sock.ask(0.3) == "w1", "the socket is not served again", AT_ONCE)


def test_redirect_survives_an_agent_restart_and_is_removed_with_its_socket(cluster: DnsCluster) -> None:
    host = SERVICE_IPS["v4"]
    cluster.write_web(cluster.w1)
    until(lambda: cluster.client.call(_name, host) == "w1")
    with Remote(cluster.client, host) as sock:
        sock.connect(host, 53)
        cluster.write_web(cluster.w2)
        until(lambda: sock.ask(0.3) == "w2", "the socket is not redirected", AT_ONCE)
        cluster.lab.agents[-1].stop()
        cluster.agent("--max-services", "1000").start()
        assert sock.ask() == "w2"
        assert cluster.fill("sock_redirects") >= 1
    until(lambda: cluster.fill("sock_redirects") == 0, "the redirect of a closed socket is left")


@pytest.mark.parametrize("compiler", ["gcc", "musl-gcc"])
def test_libc_resolves_every_name_while_endpoints_are_replaced(
    cluster: DnsCluster, compiler: str, tmp_path: Path
) -> None:
    """glibc uses connected sockets, musl unconnected ones."""
    if shutil.which(compiler) is None:
        pytest.skip(f"no {compiler}")
    source, program, resolv = tmp_path / "resolves.c", tmp_path / "resolves", tmp_path / "resolv.conf"
    source.write_text(RESOLVES)
    subprocess.run([compiler, "-o", program, source], check=True)
    resolv.write_text(f"nameserver {DNS}\noptions timeout:1 attempts:4\n")
    command = f"mount --bind {resolv} /etc/resolv.conf && exec {program}"
    process = cluster.client.popen(["unshare", "-m", "sh", "-c", command], stdin=-1, stdout=-1)
    assert process.stdout is not None
    assert process.stdout.readline() == b"begun\n"
    cluster.replace_dns(4)
    good, bad = map(int, process.communicate()[0].split())
    assert good > 20
    assert bad == 0


def test_nginx_resolves_every_name_while_endpoints_are_replaced(cluster: DnsCluster, tmp_path: Path) -> None:
    """Its resolver uses one connected socket for its whole lifetime."""
    config = tmp_path / "nginx.conf"
    config.write_text(
        f"daemon off; pid {tmp_path}/pid; error_log {tmp_path}/log; events {{}}\n"
        f"http {{ access_log off; resolver {DNS} ipv6=off; resolver_timeout 4s;\n"
        + "".join(f"{kind}_temp_path {tmp_path}/{kind};" for kind in ("client_body", "proxy"))
        + "server { listen 127.0.0.1:8081; return 200 here; }\n"
        "server { listen 127.0.0.1:8082; location / { proxy_pass http://$arg_name:8081; } } }\n"
    )
    cluster.client.popen(["nginx", "-c", str(config), "-e", f"{tmp_path}/log"])
    until(lambda: cluster.client.call(_status, "first.test") == 200)
    for turn in range(4):
        cluster.replace_dns(2)
        assert [cluster.client.call(_status, f"n{turn}x{i}.test") for i in range(5)] == [200] * 5


def _status(name: str) -> int:
    answer = subprocess.run(
        ["curl", "-s", "-o", "/dev/null", "-w", "%{http_code}", f"http://127.0.0.1:8082/?name={name}"],
        capture_output=True,
        check=False,
    )
    return int(answer.stdout or 0)
