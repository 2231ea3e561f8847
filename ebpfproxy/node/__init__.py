"""This node: its name, its network namespace and its addresses, from the kernel (netlink, pyroute2).

Must not know: Services, maps, the API server. May import ``netlink``, ``kube.objects``, the values of
``services``, and ``logs``.
"""
