"""From service ports to map entries, and from C sources to attached programs.

``abi`` has the bytes that programs and agent share, ``kernel`` the bpf system call and the pinned maps,
``programs`` what compiles, loads and attaches, ``services`` brings maps to the wanted state without a reader
noticing, ``flows`` looks after what programs remember, ``node`` tells packet programs of devices and ranges,
``drift`` finds and repairs what somebody else has changed, and ``dump`` says what the maps hold now.

Must not know: Kubernetes' objects, HTTP, the agent or the commands.

What survives the agent, all below ``<bpf-root>/ebpfproxy/``::

    v1-5f0c21aa/            schema version and digest of the layout: structs and sizes
        maps/services4 …    the maps
        progs-3be1…/connect4 …   the programs compiled for these maps, by digest of sources, options and maps
    links/connect4 …        the attachments; a link outlives schemas, it is what swaps programs
"""
