"""The agent of one node: the reconciler, its background work, and the order in which both start and stop."""
