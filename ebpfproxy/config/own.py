"""EbpfProxyConfiguration, ``ebpfproxy.io/v1alpha1``: what kube-proxy's configuration has no field for.

It stands in the same file, as a document of its own. Each field has a flag (:mod:`ebpfproxy.config.flags`).
``deploy/ebpfproxy.schema.json`` is its JSON schema: ``python -m ebpfproxy.config.own`` prints it anew.
"""

from __future__ import annotations

import sys
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from ebpfproxy.config.datapath import BPFFS, MAGLEV_DEFAULT_SIZE, Capacity, Feature, StaleTcp
from ebpfproxy.config.documents import Problem
from ebpfproxy.config.masquerade_ports import PortRangeError, parse_range
from ebpfproxy.services.balancing import ALGORITHMS, NEAREST, parse_algorithm
from ebpfproxy.services.values import parse_prefix

API_VERSION = "ebpfproxy.io/v1alpha1"
KIND = "EbpfProxyConfiguration"

#: ``MAGLEV_SIZES``, which a test compares: the type checker wants them written out.
MaglevSize = Literal[251, 509, 1021, 2039, 4093, 8191, 16381, 32749, 65521, 131071]

_NAMES = ", ".join([*ALGORITHMS, *NEAREST])


class EbpfProxyConfiguration(
    msgspec.Struct, frozen=True, kw_only=True, rename="camel", forbid_unknown_fields=True
):
    """Settings of ebpfproxy's own; null: what KubeProxyConfiguration says of the same counts."""

    kind: Literal["EbpfProxyConfiguration"] = "EbpfProxyConfiguration"
    api_version: Literal["ebpfproxy.io/v1alpha1"] = "ebpfproxy.io/v1alpha1"
    bpf_root: Annotated[
        str,
        Meta(
            min_length=1,
            description="Folder on a bpffs below which maps, programs and attachments are pinned.",
        ),
    ] = str(BPFFS)
    cgroup_root: Annotated[
        str, Meta(description="cgroup v2 folder whose processes are served; empty: the cgroup v2 mount.")
    ] = ""
    manifests: Annotated[
        str,
        Meta(
            description="Folder of YAML and JSON files with Services, EndpointSlices and Nodes, read in "
            "place of a cluster's; empty: the cluster."
        ),
    ] = ""
    master: Annotated[
        str, Meta(description="URL of the API server; overrides the kubeconfig's. Empty: as that says.")
    ] = ""
    detect_local_mode: Annotated[
        Literal["Devices"] | None,
        Meta(
            description="Devices: what comes from a device that leads to pods or VMs of this node is a "
            "pod's. null: as detectLocalMode of KubeProxyConfiguration says."
        ),
    ] = None
    localhost_node_ports: Annotated[
        bool | None,
        Meta(
            description="NodePorts answer on loopback, for processes in the host's own network namespace. "
            "null: as mode, iptables.localhostNodePorts and nodePortAddresses of KubeProxyConfiguration say."
        ),
    ] = None
    node_port_guard: Annotated[
        bool,
        Meta(
            description="bind() to a Service's NodePort fails with EADDRINUSE for processes of the host's "
            "namespace. false: as with kube-proxy, which holds no port; the Service has the packets."
        ),
    ] = False
    pod_sockets: Annotated[
        bool,
        Meta(
            description="Translate at the sockets of pods, too. false: only at those of the host's network "
            "namespace; what pods send is translated in packets, behind what a service mesh redirects."
        ),
    ] = True
    external_ips: Annotated[bool, Meta(description="Serve spec.externalIPs (see CVE-2020-8554).")] = (
        msgspec.field(default=True, name="externalIPs")
    )
    devices: Annotated[
        tuple[str, ...],
        Meta(
            description="Uplinks by name: patterns such as eth*. Empty: by the Node's addresses, routes and "
            "kinds."
        ),
    ] = ()
    service_cidrs: Annotated[
        tuple[str, ...],
        Meta(
            description="CIDRs of cluster IPs, beside those of ServiceCIDR objects: what is sent to an "
            "address in them that no Service has is dropped."
        ),
    ] = msgspec.field(default=(), name="serviceCIDRs")
    bypass_netfilter: Annotated[
        bool,
        Meta(
            description="Forward masqueraded flows from the hook: faster, but no rule of a CNI or firewall "
            "sees them."
        ),
    ] = False
    masquerade_ports: Annotated[
        str,
        Meta(
            pattern="^([0-9]+-[0-9]+)?$",
            description="Source ports for masqueraded clients, FIRST-LAST. Empty: the larger gap beside "
            "net.ipv4.ip_local_port_range; without one, 32768-65535, shared with it.",
        ),
    ] = ""
    lb_algorithm: Annotated[
        str | None,
        Meta(
            description="How backends are chosen for Services that do not say so. null: as ipvs.scheduler of "
            f"KubeProxyConfiguration says. One of {_NAMES}."
        ),
    ] = None
    maglev_table_size: Annotated[
        MaglevSize,
        Meta(description="Places in the table of a Service with Maglev; the same on every node."),
    ] = MAGLEV_DEFAULT_SIZE  # type: ignore[assignment]
    stale_tcp: Annotated[
        StaleTcp,
        Meta(
            description="When TCP connections through a Service are ended: once their endpoint is gone, "
            "already when it is not ready, never. Connected UDP sockets always are."
        ),
    ] = msgspec.field(default=StaleTcp.GONE, name="staleTCP")
    stale_tcp_seconds: Annotated[
        float,
        Meta(
            ge=0,
            le=3600,
            description="For so long an endpoint that was removed may come back before its TCP connections "
            "are ended. New connections and UDP leave it at once.",
        ),
    ] = msgspec.field(default=5.0, name="staleTCPSeconds")
    socket_sweep_seconds: Annotated[
        float,
        Meta(
            ge=0.1,
            le=3600,
            description="How often what is known of sockets is compared with the sockets that there are. "
            "What is of none twice in a row is forgotten.",
        ),
    ] = 60.0
    max_conntrack: Annotated[
        int,
        Meta(ge=1024, le=1 << 26, description="Conntrack entries: two a flow, four where it is masqueraded."),
    ] = Capacity().conntrack
    max_services: Annotated[
        int,
        Meta(ge=1, le=1 << 20, description="Service ports that the maps hold, each family counted."),
    ] = Capacity().services
    max_backends: Annotated[
        int, Meta(ge=1, le=1 << 22, description="Endpoint addresses and ports that the maps hold.")
    ] = Capacity().backends
    max_slots: Annotated[
        Annotated[int, Meta(ge=1, le=1 << 27)] | None,
        Meta(
            description="Places in all selections: one a backend and service port, more with weights, a "
            "table with Maglev. null: 4 times maxBackends."
        ),
    ] = None
    max_affinity: Annotated[
        int,
        Meta(
            ge=1,
            le=1 << 24,
            description="Clients of Services with session affinity that are remembered.",
        ),
    ] = Capacity().affinity
    max_connections: Annotated[
        int,
        Meta(
            ge=1,
            le=1 << 22,
            description="Connected sockets through Services that are known; of others getpeername() is not "
            "translated, and they are not ended when their backend goes.",
        ),
    ] = Capacity().connected
    max_datagram_sockets: Annotated[
        int,
        Meta(
            ge=1,
            le=1 << 22,
            description="Unconnected UDP sockets that have sent to Services; the datagrams of others are "
            "translated in packets.",
        ),
    ] = Capacity().unconnected
    without: Annotated[
        tuple[Feature, ...], Meta(description="Features of the kernel whose fallbacks are used instead.")
    ] = ()


