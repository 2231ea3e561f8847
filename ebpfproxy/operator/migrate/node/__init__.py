"""The way over and back on one node: what kube-proxy left there, what stands in the way, the steps.

May import ``operator`` and ``operator.migrate`` but not its ``cluster``; of the agent ``agent.state``,
``datapath``, ``node``, ``netlink``, ``config`` and ``services``.
"""
