"""From service ports to map entries, and from C sources to attached programs.

Knows: which maps there are (``schema``) and the layout of their bytes (``layout``, ``flow_layout``,
``node_layout``), the kernel's bpf interface (``bpf``), how programs are compiled and kept (``compiler``,
``bytecode``), loaded and pinned (``programs``) and attached (``attach``), how maps are brought to a wanted
state without a reader noticing (``writer``) and what they hold now (``dump``).

Must not know: Kubernetes' objects, HTTP, the agent or the commands.

What survives the agent, all below ``<bpf-root>/ebpfproxy/``::

    v1-5f0c21aa/            schema version and digest of the layout: structs and sizes
        maps/services4 …    the maps
        progs-3be1…/connect4 …   the programs compiled for these maps, by digest of sources and options
    links/connect4 …        the attachments; a link outlives schemas, it is what swaps programs
"""
