"""What an administrator, a full disk, a busy kernel or a clock do to a node."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from ebpfproxy.datapath.abi.hooks import RECORDS
from ebpfproxy.datapath.kernel.roots import pin_folder
from ebpfproxy.datapath.programs import bytecode, loader
from ebpfproxy.datapath.programs.attach import attachments
from ebpfproxy.datapath.programs.devices import link_attachments
from tests.apiserver import objects
from tests.faults import netfilter
from tests.faults.faulted import NODE_PORTS, PORT, WEB, Faulted, addresses_of
from tests.lab import Agent, Lab, clients
from tests.lab.waiting import until

pytestmark = [pytest.mark.root, pytest.mark.faults]

_QUICK = ("--drift-check-seconds", "0.5")


@contextmanager
def mounted(path: Path, kind: str, options: str) -> Iterator[None]:
    path.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", kind, "-o", options, kind, str(path)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(path)], check=False)


def change_meanwhile(faulted: Faulted) -> None:
    faulted.put_endpoints("web", "w1")
    faulted.put_endpoints("web", "w1", "w2")


@pytest.mark.parametrize("state", ["full", "read-only"])
def test_cache_on_a_disk_that_is_full_or_read_only(faulted: Faulted, tmp_path: Path, state: str) -> None:
    """The disk for compiled programs is full or read-only: what is missing there is compiled, and the agent starts."""
    faulted.agent().start().kill()
    folder = tmp_path / "disk"
    missing = loader.recipe(loader.source_folder(), RECORDS).digest()
    with mounted(folder, "tmpfs", "size=8m"):
        for file in bytecode.CACHE.iterdir():
            if file.name != missing and not file.name.startswith("."):
                shutil.copy(file, folder)
        with suppress(OSError), (folder / "filler").open("wb") as filler:
            while state == "full":
                filler.write(bytes(4096))
                filler.flush()
        if state == "read-only":
            subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
        environment = {**os.environ, "EBPFPROXY_CACHE_DIR": str(folder)}
        with faulted.under_load(f"disk for caches {state}"):
            agent = faulted.agent("--no-localhost-nodeports").start(env=environment)
            change_meanwhile(faulted)
            faulted.wait_equal()
            agent.stop()


def _is_healthy(agent: Agent) -> bool:
    with suppress(OSError):
        return agent.http("/healthz")[0] == 200
    return False


def test_log_on_a_full_disk(faulted: Faulted) -> None:
    """Where the log cannot be written (/dev/full), the agent works and ends as always."""
    with Path("/dev/full").open("wb") as full, faulted.under_load("disk for logs full"):
        agent = faulted.agent()
        agent.start(wait=False, into=full)
        # The maps may be as they should be from before.
        until(lambda: _is_healthy(agent), "the agent is not healthy")
        faulted.wait_equal()
        change_meanwhile(faulted)
        faulted.wait_equal()
        assert agent.stop() == 0


def test_tables_of_services_that_are_full(faulted: Faulted) -> None:
    """Maps of Services, backends and slots without room: what was served stays served, and all is once there is room."""
    agent = faulted.agent("--max-services", "54", "--max-backends", "230", "--max-slots", "340").start()
    faulted.wait_equal()
    with faulted.under_load("tables of Services full"):
        for number in range(20):
            name = f"more-{number}"
            made = objects.service(name, f"10.96.201.{number + 1}", namespace="shop")
            faulted.control("put", made, resource="services")
            found = [
                objects.endpoint(objects.pod_address(900_000 + 10 * number + n), "node-b") for n in range(10)
            ]
            faulted.control(
                "put", objects.endpoint_slice(name, found, namespace="shop"), resource="endpointslices"
            )
        agent.wait_log("trying again when there is room")
        # Neither may take the place of the other while both are full.
        faulted.put_endpoints("web", "w2")
        faulted.put_endpoints("web", "w2", "w1")
        for number in range(20):
            faulted.control("delete", resource="services", namespace="shop", name=f"more-{number}")
            faulted.control(
                "delete", resource="endpointslices", namespace="shop", name=f"more-{number}-x7k2p"
            )
        faulted.wait_equal()
    agent.stop()


def _fills(faulted: Faulted) -> dict[str, tuple[int, int]]:
    """The entries of each map, and the room."""
    found = json.loads(faulted.a.cli("status", "-o", "json"))["maps"]
    return {each["name"]: (each["entries"], each["capacity"]) for each in found}


def test_records_of_sockets_that_are_full(faulted: Faulted) -> None:
    """Records of sockets and affinity without room: connections work as before.

    Sockets of datagrams that find no room are translated as packets, which the node counts.
    """
    faulted.put_web_services(sessionAffinity="ClientIP")
    agent = faulted.agent(
        "--max-connections", "2", "--max-datagram-sockets", "1", "--max-affinity", "2"
    ).start()
    faulted.wait_equal()
    before = faulted.packet_events()["sockets-full"]
    with faulted.under_load("records of sockets full"):
        time.sleep(2)
        change_meanwhile(faulted)
        until(lambda: _fills(faulted)["sock_origin"] == (2, 2), "there is room for connections")
        until(
            lambda: _fills(faulted)["sock_origin_overflow"] == (2, 2), "there is room for colliding sockets"
        )
        until(lambda: _fills(faulted)["affinity"] == (2, 2), "there is room for affinity")
        assert faulted.packet_events()["sockets-full"] > before
    faulted.put_web_services()
    faulted.wait_equal()
    agent.stop()


def test_connection_tracking_that_is_full(faulted: Faulted) -> None:
    """The agent's conntrack map without room: flows that are over make room for new ones, and none that lives is lost."""
    agent = faulted.agent("--max-conntrack", "2048").start()
    with faulted.under_load("conntrack map full"):
        until(lambda: _evicted(agent) > 2048, "the map does not fill", 180, every=2)
    assert _fills(faulted)["conntrack"][1] == 2048
    faulted.wait_equal()
    agent.stop()


