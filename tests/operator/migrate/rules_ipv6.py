"""kube-proxy's IPv6 rules, generated from its recorded IPv4 rules, because the recorded Services have no IPv6.

A test compares the rules that belong to no Service with the recorded IPv6 rules. Addresses become those of the
same pods and nodes of the lab.
"""

from __future__ import annotations

import ipaddress
import re
from typing import Any

from tests.operator.migrate import rules

#: The dumps contain these networks.
_NETWORKS = {"10.244.0.0/16": "fd00:10:244::/56", "10.96.0.0/16": "fd00:10:96::/112"}
_LAST_RULE = '-A KUBE-SERVICES -m comment --comment "kubernetes service nodeports;'
_ADDRESS = r"(\d+\.\d+\.\d+\.\d+)"


def address(v4: str) -> str:
    """Returns the lab's IPv6 address of a pod, cluster IP or node; other addresses are in fd01::/16."""
    a, b, c, d = map(int, v4.split("."))
    if (a, b) == (10, 244):
        return f"fd00:10:244:{c}::{d:x}"
    if (a, b) == (10, 96):
        return f"fd00:10:96::{c * 256 + d:x}"
    if (a, b) == (172, 18):
        return f"fd00:172:18::{d:x}"
    return str(ipaddress.ip_address(f"fd01::{a:x}:{b:x}:{c:x}:{d:x}"))


def _cidr(match: re.Match[str]) -> str:
    v4, length = match[1], int(match[2])
    if match[0] in _NETWORKS:
        return _NETWORKS[match[0]]
    # Each octet of IPv4 becomes 16 bits of IPv6.
    return f"{address(v4)}/{64 + length * 2}" if length < 32 else f"{address(v4)}/128"


def of_iptables(saved: str) -> str:
    """Returns IPv6 rules without NodePorts on loopback, and with other hashes in the names of chains, as kube-proxy."""
    lines = [line for line in saved.splitlines() if not ("localhost_nps" in line or "KUBE-FIREWALL" in line)]
    text = "\n".join(lines) + "\n"
    text = re.sub(r"\b(KUBE-(?:SVC|SVL|SEP|EXT|FW)-)(\w{16})\b", lambda m: m[1] + m[2][::-1], text)
    text = text.replace("icmp-port-unreachable", "icmp6-port-unreachable")
    text = text.replace(_LAST_RULE, _LAST_RULE.replace(" -m", " ! -d ::1/128 -m", 1))
    text = text.replace("--mask 255.255.255.255", f"--mask {':'.join(['ffff'] * 8)}")
    text = re.sub(rf"--to-destination {_ADDRESS}:", lambda m: f"--to-destination [{address(m[1])}]:", text)
    return re.sub(rf"\b{_ADDRESS}/(\d+)", _cidr, text)


def of_nft(listed: str) -> str:
    """Returns table ``ip6 kube-proxy``, generated from ``ip kube-proxy``."""
    text = listed[listed.index("table ip kube-proxy") : listed.index("table ip6 kube-proxy")]
    text = text.replace("table ip kube-proxy", "table ip6 kube-proxy").replace("ipv4_addr", "ipv6_addr")
    text = re.sub(r"\bip (saddr|daddr)\b", r"ip6 \1", text).replace("dnat ip to", "dnat ip6 to")
    text = re.sub(rf"__{_ADDRESS}/", lambda m: f"__{address(m[1]).replace(':', '.')}/", text)
    text = re.sub(rf"\b{_ADDRESS}/(\d+)", _cidr, text)
    text = re.sub(rf"\b{_ADDRESS}:(\d+)", lambda m: f"[{address(m[1])}]:{m[2]}", text)
    return re.sub(rf"\b{_ADDRESS}\b", lambda m: address(m[1]), text)


def load(mode: str) -> None:
    """Loads the rules of both families for the lab into this network namespace."""
    rules.load(mode, lab=True, families=("ip",))
    name = "nft-list-ruleset.txt" if mode == "nftables" else "iptables-legacy-save.txt"
    dump = rules.for_lab(name)
    rules.load_text(mode, "ip6", of_nft(dump) if mode == "nftables" else of_iptables(dump))


def both_families(documents: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Adds IPv6 addresses to Services, and an IPv6 EndpointSlice for each IPv4 one."""
    found = []
    for each in documents:
        spec = each.get("spec") or {}
        if each["kind"] == "Service" and spec.get("clusterIPs") not in (None, ["None"]):
            v4 = spec["clusterIPs"][0]
            spec = {**spec, "clusterIPs": [v4, address(v4)], "ipFamilies": ["IPv4", "IPv6"]}
            spec["ipFamilyPolicy"] = "RequireDualStack"
            spec["externalIPs"] = [ip for v4 in spec.get("externalIPs", ()) for ip in (v4, address(v4))]
            if ranges := spec.get("loadBalancerSourceRanges"):
                spec["loadBalancerSourceRanges"] = [
                    *ranges,
                    *(re.sub(rf"{_ADDRESS}/(\d+)", _cidr, each) for each in ranges),
                ]
            found.append({**each, "spec": spec, "status": _status(each.get("status") or {})})
        elif each["kind"] == "EndpointSlice" and each["addressType"] == "IPv4":
            found += [each, _slice(each)]
        else:
            found.append(each)
    return found


def _status(status: dict[str, Any]) -> dict[str, Any]:
    ingress = status.get("loadBalancer", {}).get("ingress", ())
    return {
        "loadBalancer": {"ingress": [{**i, "ip": ip} for i in ingress for ip in (i["ip"], address(i["ip"]))]}
    }


def _slice(ipv4: dict[str, Any]) -> dict[str, Any]:
    metadata = {**ipv4["metadata"], "name": f"{ipv4['metadata']['name']}-v6"}
    endpoints = [
        {**each, "addresses": [address(a) for a in each["addresses"]]} for each in ipv4.get("endpoints") or ()
    ]
    return {**ipv4, "metadata": metadata, "addressType": "IPv6", "endpoints": endpoints}
