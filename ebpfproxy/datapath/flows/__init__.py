"""What programs remember of flows, sockets and affinity; its end, and its migration to maps of other sizes.

May import ``datapath.kernel``, ``datapath.abi`` and the values of ``services``.
"""
