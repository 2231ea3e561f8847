"""What packet programs know of this node: its devices, and the ranges of addresses of Services.

May import ``datapath.abi``, ``datapath.kernel`` and ``datapath.programs``.
"""
