"""The current content of all files that are generated, whole or in part."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

from tools.docs import commands, configuration, datapath, metrics

ROOT = Path(__file__).parents[2]
DOCS, DEPLOY = ROOT / "docs", ROOT / "deploy"
_PART = re.compile(r"(<!-- made: ([a-z-]+) -->\n).*?(<!-- end -->)", re.DOTALL)

PARTS: Mapping[str, Callable[[], str]] = {
    "own-settings": configuration.own_settings,
    "kube-proxy-settings": configuration.kube_proxy_settings,
    "metrics-kube-proxy": metrics.kube_proxys,
    "metrics-own": metrics.ours,
    "metrics-process": metrics.process,
    "alerts": metrics.alerts,
    "must-haves": datapath.must_haves,
    "maps": datapath.maps,
    "reasons": datapath.reasons,
    "packages": datapath.packages,
}


def wanted() -> dict[Path, str]:
    found = {
        DOCS / "commands.md": commands.page(),
        DEPLOY / "ebpfproxy.schema.json": configuration.schema(),
        DEPLOY / "chart" / "values.schema.json": configuration.chart_schema(),
    }
    for path in [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]:
        text = path.read_text() if path.exists() else ""
        if "<!-- made: " in text:
            found[path] = _PART.sub(lambda match: f"{match[1]}{PARTS[match[2]]()}{match[3]}", text)
    return found


def named() -> set[str]:
    """The parts that occur in some file."""
    return {match[2] for path in DOCS.glob("*.md") for match in _PART.finditer(path.read_text())}
