"""Commands without a capability say which one they lack, and answer what they can."""

from __future__ import annotations

import ctypes
import json
import os
import re
import struct
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.two_node_cluster import SERVICE_IPS, TwoNodeCluster
from tests.lab import Lab, clients, command, manifests
from tests.lab.command import Done

pytestmark = pytest.mark.root

AFFINE = "10.96.3.1"
WHY = "this process may not enter pods' network namespaces: CAP_SYS_ADMIN is missing"
_VERSION_3 = 0x20080522  # linux/capability.h
_BPF, _NET_ADMIN, _SYS_ADMIN = 39, 12, 21


@pytest.fixture(scope="module")
def cluster() -> Iterator[TwoNodeCluster]:
    with Lab() as lab:
        made = TwoNodeCluster(lab)
        manifests.write(
            made.manifests / "affine.yaml",
            manifests.service("affine", clusterIPs=[AFFINE], sessionAffinity="ClientIP"),
            manifests.slice_of("affine", [manifests.endpoint(made.w1.address, "node-a")]),
        )
        made.agent().start()
        assert made.client.call(clients.connect_error, AFFINE, 80) == "connected"
        yield made


def run_without(capabilities: tuple[int, ...], arguments: list[str]) -> Done:
    """Runs the command in this process, a child, which has given up the capabilities."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = ctypes.create_string_buffer(struct.pack("=Ii", _VERSION_3, 0))
    sets = ctypes.create_string_buffer(24)
    assert libc.capget(header, sets) == 0, os.strerror(ctypes.get_errno())
    held = list(struct.unpack("=6I", sets.raw[:24]))
    for number in capabilities:
        held[3 * (number // 32)] &= ~(1 << number % 32)  # effective
    assert libc.capset(header, struct.pack("=6I", *held)) == 0, os.strerror(ctypes.get_errno())
    return command.run(arguments)


def run(cluster: TwoNodeCluster, *arguments: str, without: tuple[int, ...] = (_SYS_ADMIN,)) -> Done:
    node = cluster.a
    done: Done = node.call(run_without, without, [*arguments, "--bpf-root", str(node.bpf_root)])
    return done


def test_named_pod_is_not_said_to_be_missing(cluster: TwoNodeCluster) -> None:
    done = run(cluster, "explain", cluster.client.netns, f"{SERVICE_IPS['v4']}:80")
    assert (done.code, done.output) == (2, "")
    assert done.errors == f"Error: a pod '{cluster.client.netns}' is not looked for: {WHY}\n"


def test_host_is_explained_with_reasons(cluster: TwoNodeCluster) -> None:
    """Its own namespace needs no capability, nor does the agent's socket in it."""
    done = run(cluster, "explain", "host", f"{SERVICE_IPS['v4']}:80", "-o", "json")
    assert (done.code, done.errors) == (0, "")
    report = json.loads(done.output)
    assert report["without_agent"] == ""
    assert report["explanations"][0]["notes"] == []


@pytest.mark.parametrize("address", ["203.0.113.77", "own"])
def test_address_may_be_a_pods(cluster: TwoNodeCluster, address: str) -> None:
    client = cluster.client.address if address == "own" else address
    done = run(cluster, "explain", client, f"{SERVICE_IPS['v4']}:80", "-o", "json")
    assert (done.code, done.errors) == (0, "")
    (answer,) = json.loads(done.output)["explanations"]
    assert answer["notes"][0] == f"{client} is taken for a client outside, and may be a pod's: {WHY}"


def test_traced_pod_is_not_said_to_be_unknown(cluster: TwoNodeCluster) -> None:
    done = run(cluster, "trace", "--pod", cluster.client.netns, "--count", "1")
    assert (done.code, done.errors) == (
        1,
        f"Error: a pod '{cluster.client.netns}' is not looked for: {WHY}\n",
    )


def test_agent_is_checked(cluster: TwoNodeCluster) -> None:
    done = run(cluster, "check", "-o", "json")
    assert json.loads(done.output)["agent"] == "answered"


def test_clients_with_affinity_have_no_names(cluster: TwoNodeCluster) -> None:
    """A client that is named is not said to have no entry, and none is said to be flushed."""
    done = run(cluster, "affinity", "list")
    assert (done.code, done.errors) == (0, f"names of clients are missing: {WHY}\n")
    assert re.search(r"shop/affine +http +netns:\d+ +- ", done.output)
    for verb in ("list", "flush"):
        done = run(cluster, "affinity", verb, "--client", cluster.client.netns)
        assert (done.code, done.output) == (1, "")
        assert done.errors == f"Error: which of the clients is {cluster.client.netns} is not known: {WHY}\n"
    done = run(cluster, "affinity", "flush", "--client", "203.0.113.77")
    assert (done.code, done.output) == (0, "flushed 0 clients\n")


def test_archive_says_what_it_lacks(cluster: TwoNodeCluster, tmp_path: Path) -> None:
    path = tmp_path / "node.tgz"
    assert run(cluster, "sysdump", str(path)).code == 0
    with tarfile.open(path) as archive:
        name = next(each for each in archive.getnames() if each.endswith("errors.txt"))
        errors = archive.extractfile(name)
        assert errors is not None
        assert f"namespaces.json: {WHY}\n" in errors.read().decode()


def test_refused_query_names_the_capabilities(cluster: TwoNodeCluster) -> None:
    done = run(cluster, "check", without=(_NET_ADMIN, _SYS_ADMIN))
    assert (done.code, done.output) == (2, "")
    assert done.errors == (
        "Error: query programs: Operation not permitted (this process lacks CAP_NET_ADMIN, CAP_SYS_ADMIN)\n"
    )


def test_kernel_is_not_said_to_lack_what_this_process_may_not_ask_for(cluster: TwoNodeCluster) -> None:
    why = "what this kernel has cannot be found out without CAP_BPF"
    done = run(cluster, "check", "-o", "json", without=(_BPF, _SYS_ADMIN))
    found = json.loads(done.output)
    assert f"the kernel's features: {why}" in found["unchecked"]
    assert not any("kernel" in each["what"] for each in found["findings"])
    done = run(cluster, "migrate", "plan", "-o", "json", without=(_BPF, _SYS_ADMIN))
    assert json.loads(done.output)["blockers"] == [why]
