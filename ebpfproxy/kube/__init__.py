"""From the API server, or from files, to events of ``ebpfproxy.objects``.

Knows HTTP, list and watch (``reflector``), credentials (``client``, ``kubeconfig``), the few fields of each
object that are read (``decode``), and manifests in a folder (``manifests``), the source without a cluster.

One thing goes the other way: Events for people (``events``, ``recorder``). ``control_plane`` chooses the API
server's address for a pod.

Must not know: what a Service means, maps, BPF, the agent.
"""
