"""Agents, BPF programs and sockets on two nodes and their pods in network namespaces."""
