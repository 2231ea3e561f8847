"""From the API server, or from files, to events of ``ebpfproxy.objects``.

Knows HTTP, list and watch (``reflector``), credentials (``client``, ``kubeconfig``), the few fields of each
object that are read (``decode``), and manifests in a folder (``manifests``), the source without a cluster.

Must not know: what a Service means, maps, BPF, the agent.
"""