DEFAULTS = EbpfProxyConfiguration()


def validate(found: EbpfProxyConfiguration) -> list[Problem]:
    """What the types do not say, by path."""
    problems = []
    for index, text in enumerate(found.service_cidrs):
        if parse_prefix(text) is None:
            problems.append(Problem("", f"serviceCIDRs[{index}]", f"{text!r} is not a CIDR"))
    for index, text in enumerate(found.devices):
        if not text.strip():
            problems.append(Problem("", f"devices[{index}]", "must not be empty"))
    if found.masquerade_ports:
        try:
            parse_range(found.masquerade_ports)
        except PortRangeError as error:
            problems.append(Problem("", "masqueradePorts", str(error)))
    if found.lb_algorithm is not None:
        algorithm, remark = parse_algorithm(found.lb_algorithm)
        if algorithm is None:
            problems.append(Problem("", "lbAlgorithm", remark))
    return problems


def schema() -> dict[str, Any]:
    """The JSON schema. ``kind`` and ``apiVersion`` are required, as in a file."""
    made = msgspec.json.schema(EbpfProxyConfiguration)
    document = made["$defs"][KIND]
    document["required"] = ["kind", "apiVersion"]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **made}


def schema_text() -> str:
    """What ``deploy/ebpfproxy.schema.json`` holds."""
    return msgspec.json.format(msgspec.json.encode(schema()), indent=2).decode() + "\n"


if __name__ == "__main__":
    sys.stdout.write(schema_text())
