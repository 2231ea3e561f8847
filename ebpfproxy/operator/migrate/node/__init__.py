"""Migrates one node: what kube-proxy left there, what blocks a migration, and the steps."""
