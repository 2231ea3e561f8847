"""ebpfproxy: an eBPF kube-proxy replacement, one agent per Kubernetes node.

The data flows one way::

    API server ──► kube/ ──► services/ ──► datapath/ ──► maps ──► bpf/
    manifests  ──►  (objects)   (service ports)   (entries)

``agent`` runs this on a node, with ``node`` and ``netlink`` for the node's own network, ``health`` and
``metrics`` for those who ask, and ``config`` for its settings. ``explain`` says what would happen to a
connection, ``trace`` what happens. ``operator`` installs, migrates and checks. ``cli`` is the command.

Each package's ``__init__`` says what it holds. What it may import is a table in pyproject.toml
(``[tool.layers]``), which ``make lint`` checks.
"""

__version__ = "0.1.0"
