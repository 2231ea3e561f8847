"""Services and their backends by what happens to them now: ``ebpfproxy top``.

``reading`` copies what programs count, ``rows`` says what two readings differ in. Neither prints.

May import ``datapath`` and ``services``.
"""
