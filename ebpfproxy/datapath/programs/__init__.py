"""BPF programs from source to device: compiled, loaded, pinned, attached, replaced, detached.

May import ``datapath.services``, ``datapath.kernel``, ``datapath.abi``, ``netlink`` and ``logs``.
"""
