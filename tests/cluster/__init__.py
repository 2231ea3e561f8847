"""A real Kubernetes cluster on this machine, of kubeadm, kubelets and containerds, and its tests.

``KUBE_BIN`` names a folder with the binaries of one Kubernetes version (:mod:`tests.cluster.binaries`). Nodes are
namespaces of this machine with a root, a cgroup subtree and a network of their own (:mod:`tests.cluster.node_machine`).
"""
