"""Results of CNI plugins as container runtimes keep them: a lab has no runtime, but commands know pods by these."""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Iterable
from pathlib import Path


def write_result(folder: Path, netns: str, pod: str, addresses: Iterable[str]) -> None:
    """Writes what libcni caches of a pod in the namespace shop; ``netns`` is its network namespace's name."""
    made = {
        "kind": "cniCacheV1",
        "containerId": netns,
        "ifName": "eth0",
        "networkName": "lab",
        "cniArgs": [["IgnoreUnknown", "1"], ["K8S_POD_NAMESPACE", "shop"], ["K8S_POD_NAME", pod]],
        "result": {
            "cniVersion": "1.0.0",
            "interfaces": [{"name": "eth0", "sandbox": f"/var/run/netns/{netns}"}],
            "ips": [
                {"interface": 0, "address": str(ipaddress.ip_interface(address))} for address in addresses
            ],
        },
    }
    (folder / f"lab-{netns}-eth0").write_text(json.dumps(made))
