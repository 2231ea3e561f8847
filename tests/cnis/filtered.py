"""Pods whose policies are chains of their own addresses, as kube-router and policy engines of nftables write them.

Taken from kube-router's pkg/controllers/netpol/{network_policy_controller,pod,policy}.go: a pod's packets go through its chain
in FORWARD, and in INPUT and OUTPUT where its node is the other end; what is of an established connection passes, and so
does what the pod's own node sends; then an allow list, and what it does not name is dropped.
"""

from __future__ import annotations

from collections.abc import Iterable

from tests.cnis.calico import Policy
from tests.cnis.network import Network, load
from tests.lab import LabNode


class Filtered(Network):
    def __init__(self, title: str, policies: Iterable[Policy]) -> None:
        super().__init__(title)
        self.policies = tuple(policies)

    def finish(self, node: LabNode) -> None:
        load(node, ["nft", "-f", "-"], self._rules(node))

    def _rules(self, node: LabNode) -> str:
        chains, jumps = [], []
        for policy in self.policies:
            pod = next((each for each in node.pods if each.name == policy.pod), None)
            if pod is None:
                continue
            for direction, allowed, own, other in (
                ("in", policy.ingress, "daddr", "saddr"),
                ("out", policy.egress, "saddr", "daddr"),
            ):
                if allowed is None:
                    continue
                name = f"pod-{pod.name}-{direction}"
                for word, address in (("ip", pod.address), ("ip6", pod.address6)):
                    jumps.append(f"{word} {own} {address} jump {name}")
                accepts = [f"{'ip6' if ':' in each else 'ip'} {other} {each} accept" for each in allowed]
                neighbours = ["icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert } accept"]
                rules = ["ct state established,related accept", *neighbours, *accepts, "drop"]
                chains.append(f"chain {name} {{\n{chr(10).join(rules)}\n}}")
        hooks = [
            f"chain {hook} {{\ntype filter hook {hook} priority filter;\n"
            + ("fib saddr type local accept\n" if hook == "output" else "")
            + "\n".join(jumps)
            + "\n}"
            for hook in ("forward", "input", "output")
        ]
        return "\n".join(["table inet policies {", *chains, *hooks, "}", ""])
