"""Benchmarks: what it costs to go through a Service, and how fast the agent is. Ratios of one run."""
