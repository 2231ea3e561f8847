"""The DaemonSet's containers work with the user, capabilities and mounts of the manifest."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from ebpfproxy.datapath.abi.hooks import LOOPBACK, PACKETS, RECORDS, SOCKETS, SWEEP
from ebpfproxy.kube.control_plane import server_of
from tests.deploy import agent_work, objects
from tests.deploy.kubelet import OBJECTS, Kubelet, cache_without
from tests.deploy.runtime import Container
from tests.e2e.two_node_cluster import SERVICE_IPS, TwoNodeCluster
from tests.lab import Lab, clients
from tests.lab.holders import Holder

pytestmark = pytest.mark.root

IP = SERVICE_IPS["v4"]


@pytest.fixture(scope="module")
def kubelet() -> Iterator[Kubelet]:
    with Lab() as lab:
        yield Kubelet(TwoNodeCluster(lab))


@pytest.fixture
def loaded(kubelet: Kubelet) -> Iterator[Kubelet]:
    kubelet.cluster.write_web(kubelet.cluster.w1, kubelet.cluster.w2)
    done = kubelet.container("load").run()
    assert done.returncode == 0, done.stdout + done.stderr
    yield kubelet
    kubelet.cluster.a.cli("cleanup")


def pins(kubelet: Kubelet) -> set[str]:
    return {str(path) for path in kubelet.cluster.a.bpf_root.glob("ebpfproxy/*/progs-*/*")}


def test_conntrack_timeouts_are_set_on_the_node(loaded: Kubelet) -> None:
    """/proc/sys is read-only in the container; the node's is mounted at another path."""
    name = "net.netfilter.nf_conntrack_tcp_timeout_close_wait"
    node = loaded.cluster.a
    node.run(["sysctl", "-qw", f"{name}=60"])
    with loaded.running(loaded.container("ebpfproxy")):
        assert node.run(["sysctl", "-n", name]).strip() == "3600"


#: Allows what the agent needs, and so less than the runtimes' profile, which allows CAP_SYS_ADMIN all that it can do.
PROFILE = objects.DEPLOY / "seccomp" / "ebpfproxy.json"


@pytest.mark.parametrize("seccomp", [True, PROFILE], ids=["RuntimeDefault", "own"])
def test_agent_works_in_the_containers_of_the_daemon_set(loaded: Kubelet, seccomp: bool | Path) -> None:
    compiled = pins(loaded)
    modules = (SOCKETS, RECORDS, PACKETS, SWEEP, LOOPBACK)
    arrays = sum(module.called is not None for module in modules)
    assert len(compiled) == sum(len(module.programs) for module in modules) + arrays
    agent = loaded.container("ebpfproxy", seccomp=seccomp)
    with loaded.running(agent) as log:
        assert pins(loaded) == compiled, "the agent uses the programs of the init container"
        agent_work.check(loaded.cluster, agent, log)
    assert set(loaded.cluster.client.call(clients.spread_tcp, IP, 80, 10)) == {"w2"}, (
        "Services are still served"
    )


def test_container_has_the_restrictions_of_its_manifest(loaded: Kubelet) -> None:
    agent = loaded.container("ebpfproxy")
    with loaded.running(agent):
        lines = agent.execute("cat", "/proc/1/status").splitlines()
        status = {name: value.split() for name, _, value in (line.partition(":") for line in lines)}
        assert status["Uid"] == ["0"] * 4
        assert status["NoNewPrivs"] == ["1"]
        assert status["Seccomp"] == ["2"], "a seccomp filter"
        held = agent.execute("capsh", f"--decode={status['CapEff'][0]}").strip().partition("=")[2]
        assert set(held.split(",")) == {"cap_bpf", "cap_net_admin", "cap_perfmon", "cap_sys_admin"}
        assert status["CapEff"] == status["CapPrm"] == status["CapBnd"]
        for path in (
            "/x",
            "/etc/ebpfproxy/x",
            "/run/netns/x",
            "/var/lib/cni/results/x",
            "/sys/fs/cgroup/x",
            "/proc/sys/net/ipv4/ip_forward",
        ):
            with pytest.raises(AssertionError, match="Read-only file system"):
                agent.execute("sh", "-c", f"echo 0 >{path}")


def test_probes_succeed_once_everything_is_programmed(loaded: Kubelet) -> None:
    cluster = loaded.cluster
    spec = objects.container(OBJECTS, "ebpfproxy")
    (port,) = (each["containerPort"] for each in spec["ports"] if each["name"] == "healthz")
    probes = [spec[f"{name}Probe"]["httpGet"] for name in ("startup", "liveness", "readiness")]
    agent = loaded.container("ebpfproxy")
    with loaded.running(agent):
        for probe in probes:
            assert probe["port"] == "healthz"
            # The kubelet probes from the node.
            answer = cluster.a.run(["curl", "-s", "-m5", f"http://{cluster.a.address}:{port}{probe['path']}"])
            assert json.loads(answer)["healthy"]


