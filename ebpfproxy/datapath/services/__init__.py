"""Services as maps hold them: slots, backends, frontends, and the order in which they are written.

May import ``datapath.abi``, ``datapath.kernel`` and ``datapath.flows``.
"""
