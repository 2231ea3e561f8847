"""Tests of ``ebpfproxy top``: its numbers on real maps, its lines, and its screen in a pseudo-terminal."""
