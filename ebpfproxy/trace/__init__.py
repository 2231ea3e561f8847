"""``ebpfproxy trace``: decisions as programs report them, with the names that the agent's tables have.

``decision_sender`` needs the extra ``otlp``.
"""
