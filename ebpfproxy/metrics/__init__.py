"""Prometheus metrics: kube-proxy's names where the meaning is the same, ``ebpfproxy_*`` for the rest.

``agent`` has what the agent counts as it works; ``maps`` and ``health`` read when they are asked.
"""
