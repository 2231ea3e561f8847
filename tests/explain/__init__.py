"""Tests of ``ebpfproxy explain``: against the maps, against programs, and against real connections."""
