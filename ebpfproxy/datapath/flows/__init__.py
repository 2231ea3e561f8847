"""What programs remember of flows, sockets and affinity: its end, and its migration to other maps."""
