"""What others ask about this agent over HTTP: is it healthy, may this node get traffic, its metrics.

Knows kube-proxy's answers (pkg/proxy/healthcheck/proxy_health.go). Must not know where the facts come
from. May import ``kube.objects`` and ``logs``.
"""
