"""``python -m ebpfproxy`` is the ``ebpfproxy`` command."""

from ebpfproxy.cli import main

main(prog_name="ebpfproxy")
