"""What others ask about this agent over HTTP: is it healthy, may this node get traffic, its metrics.

``http`` is the server, ``server`` serves pages at one address, ``node_port`` the ports of Services, ``proxy``
says whether the agent is healthy. Knows kube-proxy's answers (pkg/proxy/healthcheck/proxy_health.go). Must
not know where the facts come from.
"""
