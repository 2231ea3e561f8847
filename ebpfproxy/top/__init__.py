"""Services and their backends by what happens to them now: ``ebpfproxy top``.

``reading`` copies what programs count, ``comparison`` says what two readings differ in, as ``rows``. None of
them prints.
"""
