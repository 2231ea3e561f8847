"""The kernel's bpf interface: system calls, pinned maps, features, roots, grace periods."""
