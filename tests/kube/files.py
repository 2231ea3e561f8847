"""Kubeconfigs for tests."""

from __future__ import annotations

from pathlib import Path

import yaml


def kubeconfig(path: Path, server: str, user: dict[str, object], **cluster: object) -> Path:
    """Writes a kubeconfig of one context with one cluster and one user."""
    path.write_text(
        yaml.safe_dump(
            {
                "apiVersion": "v1",
                "kind": "Config",
                "clusters": [{"name": "c", "cluster": {"server": server, **cluster}}],
                "users": [{"name": "u", "user": user}],
                "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
                "current-context": "x",
            }
        )
    )
    return path
