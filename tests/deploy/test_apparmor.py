"""The AppArmor profile: what it allows by its text, and on a kernel with AppArmor (``make test-kernels``) in containers."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ebpfproxy.datapath.abi.hooks import RECORDS
from ebpfproxy.datapath.kernel.roots import PIN_FOLDER
from tests.deploy import agent_work, objects
from tests.deploy.kubelet import Kubelet, cache_without
from tests.e2e.two_node_cluster import SERVICE_IPS, TwoNodeCluster
from tests.lab import Lab, clients

PROFILE = objects.DEPLOY / "apparmor" / "ebpfproxy"
SECCOMP = objects.DEPLOY / "seccomp" / "ebpfproxy.json"
TOP = Path(__file__).parents[2]
_KERNEL = Path("/sys/kernel/security/apparmor")
#: What a process without a profile may do with them is what the profile alone refuses.
_CAPABILITIES = (
    *("BPF", "NET_ADMIN", "PERFMON", "SYS_ADMIN", "DAC_OVERRIDE", "DAC_READ_SEARCH", "MKNOD"),
    *("NET_RAW", "SYS_MODULE", "SYS_PTRACE", "SETUID"),
)


def test_profile_has_the_capabilities_and_the_writable_volumes_of_the_manifest() -> None:
    text = PROFILE.read_text()
    spec = objects.container(objects.base(), "ebpfproxy")
    granted = {each.upper() for each in re.findall(r"^  capability (\w+),$", text, re.MULTILINE)}
    assert granted == set(spec["securityContext"]["capabilities"]["add"])
    rules = re.findall(r"^  (/\S+) (\w+),$", text, re.MULTILINE)
    assert rules
    # A rule for a folder alone does not allow to make something in it.
    written = [
        path.partition("{,*")[0] for path, access in rules if "w" in access and not path.endswith(("/", "/}"))
    ]
    for each in spec["volumeMounts"]:
        folder = each["mountPath"]
        assert any(path.startswith(folder) for path, _ in rules), folder
        assert any(path.startswith(folder) for path in written) != each.get("readOnly", False), folder
    (bpffs,) = (each["value"] for each in spec["env"] if each["name"] == "EBPFPROXY_BPF_ROOT")
    assert [path for path in written if path.startswith(bpffs)] == [f"{bpffs}/{PIN_FOLDER}/"]


@pytest.mark.skipif(shutil.which("apparmor_parser") is None, reason="no apparmor_parser (Debian: apparmor)")
def test_profile_compiles() -> None:
    command = ["apparmor_parser", "--skip-kernel-load", "--skip-cache", "--abort-on-error", str(PROFILE)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


# -- in containers


@pytest.fixture(scope="module")
def kubelet() -> Iterator[Kubelet]:
    if not (_KERNEL / "profiles").exists():
        pytest.skip("no AppArmor in this kernel: make test-kernels")
    if "EBPFPROXY_OWN_MACHINE" not in os.environ:
        pytest.skip("a profile is the machine's: make test-kernels")
    # The image is this machine's root with the checkout, and Python's packages in it.
    local = Path("/etc/apparmor.d/local/ebpfproxy")
    local.parent.mkdir(parents=True, exist_ok=True)
    local.write_text(f"{TOP}/{{,**}} mrix,\n")
    Path("/proc/sys/kernel/printk_ratelimit").write_text("0\n")
    subprocess.run(["apparmor_parser", "--replace", "--skip-cache", str(PROFILE)], check=True)
    with Lab() as lab:
        yield Kubelet(TwoNodeCluster(lab))
    subprocess.run(["apparmor_parser", "--remove", str(PROFILE)], check=True)


def denied() -> list[str]:
    """Returns what the kernel has logged of refusals since the last time."""
    done = subprocess.run(["dmesg", "--read-clear"], capture_output=True, text=True, check=True)
    return [line for line in done.stdout.splitlines() if 'apparmor="DENIED"' in line]


@pytest.mark.root
def test_programs_are_compiled_and_loaded_with_the_profile(kubelet: Kubelet, tmp_path: Path) -> None:
    cache, lacking = cache_without(RECORDS, tmp_path)
    denied()
    load = kubelet.container("load", seccomp=SECCOMP, app_armor="ebpfproxy", volumes={"cache": cache})
    done = load.run(600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert lacking.exists()
    assert denied() == []
    kubelet.cluster.a.cli("cleanup")


@pytest.mark.root
def test_agent_works_with_the_profile_and_nothing_that_it_does_is_refused(kubelet: Kubelet) -> None:
    cluster = kubelet.cluster
    denied()
    done = kubelet.container("load", seccomp=SECCOMP, app_armor="ebpfproxy").run()
    assert done.returncode == 0, done.stdout + done.stderr
    agent = kubelet.container("ebpfproxy", seccomp=SECCOMP, app_armor="ebpfproxy")
    with kubelet.running(agent) as log:
        assert agent.execute("cat", "/proc/1/attr/current").strip() == "ebpfproxy (enforce)"
        for path in ("/livez", "/healthz"):
            status, body = cluster.a.agent().http(path)
            assert (status, json.loads(body)["healthy"]) == (200, True)
        agent_work.check(cluster, agent, log)
        agent.execute("ebpfproxy", "check")
        agent.execute("ebpfproxy", "status", terminal=True)
        agent.execute("ebpfproxy", "top", "--once", "-i", "1s")
        with ThreadPoolExecutor() as pool:
            traced = pool.submit(agent.execute, "ebpfproxy", "trace", "--count", "1")
            while not traced.done():
                cluster.client.call(clients.spread_tcp, SERVICE_IPS["v4"], 80, 1)
                time.sleep(1)
        assert "shop/web" in traced.result()
        agent.execute("ebpfproxy", "sysdump", "/tmp/sysdump.tgz")
    cluster.a.cli("cleanup")
    assert denied() == []


#: Prints the outcome of each: "allowed", or the error. Nothing lasts that an outcome of "allowed" leaves.
_TRIED = """
import ctypes, errno, os, shutil, signal, socket, subprocess
from pathlib import Path

