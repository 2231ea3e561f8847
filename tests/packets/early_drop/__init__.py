"""A new flow that finds no free port gets that of a flow that may end: ``bpf/lib/early_drop.h``."""
