"""What packet programs know of this node: its devices, and the ranges of addresses of Services.

May import ``datapath.programs``, ``datapath.kernel``, ``datapath.abi`` and the values of ``services``.
"""
