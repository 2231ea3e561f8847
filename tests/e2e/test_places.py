"""Host-network backends, tunnels and bridges; clients on the host, in pods, behind a tun device and a tagging switch."""

from __future__ import annotations

import fcntl
import json
import os
import pickle
import select
import socket
import struct
import subprocess
import sys
import time
from contextlib import closing
from typing import Any

import pytest
from scapy.compat import raw
from scapy.layers.inet import IP, TCP, UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Dot1Q, Ether
from scapy.layers.sctp import SCTP, SCTPChunkInit
from scapy.packet import Packet

from tests.e2e.outside_client import OutsideClientCluster, ask_by_socat
from tests.e2e.two_node_cluster import NODE_PORT
from tests.lab import clients, manifests, servers
from tests.lab.lab import routes_of
from tests.lab.spaces import Space
from tests.lab.waiting import until

pytestmark = pytest.mark.root


# -- host-network backends, overlays and bridges


def test_host_network_backends_of_this_and_of_another_node(cluster: OutsideClientCluster) -> None:
    for node, name, ip, balancer in (
        (cluster.a, "host-a", "10.96.1.6", "203.0.113.26"),
        (cluster.b, "host-b", "10.96.1.7", "203.0.113.27"),
    ):
        servers.start(node, name, 8080, 8053)
        cluster.add_load_balancer(name, ip, balancer, [manifests.endpoint(node.address, node.name)])
    for balancer, name in (("203.0.113.26", "host-a"), ("203.0.113.27", "host-b")):
        until(
            lambda b=balancer: cluster.outside.call(clients.connect_error, b, 80, 0.3) == "connected",  # type: ignore[misc]
            name,
        )
        assert cluster.outside.call(clients.ask_tcp, balancer, 80)["name"] == name
        assert cluster.outside.call(clients.ask_udp, balancer, 53)["from"] == (balancer, 53)


def test_backend_behind_vxlan_sees_the_address_of_the_tunnel_device(cluster: OutsideClientCluster) -> None:
    """The route to pods of node-b leads through vx0. tcpdump in the pod records both directions."""
    for node, other in ((cluster.a, cluster.b), (cluster.b, cluster.a)):
        ends = ["local", node.address, "remote", other.address]
        node.run(["ip", "link", "add", "vx0", "type", "vxlan", "id", "7", "dstport", "4789", *ends])
        node.run(["ip", "addr", "add", f"10.9.0.{node.number}/24", "dev", "vx0"])
        node.run(["ip", "link", "set", "vx0", "up"])
    cluster.a.run(["ip", "route", "replace", "10.244.2.0/24", "via", "10.9.0.2", "dev", "vx0"])
    cluster.b.run(["ip", "route", "replace", "10.244.1.0/24", "via", "10.9.0.1", "dev", "vx0"])
    cluster.add_load_balancer("overlay", "10.96.1.8", "203.0.113.28", [cluster.endpoint_on_b()])
    dump = cluster.w2.popen(
        ["tcpdump", "-nn", "-l", "-i", "eth0", "-c", "6", "tcp port 8080"], stdout=-1, stderr=-1
    )
    assert dump.stderr is not None
    while b"listening" not in dump.stderr.readline():
        pass
    until(lambda: "vx0" in cluster.a.cli("status"), "vx0 has no programs")
    until(
        lambda: cluster.outside.call(clients.connect_error, "203.0.113.28", 80, 0.3) == "connected",
        "the Service is not served",
    )
    assert cluster.outside.call(clients.ask_tcp, "203.0.113.28", 80)["peer"] == "10.9.0.1"
    assert dump.stdout is not None
    lines = [dump.stdout.readline().decode() for _ in range(6)]
    seen = {word for line in lines for word in line.split() if word.count(".") >= 4}
    hosts = {word.rstrip(":").rpartition(".")[0] for word in seen}
    assert hosts == {"10.9.0.1", cluster.w2.address}
    for node in (cluster.a, cluster.b):
        other = cluster.b if node is cluster.a else cluster.a
        node.run(["ip", "route", "replace", f"10.244.{other.number}.0/24", "via", other.address])
        node.run(["ip", "link", "del", "vx0"])


