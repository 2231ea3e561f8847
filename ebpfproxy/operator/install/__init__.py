"""Puts the agent into a cluster and takes it out: what an operator does from a kubeconfig, not on nodes.

| module | what |
|---|---|
| ``base`` | the manifests of ``deploy/base``, which the wheel has as package data |
| ``cluster_facts`` | what this cluster is: its version, what kubeadm knows |
| ``server_address`` | the address under which nodes reach the API server without Services |
| ``configuration`` | the agent's configuration file, with what a pod cannot do put right |
| ``render`` | from these to the objects |
| ``prepare`` | one after the other: from options to objects |
| ``apply`` | the objects into the cluster |
| ``rollout`` | waits for a DaemonSet's pods, and says why they are not ready |
| ``remove`` | out of the cluster: what has to be so before, and what is deleted |
| ``node_cleanup`` | what is pinned on nodes, taken away by pods of a short life |

Knows Kubernetes' objects as they are written. Must not know: BPF, maps, a node's kernel.
"""
