"""``ebpfproxy trace``: decisions as programs report them, with the names that the agent's tables have.

May import ``datapath``, ``node`` and ``services``.
"""
