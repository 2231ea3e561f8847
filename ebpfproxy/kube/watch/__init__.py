"""List and watch: one resource of the API server, kept up to date through everything that fails.

May import ``kube`` and ``logs``.
"""
