"""Services as maps hold them: slots, backends, frontends, and the order in which they are written.

May import ``datapath.flows``, ``datapath.kernel``, ``datapath.abi`` and the values of ``services``.
"""
