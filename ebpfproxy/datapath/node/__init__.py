"""What packet programs know of this node: its devices, its pods, and the ranges of Services' addresses."""
