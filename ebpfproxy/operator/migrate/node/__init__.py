"""The way over and back on one node: what kube-proxy left there, what stands in the way, the steps.

May import every package but ``cli``, ``agent`` without its ``state``, and ``operator.migrate.cluster``.
"""