def test_pods_on_one_bridge_reach_each_other_through_a_service(cluster: OutsideClientCluster) -> None:
    """Replies are bridged and not routed: programs at the bridge ports translate them to the Service."""
    a = cluster.a
    a.run(["ip", "link", "add", "cni0", "type", "bridge"])
    a.run(["ip", "addr", "add", "10.245.1.1/24", "dev", "cni0"])
    a.run(["ip", "link", "set", "cni0", "up"])
    pods = []
    for number, name in ((2, "left"), (3, "right")):
        space = Space(f"{a.netns}-{name}", a.cgroup)
        with cluster.lab.namespace(space.netns) as inside, routes_of(a.netns) as outside:
            outside.link(
                "add", ifname=f"v{name}", kind="veth", peer={"ifname": "eth0", "net_ns_fd": space.netns}
            )
            index = outside.link_lookup(ifname=f"v{name}")[0]
            bridge = outside.link_lookup(ifname="cni0")[0]
            outside.link("set", index=index, master=bridge, state="up")
            index = inside.link_lookup(ifname="eth0")[0]
            inside.addr("add", index=index, address=f"10.245.1.{number}", prefixlen=24)
            inside.link("set", index=index, state="up")
            inside.route("add", dst="default", gateway="10.245.1.1")
        pods.append(space)
    left, right = pods
    servers.start(right, "right", 8080, 8053)
    cluster.add("bridged", "10.96.1.9", [manifests.endpoint("10.245.1.3", "node-a")])
    until(
        lambda: "vright" in json.dumps(json.loads(a.cli("status", "-o", "json"))["devices"]),
        "the device has no programs",
    )

    def ask() -> dict[str, Any]:
        """Connects by a process outside the agent's cgroup, which passes no socket hook."""
        done = left.popen(
            ["socat", "-T1", "-", "TCP:10.96.1.9:80,connect-timeout=1"],
            join_cgroup=False,
            stdin=-3,
            stdout=-1,
            stderr=-1,
        )
        text = done.communicate()[0]
        return json.loads(text) if text else {}

    until(lambda: ask().get("name") == "right", "there is no reply over the bridge")
    assert ask()["peer"] == "10.245.1.2"
    for space in pods:
        space.end()
    a.run(["ip", "link", "del", "cni0"])


# -- local clients without a socket hook


def test_host_client_without_a_socket_hook_is_served_in_packets(cluster: OutsideClientCluster) -> None:
    """Packets of such a client, such as NFS in the kernel, are translated at egress and redirected."""
    found = {ask_by_socat(cluster.a, "10.96.0.10:80")["name"] for _ in range(clients.ENOUGH)}
    assert found == {"w1", "w2"}
    assert ask_by_socat(cluster.a, "[fd00:10:96::10]:80")["name"] in found
    assert ask_by_socat(cluster.a, "10.96.0.20:80") == {}


def test_hairpin_of_a_pod_without_a_socket_hook(cluster: OutsideClientCluster) -> None:
    cluster.add("mirror", "10.96.1.10", [cluster.endpoint_on_a()])
    until(lambda: ask_by_socat(cluster.w1, "10.96.1.10:80") != {}, "the hairpin connection fails")
    reply = ask_by_socat(cluster.w1, "10.96.1.10:80")
    assert (reply["name"], reply["peer"]) == ("w1", "10.244.1.1")


def _sctp_server(address: str, port: int) -> tuple[str, int, bytes]:
    """Replies to one INIT from the address that it was sent to; returns the INIT's source and bytes."""
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, 132) as sock:
        sock.settimeout(60)
        sock.bind((address, 0))
        print("listens", flush=True)
        while True:
            packet, peer = sock.recvfrom(2048)
            body = packet[20:]
            request = SCTP(body)
            if request.dport == port:
                break
        sock.sendto(raw(SCTP(sport=port, dport=request.sport, tag=9) / SCTPChunkInit()), peer)
        return peer[0], request.sport, body


def _sctp_client(host: str, port: int, own: int) -> tuple[str, bytes]:
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, 132) as sock:
        sock.settimeout(5)
        for _ in range(10):
            sock.sendto(raw(SCTP(sport=own, dport=port, tag=0) / SCTPChunkInit(init_tag=5)), (host, 0))
            if select.select([sock], [], [], 0.5)[0]:
                packet, peer = sock.recvfrom(2048)
                return peer[0], packet[20:]
    raise TimeoutError("no reply")


