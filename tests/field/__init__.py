"""Regression tests for faults that occurred on real nodes, with sockets and packets in a lab."""
