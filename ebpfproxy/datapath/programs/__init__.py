"""BPF programs from source to device: compiled, loaded, pinned, attached, replaced, detached."""
