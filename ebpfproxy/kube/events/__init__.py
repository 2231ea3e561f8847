"""Events as ``kubectl get events`` shows them: which are sent, and how."""
