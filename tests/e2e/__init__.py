"""Real agents, real BPF, real sockets: two nodes and their pods in namespaces."""