def test_sctp_from_an_external_client_and_from_a_pod(cluster: OutsideClientCluster) -> None:
    """Ports are translated, so that the CRC32c has to be updated; scapy recomputes it at both ends."""
    service = manifests.service(
        "diameter",
        type="NodePort",
        clusterIPs=["10.96.1.11"],
        ports=[{"name": "sctp", "port": 3868, "protocol": "SCTP", "nodePort": 30868}],
    )
    piece = manifests.slice_of(
        "diameter", [cluster.endpoint_on_b()], ports=[{"name": "sctp", "port": 5000, "protocol": "SCTP"}]
    )
    manifests.write(cluster.manifests / "diameter.yaml", service, piece)
    until(lambda: "diameter" in cluster.a.cli("service", "list"), "the Service is not programmed")
    for client, host, port, seen in (
        (cluster.outside, cluster.a.address, 30868, cluster.a.address),
        (cluster.client, "10.96.1.11", 3868, cluster.client.address),
    ):
        script = "import sys; from tests.e2e.test_places import _sctp_server; import pickle; "
        script += f"print(pickle.dumps(_sctp_server('{cluster.w2.address}', 5000)).hex())"
        server = cluster.w2.popen([sys.executable, "-c", script], stdout=-1)
        assert server.stdout is not None
        assert server.stdout.readline() == b"listens\n"
        source, reply = client.call(_sctp_client, host, port, 4000)
        seen_source, _, request = pickle.loads(bytes.fromhex(server.stdout.read().decode()))
        assert (source, seen_source) == (host, seen)
        for packet in (request, reply):
            parsed = SCTP(packet)
            del parsed.chksum
            assert raw(parsed) == packet
        assert SCTP(reply).sport == port


# -- devices without a link layer


def _through_tun(service: str, port: int) -> tuple[str, int, str]:
    """Sends a SYN from a client behind a tun device; returns source, source port and flags of the reply."""
    tun = os.open("/dev/net/tun", os.O_RDWR)
    flags = 0x0001 | 0x1000  # IFF_TUN | IFF_NO_PI
    fcntl.ioctl(tun, 0x400454CA, struct.pack("16sH22x", b"vpn0", flags))  # TUNSETIFF
    for command in ("ip addr add 10.99.0.1/24 dev vpn0", "ip link set vpn0 up"):
        subprocess.run(command.split(), check=True)
    request = IP(src="10.99.0.2", dst=service) / TCP(sport=4321, dport=port, flags="S", seq=1)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        os.write(tun, raw(request))
        while select.select([tun], [], [], 0.5)[0]:
            reply = IP(os.read(tun, 2048))
            # The peer of an earlier connection may still retransmit.
            if TCP in reply and reply.src == service:
                os.close(tun)
                return reply.src, reply[TCP].sport, str(reply[TCP].flags)
    raise TimeoutError("no reply on the tun device")


def test_client_behind_a_tun_device_is_served_and_rejected(cluster: OutsideClientCluster) -> None:
    """Its packets have no Ethernet header: programs for such devices are compiled when one appears."""
    if not os.path.exists("/dev/net/tun"):  # noqa: PTH110
        pytest.skip("this kernel has no tun device")
    cluster.add("vpn", "10.96.1.15", [cluster.endpoint_on_a()])
    until(lambda: "vpn" in cluster.a.cli("service", "list"), "the Service is not programmed")
    assert cluster.a.call(_through_tun, "10.96.1.15", 80) == ("10.96.1.15", 80, "SA")
    assert cluster.a.call(_through_tun, "10.96.0.20", 80) == ("10.96.0.20", 80, "RA")


def _ask_beyond_tun(service: str, count: int) -> set[str]:
    """Adds a tun device that leads to a Service; returns the names of its backends that reply."""
    tun = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(tun, 0x400454CA, struct.pack("16sH22x", b"vpn1", 0x0001 | 0x1000))  # TUNSETIFF
    for command in (
        "ip address add 10.99.1.1/24 dev vpn1",
        "ip link set vpn1 up",
        f"ip route add {service} dev vpn1",
    ):
        subprocess.run(command.split(), check=True)
    deadline = time.monotonic() + 60
    # Until the agent has attached its programs, packets end in the device.
    while clients.connect_error(service, 80, 0.3) != "connected":
        assert time.monotonic() < deadline, "no reply"
    replies = [
        *clients.repeated(count, clients.ask_tcp, service, 80),
        *clients.repeated(count, clients.ask_udp, service, 53),
    ]
    os.close(tun)
    return {reply["name"] for reply in replies}


