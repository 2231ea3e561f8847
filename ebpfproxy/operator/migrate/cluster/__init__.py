"""Migrates many nodes: which, in which order, and a pod on each that runs the node's steps."""
