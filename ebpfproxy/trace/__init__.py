"""``ebpfproxy trace``: decisions as programs report them, with the names that the agent's tables have.

May import ``datapath``, ``node``, ``services`` and ``otlp``. ``decision_sender`` needs the extra ``otlp``.
"""
