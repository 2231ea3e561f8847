"""ebpfproxy: an eBPF kube-proxy replacement, one agent per Kubernetes node.

The data flows one way::

    API server ──► kube/ ──► services/ ──► datapath/ ──► maps ──► bpf/
    manifests  ──►  (objects)   (service ports)   (entries)

``kube.objects`` has the values that kube/ hands to services/; every other package says in its
``__init__`` what it knows and what it must not know.
"""

__version__ = "0.1.0"
