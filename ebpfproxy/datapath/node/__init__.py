"""What packet programs know of this node: its devices, its pods, and the ranges of Services' addresses.

May import ``datapath.programs``, ``datapath.kernel``, ``datapath.abi`` and the values of ``services``.
"""