def _evicted(agent: Agent) -> float:
    """The entries that have made room for others so far."""
    return metric(agent, "ebpfproxy_conntrack_evicted_total")


def metric(agent: Agent, name: str) -> float:
    _, text = agent.http("/metrics", 10249)
    return sum(float(line.split()[-1]) for line in text.splitlines() if line.partition(" ")[0] == name)


def test_conntrack_of_netfilter_that_is_full(faulted: Faulted) -> None:
    """netfilter's own table full on a node that tracks: what netfilter knows goes on, what is new fails as direct ones.

    It drops packets of connections that it has no room for, those of sockets that were translated, of NodePorts and to
    a pod's own address alike, as beside kube-proxy. The agent programs changes meanwhile, and all works once there is
    room.
    """
    agent = faulted.agent().start()
    faulted.a.call(netfilter.track)
    web, _ = addresses_of(WEB)
    ways = [
        (faulted.client, web, PORT),
        (faulted.client, faulted.pods["w2"].address, 8080),
        (faulted.outside, faulted.a.address, NODE_PORTS[WEB][0]),
        (faulted.outside, faulted.pods["w1"].address, 8080),
    ]

    def errors() -> set[str]:
        return {space.call(clients.connect_error, *where, 2.0) for space, *where in ways}

    try:
        assert errors() == {"connected"}
        with faulted.under_load("netfilter's conntrack table full", ("long",)):
            time.sleep(1)
            assert faulted.a.call(netfilter.fill, 300, timeout=300) > 1000
            assert errors() == {"TimeoutError"}
            change_meanwhile(faulted)
            until(lambda: not faulted.differences(), "the change is not programmed")
            assert errors() == {"TimeoutError"}
    finally:
        faulted.a.call(netfilter.stop_tracking)
    assert errors() == {"connected"}
    with faulted.under_load("after netfilter's conntrack table was full"):
        time.sleep(1)
    faulted.wait_equal()
    agent.stop()


def test_netlink_that_overruns(faulted: Faulted) -> None:
    """More changes of devices and addresses than netlink's buffer holds, while the agent is stopped."""
    agent = faulted.agent().start()
    assert agent.process is not None
    with faulted.under_load("netlink overruns"):
        os.kill(agent.process.pid, signal.SIGSTOP)
        script = (
            "set -e; ip link add x type bridge; ip link set x up; for i in $(seq 1 1500); do "
            "at=10.77.$((i / 250)).$((i % 250 + 1))/32; echo address add $at dev x; echo address del $at dev x; "
            "done | ip -b -; ip link del x; ip address add 172.18.0.99/24 dev eth0"
        )
        faulted.a.run(["sh", "-c", script], timeout=120)
        os.kill(agent.process.pid, signal.SIGCONT)
        agent.wait_log("netlink has lost events")
        until(lambda: _serves(faulted, "172.18.0.99"), "the NodePort is not served at the new address")
        faulted.a.run(["ip", "address", "del", "172.18.0.99/24", "dev", "eth0"])
    faulted.wait_equal()
    agent.stop()


def _serves(faulted: Faulted, address: str) -> bool:
    port = NODE_PORTS[WEB][0]
    return faulted.outside.call(clients.connect_error, address, port, 1.0) == "connected"


def test_devices_that_are_deleted_in_a_loop(faulted: Faulted) -> None:
    """``ip link del`` of devices with programs, and of some that are just getting them, as pods come and go."""
    agent = faulted.agent(*_QUICK).start()
    with faulted.under_load("ip link del in a loop"):
        for n in range(60):
            faulted.a.run(
                [
                    "sh",
                    "-c",
                    f"ip link add y{n} type veth peer name z{n}; ip link set y{n} up; ip link set z{n} up",
                ]
            )
            if n % 3:
                index = faulted.a.call(socket.if_nametoindex, f"y{n}")
                until(lambda at=index: _has_programs(faulted, at), "no program is attached")  # type: ignore[misc]
            faulted.a.run(["ip", "link", "del", f"y{n}"])
        faulted.wait_equal()
    assert "Traceback" not in agent.text
    agent.stop()


