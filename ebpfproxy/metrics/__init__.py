"""Prometheus metrics: kube-proxy's names where the meaning is the same, ``ebpfproxy_*`` for the rest.

``agent_metrics`` has what the agent counts as it works; ``map_metrics`` and ``health_metrics`` read when
they are asked.

May import ``health``, ``datapath``, ``kube`` and ``services``.
"""
