"""What an operator does to a cluster or a node: install, uninstall, migrate from kube-proxy and back.

May import every package but ``cli``, and of the agent its ``state`` only.
"""