libc = ctypes.CDLL(None, use_errno=True)

def call(name, *arguments):
    if getattr(libc, name)(*arguments) == -1:
        raise OSError(ctypes.get_errno(), "")

def trace_child():
    child = subprocess.Popen(["sleep", "60"])
    try:
        call("ptrace", 16, child.pid, 0, 0)
    finally:
        # child.kill() takes a child that has stopped for its tracer for one that has ended, and its copy of our output
        # would stay open.
        os.kill(child.pid, signal.SIGKILL)

def write(path):
    Path(path).write_text("1")

def make_a_folder_beside_the_pins():
    os.mkdir("/host/bpf/other")
    os.rmdir("/host/bpf/other")

def execute_a_copy():
    shutil.copy("/usr/bin/true", "/tmp/copy")
    subprocess.run(["/tmp/copy"], check=True)

def load_module():
    # An empty one: without the capability this is EPERM, else ENOEXEC.
    try:
        call("syscall", 175, b"", 0, b"")
    except OSError as error:
        if error.errno != errno.ENOEXEC:
            raise

tried = {
    "trace a process": trace_child,
    "load a module": load_module,
    "read /etc/shadow": lambda: Path("/etc/shadow").read_bytes(),
    "write beside the pins": make_a_folder_beside_the_pins,
    "write a sysctl": lambda: write("/host/net/ipv4/ip_forward"),
    "write to /run": lambda: write("/run/x"),
    "execute what it wrote": execute_a_copy,
    "make a device": lambda: os.mknod("/dev/shm/kmem", 0o20600, os.makedev(1, 2)),
    "capture packets": lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0x300).close(),
    "send raw packets": lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, 255).close(),
    "mount a tmpfs": lambda: call("mount", b"none", b"/dev/shm", b"tmpfs", 0, None),
    "mount a bpffs": lambda: call("mount", b"none", b"/dev/shm", b"bpf", 0, None),
    "bind a folder": lambda: call("mount", b"/usr", b"/dev/shm", None, 0x1000, None),
    "remount": lambda: call("mount", None, b"/sys", None, 0x20 | 0x1000 | 0xE, None),
    "unmount": lambda: call("umount2", b"/var/lib/cni/results", 2),
    "become another user": lambda: os.setuid(1),
}
for name, attempt in tried.items():
    try:
        attempt()
        print(name, "allowed", sep=": ", flush=True)
    except OSError as error:
        print(name, errno.errorcode[error.errno], sep=": ", flush=True)
"""


@pytest.mark.root
def test_profile_refuses_what_the_agent_never_does_whatever_the_capabilities(kubelet: Kubelet) -> None:
    """Without a profile the same process, with the same capabilities and no seccomp filter, may do it all."""
    outcomes = {}
    for profile in ("", "ebpfproxy"):
        held = [f"CAP_{each}" for each in _CAPABILITIES]
        agent = kubelet.container("ebpfproxy", capabilities=held, seccomp=False, app_armor=profile)
        with kubelet.running(agent):
            lines = agent.execute("python3", "-c", _TRIED).splitlines()
            outcomes[profile] = dict(line.split(": ") for line in lines)
    assert set(outcomes[""].values()) == {"allowed"}, json.dumps(outcomes[""])
    assert outcomes["ebpfproxy"].keys() == outcomes[""].keys()
    assert set(outcomes["ebpfproxy"].values()) <= {"EACCES", "EPERM"}, json.dumps(outcomes["ebpfproxy"])
    kubelet.cluster.a.cli("cleanup")