def test_programs_are_compiled_and_loaded_with_the_own_profile(kubelet: Kubelet, tmp_path: Path) -> None:
    kubelet.cluster.write_web(kubelet.cluster.w1)
    cache, lacking = cache_without(RECORDS, tmp_path)
    done = kubelet.container("load", seccomp=PROFILE, volumes={"cache": cache}).run(300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert lacking.exists()
    kubelet.cluster.a.cli("cleanup")


#: Calls of libc that fail for their arguments, with any other error than EPERM, if they are allowed.
_REFUSED = """
import ctypes, errno
libc = ctypes.CDLL(None, use_errno=True)
calls = {
    "mount": (None, None, None, 0, None), "umount2": (b"", 0), "unshare": (0x7FFFFFFF,), "setns": (-1, 0x00020000),
    "sethostname": (None, -1), "swapon": (b"", 0), "ptrace": (99, 0, 0, 0), "process_vm_readv": (0, None, 0, None, 0, 0),
    "mknod": (b"/tmp/node", 0o20600, 0x101), "quotactl": (0, b"", 0, None),
}
for name, arguments in calls.items():
    result = getattr(libc, name)(*arguments)
    print(name, "allowed" if result != -1 else errno.errorcode[ctypes.get_errno()])
"""


def test_own_profile_refuses_what_sys_admin_could_do(loaded: Kubelet) -> None:
    """With it the agent's container can neither mount, nor enter other namespaces than pods' networks, nor trace."""
    outcomes = {}
    for seccomp in (True, PROFILE):
        agent = loaded.container("ebpfproxy", seccomp=seccomp)
        with loaded.running(agent):
            lines = agent.execute("python3", "-c", _REFUSED).split("\n")
            outcomes[seccomp] = dict(line.split() for line in lines if line)
    assert set(outcomes[PROFILE].values()) == {"EPERM"}
    assert {name for name, outcome in outcomes[True].items() if outcome != "EPERM"} >= {
        "mount",
        "unshare",
        "setns",
    }


@pytest.mark.parametrize(
    ("missing", "complaint"),
    [
        ("BPF", "cannot be found out without CAP_BPF"),
        ("NET_ADMIN", "cannot be found out without CAP_NET_ADMIN"),
        ("PERFMON", "do not load without CAP_PERFMON"),
    ],
)
def test_loading_fails_without(kubelet: Kubelet, missing: str, complaint: str) -> None:
    """SYS_ADMIN includes BPF and PERFMON, which remain where it is dropped.

    The seccomp profile is left out, as those of some runtimes allow bpf() with SYS_ADMIN only.
    """
    held = {"CAP_BPF", "CAP_NET_ADMIN", "CAP_PERFMON"} - {f"CAP_{missing}"}
    done = kubelet.container("load", capabilities=held, seccomp=False).run()
    assert done.returncode == 1
    assert complaint in done.stdout + done.stderr
    kubelet.cluster.a.cli("cleanup")


def test_without_sys_admin_only_sockets_of_other_namespaces_are_not_closed(loaded: Kubelet) -> None:
    cluster = loaded.cluster
    held = {"CAP_BPF", "CAP_NET_ADMIN", "CAP_PERFMON"}
    with loaded.running(loaded.container("ebpfproxy", capabilities=held, seccomp=False)) as log:
        assert set(cluster.client.call(clients.spread_tcp, IP, 80, clients.ENOUGH)) == {"w1", "w2"}
        holder = Holder(cluster.client, [("udp", "udp", IP, 53, 20)], 1.0)
        holder.wait()
        holder.watch()
        cluster.write_web(cluster.w2)
        assert not holder.result()[0]
        assert "setns: Operation not permitted" in log.read_text()


# -- a host without a bpffs


class Host:
    """A mount namespace without a bpffs at /sys/fs/bpf, which stands for the host's."""

    def __init__(self, folder: Path) -> None:
        script = "umount -l /sys/fs/bpf && echo done && exec sleep 600"
        command = ["unshare", "--mount", "--propagation", "private", "sh", "-c", script]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == b"done\n"
        self.namespaces = Path("/proc", str(self._process.pid), "ns")
        self.kubernetes = folder

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        inside = ["nsenter", f"--mount={self.namespaces}/mnt", *command]
        return subprocess.run(inside, capture_output=True, text=True, timeout=60, check=False)

    def run_container(self, container: Container) -> subprocess.CompletedProcess[str]:
        done = self.run(*container.command)
        container.remove()
        return done

    @property
    def has_bpffs(self) -> bool:
        return self.run("findmnt", "--types", "bpf", "/sys/fs/bpf").returncode == 0

    def end(self) -> None:
        self._process.kill()
        self._process.wait()


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    made = Host(tmp_path)
    yield made
    made.end()


def on(host: Host) -> dict[str, Path]:
    return {"host-ns": host.namespaces, "bpffs": Path("/sys/fs/bpf"), "kubernetes": host.kubernetes}


def test_missing_bpffs_is_mounted_on_the_host_and_pins_outlive_containers(
    kubelet: Kubelet, host: Host
) -> None:
    assert not host.has_bpffs
    done = host.run_container(kubelet.container("prepare", volumes=on(host), manifests=False))
    assert done.returncode == 0, done.stderr
    assert host.has_bpffs
    assert host.run("stat", "-c", "%a", "/sys/fs/bpf").stdout == "1700\n"
    done = host.run_container(kubelet.container("load", volumes=on(host)))
    assert done.returncode == 0, done.stderr
    found = host.run("find", "/sys/fs/bpf/ebpfproxy", "-name", "connect4").stdout.splitlines()
    assert len(found) == 1


def test_mounted_bpffs_is_not_mounted_again(kubelet: Kubelet, host: Host) -> None:
    for _ in range(2):
        done = host.run_container(kubelet.container("prepare", volumes=on(host), manifests=False))
        assert done.returncode == 0, done.stderr
    assert host.run("grep", "-c", " /sys/fs/bpf ", "/proc/self/mounts").stdout == "1\n"


@pytest.mark.parametrize("missing", ["SYS_ADMIN", "SYS_CHROOT", "SYS_PTRACE"])
def test_bpffs_is_not_mounted_without(kubelet: Kubelet, host: Host, missing: str) -> None:
    held = {"CAP_SYS_ADMIN", "CAP_SYS_CHROOT", "CAP_SYS_PTRACE"} - {f"CAP_{missing}"}
    container = kubelet.container(
        "prepare", volumes=on(host), capabilities=held, seccomp=False, manifests=False
    )
    done = host.run_container(container)
    assert done.returncode == 1
    assert done.stderr.startswith("Error: [Errno "), done.stderr
    assert done.stderr.count("\n") == 1
    assert not host.has_bpffs


KUBELET_CONF = """\
apiVersion: v1
kind: Config
clusters:
- cluster: {certificate-authority-data: Q0E=, server: "https://cp.example:6443"}
  name: kubernetes
contexts:
- context: {cluster: kubernetes, user: node}
  name: node
current-context: node
users:
- name: node
  user:
    client-certificate-data: U0VDUkVU
    client-key-data: U0VDUkVU
    token: U0VDUkVU
    exec:
      apiVersion: client.authentication.k8s.io/v1
      command: plugin
      args: ["--key", U0VDUkVU]
      env: [{name: KEY, value: U0VDUkVU}]
"""


@pytest.mark.parametrize("flow", [False, True], ids=["lines", "one line"])
def test_address_of_the_control_plane_is_copied_without_credentials(
    kubelet: Kubelet, host: Host, *, flow: bool
) -> None:
    """kubeadm writes each key on its own line; others may write the same document in one."""
    written = yaml.safe_dump(yaml.safe_load(KUBELET_CONF), default_flow_style=flow, width=10_000)
    assert (written.count("\n") == 1) is flow
    (host.kubernetes / "kubelet.conf").write_text(written)
    container = kubelet.container("prepare", volumes=on(host), manifests=False)
    done = host.run_container(container)
    assert done.returncode == 0, done.stderr
    passed = container.volume("tmp") / "kubelet.conf"
    agent = objects.container(OBJECTS, "ebpfproxy")
    (place,) = (each["value"] for each in agent["env"] if each["name"] == "EBPFPROXY_KUBELET_KUBECONFIG")
    assert place == "/tmp/kubelet.conf"
    assert server_of(passed) == "https://cp.example:6443"
    assert "U0VDUkVU" not in passed.read_text()


def test_kubeconfig_that_cannot_be_read_keeps_nobody_from_the_bpffs(kubelet: Kubelet, host: Host) -> None:
    """The agent then looks for the control plane elsewhere."""
    (host.kubernetes / "kubelet.conf").write_text("clusters: [U0VDUkVU\n")
    container = kubelet.container("prepare", volumes=on(host), manifests=False)
    done = host.run_container(container)
    assert (done.returncode, done.stderr) == (0, "")
    assert host.has_bpffs
    assert not (container.volume("tmp") / "kubelet.conf").exists()
