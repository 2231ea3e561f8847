"""The Kubernetes API: objects as they are read, and where they come from, a server or files.

Knows the few fields of each object that are read (``objects``, ``decode``); credentials and TLS (``access``,
``kubeconfig``, ``plugins``); requests, what can go wrong with them, and when they are sent again (``client``,
``failures``, ``backoff``); the API server's address for a pod (``control_plane``); list and watch
(``watch``); and manifests in a folder (``manifests``), the source without a cluster. One thing goes the other
way: Events for people (``events``).

Must not know: what a Service means, maps, BPF, the agent.
"""
