"""A cluster of two nodes, created with kubeadm for the duration of a ``with``.

    with Cluster(folder) as cluster:
        cluster.up()
        print(cluster.kubectl("get", "nodes"))

Mounts and namespaces are those of this process (:func:`own_mounts`), so the kernel removes them with it; cgroups are
removed at the end, or by the next run.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.cluster import binaries, images, kubeadm, stores
from tests.cluster.network import Network, internal_ips, ordered
from tests.cluster.node_machine import Machine
from tests.lab import waiting
from tests.lab.spaces import Space

Object = dict[str, Any]

_CLONE_NEWNS = 0x00020000
_TOP = Path(__file__).parents[2]
_RUNTIME = f"unix://{kubeadm.SOCKET}"
_counter = iter(range(1_000_000))


def own_mounts() -> None:
    """Gives this process its own mounts: its mounts and names of network namespaces end with it.

    /run/netns is a private tmpfs, so that runs do not see each other's namespaces.
    """
    if ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWNS):
        raise OSError(ctypes.get_errno(), "unshare(CLONE_NEWNS)")
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    Path("/run/netns").mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "netns", "/run/netns"], check=True)


def until(condition: Callable[[], object], what: str, seconds: float = 120, *, every: float = 0.3) -> None:
    """Waits with a longer interval and timeout, as each check of a cluster starts a process."""
    waiting.until(condition, what, seconds, every=every)


class Node(Machine):
    """A machine with containerd and a kubelet."""

    number: int

    def start_containerd(self) -> None:
        self.popen(["containerd", "-c", "/etc/containerd/config.toml"], log=self.folder / "containerd.log")
        until(lambda: self.ctr("version", check=False), f"containerd of {self.name} answers")

    def load(self, archive: Path) -> None:
        """Imports an image from a file."""
        self.ctr("images", "import", f"/opt/images/{archive.name}")

    def ctr(self, *arguments: str, check: bool = True) -> str:
        command = ["ctr", "-a", kubeadm.SOCKET, "-n", "k8s.io", *arguments]
        return self.run(command, check=check, timeout=300)

    def start_kubelet(self) -> subprocess.Popen[Any]:
        return self.popen(["sh", "-c", kubeadm.KUBELET_SERVICE], log=self.folder / "kubelet.log")

    def pids(self) -> dict[str, int]:
        """Returns the first processes of containers by id, with PIDs of the node."""
        rows = (line.split() for line in self.ctr("tasks", "list").splitlines()[1:])
        return {row[0]: int(row[1]) for row in rows if row[2] == "RUNNING"}

    def write(self, path: str, text: str) -> None:
        place = self.path(path)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text)


class Cluster:
    """``tunnel``: pods of other nodes are reached by VXLAN instead of routes. ``count``: of nodes.

    ``primary``: the family, 4 or 6, of the nodes' first address and of Services that do not ask for one.
    """

    def __init__(self, folder: Path, *, tunnel: bool = False, count: int = 2, primary: int = 4) -> None:
        self.folder = folder
        self.network = Network(f"ec{os.getpid()}x{next(_counter)}")
        self.nodes: list[Node] = []
        self._tunnel = tunnel
        self._count = count
        self._primary = primary
        self._stack = ExitStack()
        self.kubeconfig = folder / "admin.conf"

    def __enter__(self) -> Cluster:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    # -- start

    def up(self, *, proxy: bool = False, cni: bool = True, mode: str = "nftables") -> Cluster:
        """``proxy``: with kube-proxy, as kubeadm installs it, in ``mode``. ``cni``: the nodes' networks, too."""
        self.boot()
        self.init(proxy=proxy, mode=mode)
        self.join()
        if cni:
            self.install_cni()
            self.wait_for_nodes()
        self.start_dns()
        return self

    def boot(self) -> None:
        """Starts the nodes with containerd, without any Kubernetes component."""
        self._stack.callback(self.network.remove)
        self.network.make()
        self._stack.callback(self._remove_machines)
        for number in range(1, self._count + 1):
            self._boot_machine(number)

    def _remove_machines(self) -> None:
        for node in self.nodes:
            node.remove()

    def _boot_machine(self, number: int) -> Node:
        self.network.add_node(number)
        name = f"node-{number}"
        shown = {
            binaries.KUBE_BIN: "/opt/kube",
            Path(__file__).parent: "/opt/cluster",
            images.KEPT: "/opt/images",
            _TOP: "/opt/checkout",
        }
        netns = self.network.netns(number)
        node = Node(name, netns, self.folder / name, f"{self.network.prefix}-{name}", shown)
        node.number = number
        self.nodes.append(node)
        stores.lend(images.store(), node.folder / "disk/var/lib/containerd")
        self.boot_node(node)
        return node

    def boot_node(self, node: Node, bpffs: Path | None = None) -> None:
        """Boots a node, also after :meth:`Machine.power_off`. The disk has the images already."""
        node.boot(bpffs)
        hosts = [f"{self._address(number)} node-{number}" for number in range(1, self._count + 1)]
        node.write("/etc/hosts", "\n".join(["127.0.0.1 localhost", "::1 localhost", *hosts, ""]))
        node.write("/etc/resolv.conf", "nameserver 192.0.2.53\n")
        node.write("/etc/containerd/config.toml", kubeadm.CONTAINERD)
        node.start_containerd()

    def init(self, *, proxy: bool, mode: str = "nftables") -> None:
        """``kubeadm init`` on the first node, without CoreDNS and, as a rule, without kube-proxy."""
        first = self.nodes[0]
        self.start_etcd()
        first.write("/etc/kubernetes/audit.yaml", kubeadm.AUDIT_POLICY)
        self.configure_kubeadm(mode)
        first.start_kubelet()
        skipped = ["addon/coredns", *([] if proxy else ["addon/kube-proxy"])]
        first.run(
            [
                "/opt/kube/kubeadm",
                "init",
                "--config=/etc/kubernetes/init.yaml",
                f"--skip-phases={','.join(skipped)}",
            ],
            timeout=300,
        )
        self.kubeconfig.write_text(first.path("/etc/kubernetes/admin.conf").read_text())
        # The first node runs pods as all others do. With this label the controller of EndpointSlices counts no share of
        # a Service for its zone, and gives no topology hints.
        self.kubectl("label", "node", first.name, "node-role.kubernetes.io/control-plane-")
        # kubectl validates with the API server's schema, which is served a moment after the server starts.
        check = ["kubectl", "apply", "--server-side", "--dry-run=server", "-f", "-"]
        until(lambda: self.succeeds(*check, stdin=kubeadm.dns(self._primary)), "kubectl can check objects")

    def configure_kubeadm(self, mode: str) -> None:
        """``mode``: of the kube-proxy that kubeadm installs."""
        text = kubeadm.init(binaries.kubernetes_version(), proxy_mode=mode, primary=self._primary)
        self.nodes[0].write("/etc/kubernetes/init.yaml", text)

    def _address(self, number: int) -> str:
        """Returns the first InternalIP of a node."""
        return ordered(internal_ips(number), self._primary)[0]

    def start_etcd(self) -> None:
        first = self.nodes[0]
        client, peer = "http://127.0.0.1:2379", "http://127.0.0.1:2380"
        first.popen(
            [
                "/opt/kube/etcd",
                "--data-dir=/var/lib/kubelet/etcd",
                f"--listen-client-urls={client}",
                f"--advertise-client-urls={client}",
                f"--listen-peer-urls={peer}",
                "--unsafe-no-fsync",
            ],
            log=self.folder / "etcd.log",
        )

    def join(self) -> None:
        """``kubeadm join`` on all other nodes."""
        for node in self.nodes[1:]:
            node.write("/etc/kubernetes/join.yaml", kubeadm.join(node.number, primary=self._primary))
            node.start_kubelet()
            node.run(["/opt/kube/kubeadm", "join", "--config=/etc/kubernetes/join.yaml"], timeout=300)

    def install_cni(self) -> None:
        if self._tunnel:
            self.network.tunnel_pods()
        else:
            self.network.route_pods()
        for node in self.nodes:
            self.configure_cni(node)

    def configure_cni(self, node: Node) -> None:
        node.write("/etc/cni/net.d/10-pods.conflist", kubeadm.cni(node.number, tunnel=self._tunnel))

    def wait_for_nodes(self) -> None:
        """Waits until all nodes are Ready."""
        self.kubectl("wait", "--for=condition=Ready", "node", "--all", "--timeout=120s")

    def start_dns(self) -> None:
        self.apply(kubeadm.dns(self._primary))
        first = self.nodes[0]
        command = [self.python, "-m", "tests.cluster.dns", "/opt/kube/kubectl"]
        first.popen(
            ["env", "-C", "/opt/checkout", *command, "/etc/kubernetes/admin.conf", self._address(1)],
            log=self.folder / "dns.log",
        )

    # -- service proxies

    def install_kube_proxy(self) -> None:
        """kubeadm's DaemonSet and ConfigMap, in the mode that kubeadm is configured for."""
        command = [
            "/opt/kube/kubeadm",
            "init",
            "phase",
            "addon",
            "kube-proxy",
            "--config=/etc/kubernetes/init.yaml",
        ]
        self.nodes[0].run(command)
        self.kubectl("-n", "kube-system", "rollout", "status", "daemonset/kube-proxy", "--timeout=120s")

    def remove_kube_proxy(self) -> None:
        """Deletes the objects and then the leftovers on nodes, as documented by kubeadm."""
        self.kubectl("-n", "kube-system", "delete", "daemonset/kube-proxy", "configmap/kube-proxy", "--wait")
        for node in self.nodes:
            node.run(["/opt/kube/kube-proxy", "--cleanup"])

    def install_agent(self, image: str = images.AGENT) -> str:
        return self.ebpfproxy("install", "--image", image)

    def uninstall_agent(self) -> str:
        return self.ebpfproxy("uninstall", "--cleanup", "--force")

    # -- access

    @property
    def python(self) -> str:
        """Returns this process's Python as seen on nodes."""
        return f"/opt/checkout/{Path(sys.prefix).resolve().relative_to(_TOP)}/bin/python"

    @property
    def outside(self) -> Space:
        """The host outside, which has no agent and is no node."""
        return self.network.space()

    def kubectl(self, *arguments: str, stdin: str | None = None, timeout: float = 180) -> str:
        """Runs kubectl from outside, as an administrator. Raises RuntimeError with its output."""
        return self.tool("kubectl", *arguments, stdin=stdin, timeout=timeout)

    def tool(
        self, name: str, *arguments: str, stdin: str | None = None, timeout: float = 180, check: bool = True
    ) -> str:
        """Runs a binary of ``KUBE_BIN`` from outside, with the cluster's kubeconfig. Returns its output and errors."""
        return self.command(
            [str(binaries.KUBE_BIN / name), *arguments], stdin=stdin, timeout=timeout, check=check
        )

    def ebpfproxy(self, *arguments: str, timeout: float = 300, check: bool = True) -> str:
        """Runs operator's commands of this checkout."""
        return self.command([sys.executable, "-m", "ebpfproxy", *arguments], timeout=timeout, check=check)

    def command(
        self, command: list[str], *, stdin: str | None = None, timeout: float = 180, check: bool = True
    ) -> str:
        done = subprocess.run(
            ["nsenter", f"--net=/run/netns/{self.network.outside}", *command],
            input=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT if check is False else subprocess.PIPE,
            text=True,
            timeout=timeout,
            check=False,
            env={**os.environ, "KUBECONFIG": str(self.kubeconfig)},
        )
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed ({done.returncode}): {done.stdout}{done.stderr}")
        return done.stdout

    def succeeds(self, name: str, *arguments: str, stdin: str | None = None) -> bool:
        try:
            self.tool(name, *arguments, stdin=stdin)
        except RuntimeError:
            return False
        return True

    def apply(self, text: str) -> None:
        self.kubectl("apply", "--server-side", "--force-conflicts", "-f", "-", stdin=text)

    def get(self, *arguments: str) -> Object:
        found: Object = json.loads(self.kubectl("get", "-o", "json", *arguments))
        return found

    def agent_pods(self) -> dict[str, str]:
        """Returns the names of the agents' pods by node."""
        items = self.get("-n", "kube-system", "pods", "-l", "k8s-app=ebpfproxy")["items"]
        return {item["spec"]["nodeName"]: item["metadata"]["name"] for item in items}
