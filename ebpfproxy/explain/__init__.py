"""What happens to a connection, and why, without sending anything: ``ebpfproxy explain``.

``path`` walks through the hooks as bpf/ does, and asks the maps (:class:`~ebpfproxy.explain.path.Tables`) for
what programs would find there: the maps decide. ``answer`` adds the reasons, which are the agent's own rules'
(``services.reasons``), and says where the two differ. Everything is computed from its arguments: no I/O, no
clock.

Knows neither the agent nor the API.
"""
