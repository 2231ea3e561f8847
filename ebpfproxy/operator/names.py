"""Names of objects, labels and annotations that more than one module of the operator's commands uses."""

from __future__ import annotations

#: kube-proxy's and kubeadm's namespace.
SYSTEM = "kube-system"
KUBE_PROXY = "kube-proxy"
KUBEADM_CONFIG = "kubeadm-config"
#: All of an installation's objects.
AGENT = "ebpfproxy"

#: The label of the agent's objects and pods.
APP = "k8s-app"
#: Labels of nodes: with the value :data:`OFF` they keep kube-proxy, or the agent, from a node.
KUBE_PROXY_SWITCH, AGENT_SWITCH = "ebpfproxy.io/kube-proxy", "ebpfproxy.io/agent"
OFF = "off"

#: An annotation of the agent's pods: the control plane's address.
CONTROL_PLANE = "ebpfproxy.io/control-plane"
#: An annotation of a DaemonSet: the update strategy that it had before, as JSON.
UPDATE_STRATEGY = "ebpfproxy.io/update-strategy"
HELM_RELEASE = "meta.helm.sh/release-name"
