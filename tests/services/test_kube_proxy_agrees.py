"""The real kube-proxy's nftables rules for the recorded cluster choose the same endpoints as ours."""

from __future__ import annotations

import re

from ebpfproxy.services.model import FrontendKind, Policy, format_address
from tests import recordings
from tests.data import SAMPLES
from tests.recordings import RecordTracker

RULES = SAMPLES / "nft-list-ruleset.txt"

Table = dict[tuple[str, str], frozenset[str]]


class Rules:
    """Returns the endpoints of each frontend in the IPv4 table of ``nft list ruleset``."""

    def __init__(self, text: str) -> None:
        table = text.split("table ip6 kube-proxy", maxsplit=1)[0]
        self._chains = dict(re.findall(r"\tchain (\S+) \{\n(.*?)\n\t\}", table, re.S))
        self._maps = dict(re.findall(r"\tmap (\S+) \{\n(.*?)\n\t\}", table, re.S))

    def endpoints(self, chain: str) -> frozenset[str]:
        body = self._chains[chain]
        found = {f"{ip}:{port}" for ip, port in re.findall(r"\d : (\S+) \. (\d+)", body)}
        found |= {f"{ip}:{port}" for ip, port in re.findall(r"goto endpoint-\S+__([\d.]+)/(\d+)", body)}
        last = re.findall(r"^\s*goto (\S+)$", body, re.M)
        return frozenset(found) if found or not last else self.endpoints(last[-1])

    def frontends(self, name: str) -> dict[str, str]:
        """Yields frontends such as ``10.96.0.1/tcp/443`` or ``tcp/30080``, each with its chain."""
        entries = re.findall(r"([\w. ]+?)(?: comment \"[^\"]*\")? : goto ([^\s,]+)", self._maps[name])
        return {key.strip().replace(" . ", "/"): chain for key, chain in entries}


def test_endpoints_of_every_frontend_equal_those_of_kube_proxy() -> None:
    tracker = RecordTracker("node-a1")
    for each in recordings.as_events(recordings.lists("final")):
        tracker.apply(each)
    tracker.drain()
    rules = Rules(RULES.read_text())
    theirs = {**rules.frontends("service-ips"), **rules.frontends("service-nodeports")}
    refused = {
        *rules.frontends("no-endpoint-services"),
        *rules.frontends("no-endpoint-nodeports"),
    }
    seen = set()
    for port in tracker.service_ports():
        for f in port.frontends:
            if len(f.address) != 4:
                continue
            number = f"{f.protocol.name.lower()}/{f.port}"
            name = number if f.kind is FrontendKind.NODE_PORT else f"{format_address(f.address)}/{number}"
            seen.add(name)
            ours = port.local if f.external is Policy.LOCAL else port.cluster
            if name in refused:
                assert not ours, name
                continue
            expected = rules.endpoints(theirs[name])
            assert {f"{format_address(b.address)}:{b.port}" for b in ours} == expected, name
    # The samples have the load balancer's address set; all their frontends are here.
    assert theirs.keys() | refused == seen
    assert len(seen) > 12