def _has_programs(faulted: Faulted, ifindex: int) -> bool:
    """In both directions, as the kernel says."""
    found = link_attachments(pin_folder(faulted.a.bpf_root))
    return {each.direction for each in found if each.ifindex == ifindex} == {"ingress", "egress"}


def test_node_addresses_that_change(faulted: Faulted) -> None:
    """Addresses of the node come and go under load, on the device that clients use and on others."""
    agent = faulted.agent().start()
    with faulted.under_load("addresses of the node change"):
        for n in range(20):
            address = f"172.18.0.{100 + n}"
            faulted.a.run(["ip", "address", "add", f"{address}/24", "dev", "eth0"])
            faulted.a.run(["ip", "address", "add", f"10.78.0.{n + 1}/32", "dev", "lo"])
            if n % 5 == 0:
                until(lambda at=address: _serves(faulted, at), "the NodePort is not served at a new address")  # type: ignore[misc]
            faulted.a.run(["ip", "address", "del", f"{address}/24", "dev", "eth0"])
            faulted.a.run(["ip", "address", "del", f"10.78.0.{n + 1}/32", "dev", "lo"])
    faulted.wait_equal()
    agent.stop()


def test_second_agent_by_mistake(faulted: Faulted) -> None:
    """Another agent that is started beside the first, with the same maps or others: it ends, and changes nothing."""
    agent = faulted.agent().start()
    with faulted.under_load("another agent started by mistake"):
        for arguments in (
            (),
            ("--max-services", "2000"),
            ("--init-only",),
            ("--init-only", "--max-services", "999"),
        ):
            other = faulted.agent(*arguments).start(wait=False)
            assert other.process is not None
            assert other.process.wait(60) == 1
            assert "in use by another ebpfproxy agent" in other.text
        change_meanwhile(faulted)
    faulted.wait_equal()
    agent.stop()


@pytest.mark.parametrize("below", ["another bpffs", "a plain folder"])
def test_bpffs_that_is_unmounted(tmp_path: Path, below: str) -> None:
    """The bpffs is unmounted below a running agent: it pins all at once where the next agent, and commands, look."""
    with Lab() as lab:
        faulted = Faulted(lab)
        if below == "a plain folder":
            faulted.a.bpf_root = tmp_path / "bpf"
        folder = faulted.a.bpf_root
        folder.mkdir(parents=True)
        with mounted(folder, "bpf", "mode=0700"):
            agent = faulted.agent(*_QUICK).start()
            faulted.wait_equal()
            before = attachments(pin_folder(folder))
            with faulted.under_load(f"bpffs unmounted, below is {below}"):
                for n in range(2):
                    subprocess.run(["umount", "-l", str(folder)], check=True)
                    agent.wait_log("pinned all again", times=n + 1)
                    assert attachments(pin_folder(folder)) == before
                    change_meanwhile(faulted)
                    faulted.wait_equal()
                    if below == "another bpffs":
                        # There is nothing left to unmount.
                        break
                agent.kill()
                agent.start()
                faulted.wait_equal()
            assert attachments(pin_folder(folder)) == before
            assert "changed=nothing" in agent.text
            agent.stop()
            faulted.a.cli("cleanup")


def test_clock_that_jumps(faulted: Faulted, tmp_path: Path) -> None:
    """The agent's clock is a day ahead, a day behind, 400 days ahead, and right again: changes arrive, it is healthy.

    The system's clock is that of all tests. So a library in the agent's process alone (clock.c, LD_PRELOAD) adds these
    offsets to what ``clock_gettime`` says of CLOCK_REALTIME; the API server, and kernel time such as that of flows, go on
    as they were. An administrator cannot set the monotonic clock, which programs and agent wait by.
    """
    clock, offset = tmp_path / "clock.so", tmp_path / "offset"
    source = Path(__file__).with_name("clock.c")
    subprocess.run(["clang", "-O2", "-shared", "-fPIC", "-o", str(clock), str(source)], check=True)
    offset.write_text("0")
    environment = {**os.environ, "LD_PRELOAD": str(clock), "CLOCK_OFFSET": str(offset)}
    agent = faulted.agent(*_QUICK).start(env=environment)
    until(lambda: agent.http("/livez")[0] == 200, "the agent is not healthy")
    with faulted.under_load("the clock jumps"):
        for days in (1, -1, 400, 0):
            beside = offset.with_suffix(".new")
            beside.write_text(str(days * 86400))
            beside.rename(offset)
            change_meanwhile(faulted)
            until(lambda: not faulted.differences(), "the change does not arrive")
            assert agent.http("/livez")[0] == 200
    faulted.wait_equal()
    agent.stop()
