"""What programs remember: flows, sockets, clients that stay; when they end, and their move to other maps.

May import ``datapath.kernel``, ``datapath.abi`` and the values of ``services``.
"""
