"""EbpfProxyConfiguration, ``ebpfproxy.io/v1alpha1``: settings that kube-proxy's configuration lacks.

It is a document of its own in the same file. A field here is the whole declaration of an option
(:mod:`ebpfproxy.config.declarations`); ``python -m tools.docs`` writes the JSON schema in ``deploy`` from it.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from ebpfproxy.config.datapath import (
    BPFFS,
    MAGLEV_DEFAULT_SIZE,
    MEASURED,
    Capacity,
    ExternalTraffic,
    Feature,
    StaleTcp,
    Xdp,
)
from ebpfproxy.config.declarations import Flag, described, options_of
from ebpfproxy.config.documents import Problem
from ebpfproxy.config.masquerade_ports import PortRangeError, parse_range
from ebpfproxy.config.urls import url_problem
from ebpfproxy.services.balancing import ALGORITHMS, NEAREST, parse_algorithm
from ebpfproxy.services.values import parse_prefix

API_VERSION = "ebpfproxy.io/v1alpha1"
KIND = "EbpfProxyConfiguration"

#: ``MAGLEV_SIZES``, which a test compares: the type checker wants them written out.
MaglevSize = Literal[251, 509, 1021, 2039, 4093, 8191, 16381, 32749, 65521, 131071]


class EbpfProxyConfiguration(
    msgspec.Struct, frozen=True, kw_only=True, rename="camel", forbid_unknown_fields=True
):
    """Settings that only ebpfproxy has."""

    kind: Literal["EbpfProxyConfiguration"] = "EbpfProxyConfiguration"
    api_version: Literal["ebpfproxy.io/v1alpha1"] = "ebpfproxy.io/v1alpha1"
    bpf_root: Annotated[
        str,
        Meta(
            min_length=1,
            description="Directory on a bpffs below which maps, programs and attachments are pinned.",
        ),
        Flag("--bpf-root", metavar="PATH"),
    ] = str(BPFFS)
    cgroup_root: Annotated[
        str,
        Meta(description="cgroup v2 directory whose processes are served."),
        Flag("--cgroup-root", metavar="PATH", default="the cgroup v2 mount"),
    ] = ""
    manifests: Annotated[
        str,
        Meta(
            description="Read Services, EndpointSlices and Nodes from the YAML and JSON files in this "
            "directory, not from a cluster."
        ),
        Flag("--manifests", metavar="DIR"),
    ] = ""
    master: Annotated[
        str,
        Meta(description="URL of the API server; overrides the kubeconfig's."),
        Flag("--master", metavar="URL"),
    ] = ""
    detect_local_mode: Annotated[
        Literal["Devices"] | None,
        Meta(
            description="Devices: a packet from a device that leads to a pod or VM of this node is local. "
            "null: detectLocalMode of KubeProxyConfiguration decides."
        ),
    ] = None
    localhost_node_ports: Annotated[
        bool | None,
        Meta(description="NodePorts answer on loopback, for processes in the host's network namespace."),
        Flag(
            "--localhost-nodeports",
            default="as mode, iptables.localhostNodePorts and nodePortAddresses say",
        ),
    ] = None
    node_port_guard: Annotated[
        bool,
        Meta(
            description="bind() to a Service's NodePort fails with EADDRINUSE for processes in the host's "
            "network namespace. Otherwise bind() succeeds, as with kube-proxy, and the Service receives the "
            "packets."
        ),
        Flag("--nodeport-guard"),
    ] = False
    pod_sockets: Annotated[
        bool,
        Meta(
            description="Translate at the sockets of pods as well as of the host. Otherwise traffic of pods "
            "is translated in packets, after a service mesh has redirected it."
        ),
        Flag("--pod-sockets"),
    ] = True
    external_ips: Annotated[
        bool, Meta(description="Serve spec.externalIPs (see CVE-2020-8554)."), Flag("--external-ips")
    ] = msgspec.field(default=True, name="externalIPs")
    devices: Annotated[
        tuple[str, ...],
        Meta(description="Uplinks, by names or patterns such as eth*."),
        Flag(
            "--devices",
            metavar="PATTERNS",
            default="chosen by the Node's addresses, the routes and the kinds of devices",
        ),
    ] = ()
    service_cidrs: Annotated[
        tuple[str, ...],
        Meta(
            description="CIDRs of cluster IPs, in addition to those of ServiceCIDR objects. Packets to an "
            "address in them that no Service has are dropped."
        ),
        Flag("--service-cidr", metavar="CIDRS"),
    ] = msgspec.field(default=(), name="serviceCIDRs")
    bypass_netfilter: Annotated[
        bool,
        Meta(
            description="Forward masqueraded flows from the tc hook. This is faster, but no rule of a CNI or "
            "firewall sees them."
        ),
        Flag("--bypass-netfilter"),
    ] = False
    xdp: Annotated[
        Xdp,
        Meta(
            description="Forward masqueraded flows to backends on other nodes in XDP, at uplinks. This is "
            "faster, but no rule of a CNI or firewall sees them. native: where the driver has XDP. generic: "
            "also elsewhere, which gains little."
        ),
        Flag("--xdp"),
    ] = Xdp.NONE
    external_traffic_mode: Annotated[
        ExternalTraffic,
        Meta(
            description="How clients outside reach backends on other nodes, with externalTrafficPolicy "
            "Cluster. snat: masqueraded, replies come back through the same node. dsr: with their own "
            "address, and the backend's node answers them (direct server return). dsr-accept: as snat, but "
            "answers requests that other nodes have sent with dsr: every node needs it before the first "
            "gets dsr. With masqueradeAll these clients are masqueraded."
        ),
        Flag("--external-traffic-mode"),
    ] = ExternalTraffic.SNAT
    masquerade_ports: Annotated[
        str,
        Meta(pattern="^([0-9]+-[0-9]+)?$", description="Source ports for masqueraded clients, FIRST-LAST."),
        Flag(
            "--masquerade-ports",
            metavar="FIRST-LAST",
            default="the larger gap beside net.ipv4.ip_local_port_range, else 32768-65535",
        ),
    ] = ""
    lb_algorithm: Annotated[
        str | None,
        Meta(
            description="Algorithm of Services that name none, by its own name or the one that IPVS has for "
            f"it: {', '.join([*ALGORITHMS, *NEAREST])}."
        ),
        Flag(
            "--lb-algorithm",
            metavar="NAME",
            default="ipvs.scheduler, else round-robin in mode ipvs and random in other modes",
        ),
    ] = None
    maglev_table_size: Annotated[
        MaglevSize,
        Meta(description="Size of the table of a Service with Maglev. Every node needs the same."),
        Flag("--maglev-table-size"),
    ] = MAGLEV_DEFAULT_SIZE  # type: ignore[assignment]
    stale_tcp: Annotated[
        StaleTcp,
        Meta(
            description="When TCP connections through a Service are closed: once their endpoint is gone, "
            "already when it is not ready, or never. Connected UDP sockets always are."
        ),
        Flag("--stale-tcp"),
    ] = msgspec.field(default=StaleTcp.GONE, name="staleTCP")
    stale_tcp_seconds: Annotated[
        float,
        Meta(
            ge=0,
            le=3600,
            description="How long a removed endpoint may come back before its TCP connections are closed. "
            "New connections and UDP leave it at once.",
        ),
        Flag("--stale-tcp-seconds"),
    ] = msgspec.field(default=5.0, name="staleTCPSeconds")
    socket_sweep_seconds: Annotated[
        float,
        Meta(
            ge=0.1,
            le=3600,
            description="How often the records of sockets are compared with the sockets that exist. A record "
            "that has no socket twice in a row is deleted.",
        ),
        Flag("--socket-sweep-seconds"),
    ] = 60.0
    drift_check_seconds: Annotated[
        float,
        Meta(
            ge=0,
            le=3600,
            description="How often the agent compares maps and attached programs with what it has written "
            "and attached, and repairs what somebody else has changed; 0: never.",
        ),
        Flag("--drift-check-seconds"),
    ] = 5.0
    max_conntrack: Annotated[
        int,
        Meta(ge=1024, le=1 << 26, description="Conntrack entries: two per flow, four if it is masqueraded."),
        Flag("--max-conntrack"),
    ] = Capacity().conntrack
    max_services: Annotated[
        int,
        Meta(ge=1, le=1 << 20, description="Service ports in the maps, counted once per address family."),
        Flag("--max-services"),
    ] = Capacity().services
    max_backends: Annotated[
        int,
        Meta(ge=1, le=1 << 22, description="Endpoint addresses and ports in the maps."),
        Flag("--max-backends"),
    ] = Capacity().backends
    max_slots: Annotated[
        Annotated[int, Meta(ge=1, le=1 << 27)] | None,
        Meta(
            description="Slots of all selection tables: one per backend and service port, more with weights, "
            "a whole table with Maglev."
        ),
        Flag("--max-slots", default="4 per backend"),
    ] = None
    max_affinity: Annotated[
        int,
        Meta(ge=1, le=1 << 24, description="Clients remembered for session affinity."),
        Flag("--max-affinity"),
    ] = Capacity().affinity
    max_connections: Annotated[
        int,
        Meta(
            ge=1,
            le=1 << 22,
            description="Sockets that are recorded with the Service that they asked for: 96 bytes each, "
            "whether there are any or not. Of connected sockets beyond, getpeername() is not translated, and "
            "they are not closed when their backend goes.",
        ),
        Flag("--max-connections"),
    ] = Capacity().connected
    max_datagram_sockets: Annotated[
        int,
        Meta(
            ge=1,
            le=1 << 22,
            description="Unconnected UDP sockets that are recorded with more Services than their first. "
            "Datagrams of others to their second and further ones are translated in packets.",
        ),
        Flag("--max-datagram-sockets"),
    ] = Capacity().unconnected
    without: Annotated[
        tuple[Feature, ...],
        Meta(description="Kernel feature to do without; its fallback is used."),
        Flag("--without"),
    ] = ()
    trace_decisions: Annotated[
        bool,
        Meta(
            description="Keep the programs attached that `ebpfproxy trace` needs. Otherwise they replace the "
            "usual ones for as long as it runs."
        ),
        Flag("--trace-decisions"),
    ] = False
    measure_connections: Annotated[
        bool,
        Meta(
            description="Measure how long TCP connections to each Service take to be established, and count "
            "those that are not, by backend."
        ),
        Flag("--measure-connections"),
    ] = False
    measure_traffic: Annotated[
        bool,
        Meta(
            description="Count bytes and packets of each Service: of TCP connections of sockets when they "
            "end, of flows of packets as they pass. UDP of sockets is not counted: no program sees its "
            "packets."
        ),
        Flag("--measure-traffic"),
    ] = False
    metrics_services: Annotated[
        int,
        Meta(
            ge=0,
            le=MEASURED,
            description="Service ports that have series of their own in metrics of what is measured: those "
            "with most connections. All others are together, as the Service `other`.",
        ),
        Flag("--metrics-services"),
    ] = 50
    metrics_backends: Annotated[
        bool,
        Meta(
            description="Metrics name backends: of connections that failed, a series for each backend that "
            "had any; and of the metricsServices service ports with most connections, which backends they "
            "have."
        ),
        Flag("--metrics-backends"),
    ] = False
    otlp_endpoint: Annotated[
        str,
        Meta(
            description="URL of an OpenTelemetry collector, such as http://127.0.0.1:4318: the log, and the "
            "metrics of /metrics, are sent there, to /v1/logs and /v1/metrics below it (OTLP over HTTP). "
            "OTEL_EXPORTER_OTLP_ENDPOINT sets it, too."
        ),
        Flag("--otlp-endpoint", metavar="URL", variable="OTEL_EXPORTER_OTLP_ENDPOINT"),
    ] = ""
    otlp_interval_seconds: Annotated[
        float,
        Meta(ge=1, le=3600, description="Time between two sendings of metrics to otlpEndpoint."),
        Flag("--otlp-interval-seconds"),
    ] = 60.0


DEFAULTS = EbpfProxyConfiguration()


def validate(found: EbpfProxyConfiguration) -> list[Problem]:
    """Checks beyond the types. Problems have a path."""
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
    if found.otlp_endpoint and (problem := url_problem(found.otlp_endpoint)):
        problems.append(Problem("", "otlpEndpoint", problem))
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
    for option in options_of(DEFAULTS):
        document["properties"][option.path]["description"] = described(option)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **made}
