"""Prometheus metrics: kube-proxy's names where the meaning is the same, ``ebpfproxy_*`` for the rest.

``agent_metrics`` has the agent's own counters; ``map_metrics`` and ``health_metrics`` read at each scrape.
"""
