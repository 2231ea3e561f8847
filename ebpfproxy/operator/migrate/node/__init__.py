"""Migrates one node: what kube-proxy left there, what blocks a migration, and the steps.

May import ``operator`` and ``operator.migrate`` but not its ``cluster``; of the agent ``agent.state``,
``datapath``, ``node``, ``netlink``, ``config`` and ``services``.
"""
