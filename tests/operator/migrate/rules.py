"""Rules of a real kube-proxy, complete or with a lab's addresses for its pods and node."""

from __future__ import annotations

import re
import subprocess

from ebpfproxy.operator.migrate.node import nfacct
from tests.data import SAMPLES

#: Restore programs and their dumps by mode.
MODES = ("iptables-legacy", "iptables-nft", "nftables")

#: The lab serves these Services of the dumps by w1 on node-a and w2 on node-b.
W1, W2 = "10.244.1.2", "10.244.2.2"
PAYMENTS, PAYMENTS_NODE_PORT = "10.96.185.91", 31317
ORDERS = "10.96.130.103"
DNS = "10.96.0.10"
#: This is added to the dumps, which have no UDP NodePort.
DNS_NODE_PORT = 30053
_PODS = {
    "10.244.2.6": W1,  # shop/payments
    "10.244.3.6": W2,
    "10.244.1.8": W1,  # shop/orders-api
    "10.244.2.8": W2,
    "10.244.2.10": W2,
    "192.168.77.1": "172.18.0.1",  # the node
}
_ADDRESS = re.compile("|".join(rf"\b{re.escape(address)}\b" for address in _PODS))
_DNS_CHAIN = "TCOU7JCQXEZGVUNU"


def text(name: str) -> str:
    return (SAMPLES / name).read_text()


def with_lab_addresses(text: str) -> str:
    return _ADDRESS.sub(lambda match: _PODS[match[0]], text)


def for_lab(name: str) -> str:
    """Returns a dump with the lab's addresses and a NodePort for DNS."""
    adapted = with_lab_addresses(text(name))
    if name.startswith("iptables"):
        ext, comment = f"KUBE-EXT-{_DNS_CHAIN}", '-m comment --comment "kube-system/kube-dns:dns"'
        adapted = adapted.replace(":KUBE-MARK-MASQ", f":{ext} - [0:0]\n:KUBE-MARK-MASQ", 1)
        adapted = adapted.replace(
            "-A KUBE-POSTROUTING",
            f"-A {ext} {comment} -j KUBE-MARK-MASQ\n"
            f"-A {ext} -j KUBE-SVC-{_DNS_CHAIN}\n"
            f"-A KUBE-NODEPORTS -p udp {comment} -m udp --dport {DNS_NODE_PORT} -j {ext}\n"
            "-A KUBE-POSTROUTING",
            1,
        )
    elif name.startswith("nft"):
        service = "FY5PMXPG-kube-system/kube-dns/udp/dns"
        adapted = adapted.replace(
            "elements = { tcp . 32076 : goto",
            f"elements = {{ udp . {DNS_NODE_PORT} : goto external-{service}, tcp . 32076 : goto",
            1,
        )
        adapted = adapted.replace(
            f"\tchain service-{service} {{",
            f"\tchain external-{service} {{\n"
            "\t\tmeta mark set meta mark | 0x00004000\n"
            f"\t\tgoto service-{service}\n\t}}\n\n\tchain service-{service} {{",
            1,
        )
    return adapted


def load(mode: str, *, lab: bool, families: tuple[str, ...] = ("ip", "ip6")) -> None:
    """Loads rules into this network namespace, beside the existing ones."""
    read = for_lab if lab else text
    if mode == "nftables":
        listed = read("nft-list-ruleset.txt")
        at = listed.index("table ip6 kube-proxy")
        load_text(
            mode, "", "".join(part for part in (listed[:at], listed[at:]) if part.split()[1] in families)
        )
        return
    for family in families:
        load_text(mode, family, read(f"{family}tables-legacy-save.txt"))


def load_text(mode: str, family: str, dump: str) -> None:
    """Loads a dump; ``family`` is ``ip`` or ``ip6`` for one of iptables, which has one dump for each."""
    if mode == "nftables":
        _run(["nft", "-f", "-"], dump)
        return
    for name in set(nfacct.NAMES) - set(nfacct.find()):
        nfacct.add(name)
    backend = mode.removeprefix("iptables-")
    _run([f"{family}tables-{backend}-restore", "--noflush", "--counters"], _as_added(dump))


def _as_added(saved: str) -> str:
    """Returns kube-proxy's part of a dump, without the host's chain policies and kubelet's KUBE-FIREWALL."""
    foreign = re.compile(r":[A-Z]+ ACCEPT |.*\bKUBE-FIREWALL\b")
    return "\n".join(line for line in saved.splitlines() if not foreign.match(line)) + "\n"


def _run(command: list[str], stdin: str) -> None:
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}: {done.stderr}"