def test_client_on_the_node_whose_route_to_a_service_is_a_tun_device(cluster: OutsideClientCluster) -> None:
    """What no socket hook has seen leaves the tun device's hook for the backend, on this node and on another one."""
    if not os.path.exists("/dev/net/tun"):  # noqa: PTH110
        pytest.skip("this kernel has no tun device")
    cluster.add("beyond", "10.96.1.16", [cluster.endpoint_on_a(), cluster.endpoint_on_b()])
    until(lambda: "beyond" in cluster.a.cli("service", "list"), "the Service is not programmed")
    unhooked = Space(cluster.a.netns, None)
    assert unhooked.call(_ask_beyond_tun, "10.96.1.16", clients.ENOUGH, timeout=120) == {"w1", "w2"}


# -- frames with priority tags


def _tagged(gateway: str, own: str, host: str) -> Packet:
    """Returns the first headers of a packet in a frame whose tag has a priority alone (IEEE 802.1Q, 6.9.1)."""

    def shown(*what: str) -> Any:
        done = subprocess.run(["ip", "-j", *what], check=True, capture_output=True, text=True)
        return json.loads(done.stdout)[0]

    source = shown("link", "show", "eth0")["address"]
    frame = Ether(src=source, dst=shown("neigh", "show", gateway)["lladdr"]) / Dot1Q(prio=3, vlan=0)
    return frame / (IPv6(src=own, dst=host) if ":" in host else IP(src=own, dst=host))


def _wire() -> socket.socket:
    """Returns a socket for frames."""
    wire = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))  # ETH_P_ALL
    wire.bind(("eth0", 3))
    wire.setsockopt(263, 8, 1)  # SOL_PACKET, PACKET_AUXDATA
    return wire


def _ask_tagged(own: str, host: str, port: int, count: int) -> list[str]:
    """Returns the names in the replies to datagrams of one flow."""
    clients.ask_udp(host, port)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with closing(_wire()) as wire, socket.socket(family, socket.SOCK_DGRAM) as receiver:
        receiver.bind((own, 0))
        receiver.settimeout(5)
        frame = _tagged(host, own, host) / UDP(sport=receiver.getsockname()[1], dport=port) / b"?"
        found = []
        for _ in range(count):
            wire.send(raw(frame))
            reply, source = receiver.recvfrom(4096)
            assert source[:2] == (host, port)
            found.append(json.loads(reply)["name"])
        return found


def _open_tagged(gateway: str, own: str, host: str, port: int) -> tuple[str, bool]:
    """Sends a SYN; returns the flags of the reply, and whether it has a tag."""
    with closing(_wire()) as wire:
        wire.send(raw(_tagged(gateway, own, host) / TCP(sport=4322, dport=port, flags="S", seq=1)))
        deadline = time.monotonic() + 5
        while select.select([wire], [], [], max(deadline - time.monotonic(), 0))[0]:
            data, ((_, _, known), *_), _, _ = wire.recvmsg(2048, 64)
            reply = Ether(data)
            if TCP in reply and reply[TCP].sport == port and reply[TCP].dport == 4322:
                # struct tpacket_auxdata; TP_STATUS_VLAN_VALID
                return str(reply[TCP].flags), Dot1Q in reply or bool(
                    struct.unpack_from("I", known)[0] & 1 << 4
                )
    raise TimeoutError("no reply")


def test_client_outside_whose_frames_have_a_priority_tag(cluster: OutsideClientCluster) -> None:
    """The kernel takes such a tag for none, so that the packet is its own; what we send ourselves has no tag."""
    outside, node = cluster.outside, cluster.a
    for own, host in ((outside.address, node.address), (outside.address6, node.address6)):
        # Before, with and after a reply: the paths of new and of established flows.
        (name,) = set(outside.call(_ask_tagged, own, host, 30053, 4))
        assert name in ("w1", "w2")
        assert outside.call(_open_tagged, host, own, host, NODE_PORT) == ("SA", False)
    cluster.add_load_balancer("tagged", "10.96.1.17", "203.0.113.29", [])
    until(lambda: "tagged" in cluster.a.cli("service", "list"), "the Service is not programmed")
    assert outside.call(_open_tagged, node.address, outside.address, "203.0.113.29", 80) == ("RA", False)
