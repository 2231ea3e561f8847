"""Configuration of kubeadm, kubelets, containerds and CNI plugins."""

from __future__ import annotations

import json

from tests.cluster import images, network

TOKEN = "abcdef.0123456789abcdef"
API_PORT = 6443
AUDIT_LOG = "/var/log/kubernetes/audit.log"
SOCKET = "/run/containerd/containerd.sock"
DNS_ADDRESSES = ("10.96.0.10", "fd96::a")

CONTAINERD = f"""
version = 2
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{images.PAUSE}"
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "/etc/cni/net.d"
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
      SystemdCgroup = false
      BinaryName = "/opt/cluster/runc"
"""

#: Every request of the agents and of kube-proxy is recorded; of others only refused ones could matter.
AUDIT_POLICY = """
apiVersion: audit.k8s.io/v1
kind: Policy
omitStages: [RequestReceived]
rules:
- level: Metadata
  users: ["system:serviceaccount:kube-system:ebpfproxy", "system:serviceaccount:kube-system:kube-proxy"]
- level: None
"""


def cni(number: int, *, tunnel: bool) -> str:
    """``ptp`` with addresses of both families, and host ports; the MTU is the tunnel's where there is one."""
    ranges = [[{"subnet": cidr}] for cidr in network.pod_cidrs(number)]
    main = {
        "type": "ptp",
        "ipMasq": False,
        "ipam": {
            "type": "host-local",
            "dataDir": "/run/cni",
            "ranges": ranges,
            "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}],
        },
        **({"mtu": 1450} if tunnel else {}),
    }
    ports = {"type": "portmap", "capabilities": {"portMappings": True}, "snat": True}
    return json.dumps({"cniVersion": "0.4.0", "name": "pods", "plugins": [main, ports]})


def _registration(number: int, primary: int) -> str:
    ips = ",".join(network.ordered(network.internal_ips(number), primary))
    return f"""
nodeRegistration:
  name: node-{number}
  criSocket: unix://{SOCKET}
  imagePullPolicy: Never
  ignorePreflightErrors: [all]
  taints: []
  kubeletExtraArgs:
  - {{name: node-ip, value: "{ips}"}}
  - {{name: node-labels, value: "topology.kubernetes.io/zone=zone-{number}"}}
"""


def init(version: str, *, proxy_mode: str = "nftables", primary: int = 4) -> str:
    """The configuration of ``kubeadm init``: etcd is there already, on the same node.

    ``primary``: the family (4 or 6) of Services that do not ask for one, and of the control plane's address.
    """
    pods, services = (
        ",".join(network.ordered(cidrs, primary)) for cidrs in (network.POD_CIDRS, network.SERVICE_CIDRS)
    )
    address = network.ordered(network.internal_ips(1), primary)[0]
    return f"""
apiVersion: kubeadm.k8s.io/v1beta4
kind: InitConfiguration
bootstrapTokens: [{{token: {TOKEN}}}]
localAPIEndpoint: {{advertiseAddress: "{address}", bindPort: {API_PORT}}}
{_registration(1, primary)}
---
apiVersion: kubeadm.k8s.io/v1beta4
kind: ClusterConfiguration
kubernetesVersion: {version}
etcd: {{external: {{endpoints: ["http://127.0.0.1:2379"]}}}}
networking: {{podSubnet: "{pods}", serviceSubnet: "{services}"}}
apiServer:
  extraArgs:
  - {{name: audit-log-path, value: {AUDIT_LOG}}}
  - {{name: audit-policy-file, value: /etc/kubernetes/audit.yaml}}
  - {{name: kubelet-preferred-address-types, value: InternalIP}}
  extraVolumes:
  - {{name: audit-policy, hostPath: /etc/kubernetes/audit.yaml, mountPath: /etc/kubernetes/audit.yaml, readOnly: true}}
  - {{name: audit-log, hostPath: /var/log/kubernetes, mountPath: /var/log/kubernetes, pathType: DirectoryOrCreate}}
controllerManager:
  extraArgs:
  - {{name: leader-elect, value: "false"}}
  - {{name: node-cidr-mask-size-ipv4, value: "24"}}
  - {{name: node-cidr-mask-size-ipv6, value: "64"}}
scheduler:
  extraArgs: [{{name: leader-elect, value: "false"}}]
---
apiVersion: kubeproxy.config.k8s.io/v1alpha1
kind: KubeProxyConfiguration
mode: {proxy_mode}
# The kernel's limit is the machine's, which is not the node's to change.
conntrack: {{maxPerCore: 0}}
---
{_kubelet(primary)}
"""


def join(number: int, *, primary: int = 4) -> str:
    address = network.ordered(network.internal_ips(1), primary)[0]
    endpoint = f"[{address}]:{API_PORT}" if primary == 6 else f"{address}:{API_PORT}"
    return f"""
apiVersion: kubeadm.k8s.io/v1beta4
kind: JoinConfiguration
discovery:
  bootstrapToken: {{token: {TOKEN}, apiServerEndpoint: "{endpoint}", unsafeSkipCAVerification: true}}
{_registration(number, primary)}
"""


def _kubelet(primary: int) -> str:
    """cgroup v1 is deprecated but present here; a node must not evict pods for lack of space on this machine."""
    return f"""
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
cgroupDriver: cgroupfs
failCgroupV1: false
failSwapOn: false
enforceNodeAllocatable: []
evictionHard: {{}}
imageGCHighThresholdPercent: 100
clusterDNS: ["{network.ordered(DNS_ADDRESSES, primary)[0]}"]
clusterDomain: cluster.local
resolvConf: ""
makeIPTablesUtilChains: false
shutdownGracePeriod: 0s
"""


#: systemd starts the kubelet again until kubeadm has written its configuration; this waits for it.
KUBELET_SERVICE = """
until [ -f /var/lib/kubelet/config.yaml ] && [ -f /var/lib/kubelet/kubeadm-flags.env ]; do sleep 0.2; done
. /var/lib/kubelet/kubeadm-flags.env
exec /opt/kube/kubelet --bootstrap-kubeconfig=/etc/kubernetes/bootstrap-kubelet.conf \
  --kubeconfig=/etc/kubernetes/kubelet.conf --config=/var/lib/kubelet/config.yaml $KUBELET_KUBEADM_ARGS
"""


def dns(primary: int) -> str:
    """Returns the Service of the cluster's DNS and its one endpoint, the first node."""
    return f"""
apiVersion: v1
kind: Service
metadata: {{name: kube-dns, namespace: kube-system, labels: {{k8s-app: kube-dns}}}}
spec:
  clusterIP: "{network.ordered(DNS_ADDRESSES, primary)[0]}"
  ports: [{{name: dns, port: 53, protocol: UDP}}, {{name: dns-tcp, port: 53, protocol: TCP}}]
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {{name: kube-dns-node-1, namespace: kube-system, labels: {{kubernetes.io/service-name: kube-dns}}}}
addressType: IPv{primary}
ports: [{{name: dns, port: 53, protocol: UDP}}, {{name: dns-tcp, port: 53, protocol: TCP}}]
endpoints: [{{addresses: ["{network.ordered(network.internal_ips(1), primary)[0]}"], nodeName: node-1, conditions: {{ready: true}}}}]
"""
