"""This node: its name, and the devices and addresses of its network namespace, from netlink.

It knows no Services, maps or API server. May import ``netlink``, ``kube.objects``, the values of
``services``, and ``logs``.
"""
