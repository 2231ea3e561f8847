"""What went wrong on real nodes, one test a fault, with real sockets and packets in the lab."""
