"""Events as ``kubectl get events`` shows them: which are sent, and how.

May import ``kube`` and ``logs``.
"""
