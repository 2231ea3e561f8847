"""From a Service to its ports and their frontends."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Set

import msgspec

from ebpfproxy.kube.objects import Resource, Service, ServicePortSpec, key_of
from ebpfproxy.services.balancing import (
    ALGORITHM_ANNOTATION,
    WEIGHTS_ANNOTATION,
    Weights,
    parse_algorithm,
    parse_weights,
)
from ebpfproxy.services.model import (
    Algorithm,
    Family,
    Frontend,
    FrontendKind,
    Policy,
    Prefix,
    Protocol,
    ServicePortKey,
)
from ebpfproxy.services.values import (
    Warning,
    parse_address,
    parse_prefix,
    parse_protocol,
    unusable_address,
    unusable_name,
    valid_port,
)

DEFAULT_AFFINITY_SECONDS = 10800
MAX_AFFINITY_SECONDS = 86400

#: An enumeration looks for each of its members anew (until Python 3.12), which takes longer than a call.
_CLUSTER, _LOCAL = Policy
_IPV4, _IPV6 = Family
_CLUSTER_IP, _EXTERNAL_IP, _LOAD_BALANCER, _NODE_PORT = FrontendKind
_ANY = {_IPV4: bytes(4), _IPV6: bytes(16)}
_OPEN_TO_ALL: Mapping[Family, tuple[Prefix, ...] | None] = dict.fromkeys(Family)


class PortFrontends(msgspec.Struct, frozen=True, gc=False):
    """One port of a Service in one family, before endpoints and conflicts are known."""

    key: ServicePortKey
    frontends: tuple[Frontend, ...]
    affinity_seconds: int
    algorithm: Algorithm
    source_ranges: tuple[Prefix, ...] | None = None


class ServiceFrontends(msgspec.Struct, frozen=True, gc=False):
    """All that a Service says. ``age``: the older of two claims to one address has the smaller age."""

    age: tuple[str, str, str]
    ports: tuple[PortFrontends, ...]
    warnings: tuple[Warning, ...]
    internal: Policy = Policy.CLUSTER
    external: Policy = Policy.CLUSTER
    #: spec.healthCheckNodePort where it is served: a load balancer's, with the external policy Local.
    health_port: int = 0
    weights: Weights | None = None
    #: Cluster IPs of a Service that another proxy serves.
    others: tuple[bytes, ...] = ()
    #: Why the Service has no frontend whatever its ports are; empty where it may have some.
    unserved: str = ""


def frontends_of(
    service: Service, *, external_ips: bool = True, algorithm: Algorithm = Algorithm.RANDOM
) -> ServiceFrontends:
    """The ports and frontends of a Service.

    There are none for headless and ExternalName Services and those of another proxy. ClusterIPs follow the
    internal traffic policy. ExternalIPs, load-balancer addresses and NodePorts follow the external one for
    traffic from outside; a client in the cluster that uses them gets policy Cluster ("short circuit",
    KEP-2086). Only the families of its cluster IPs are served, as kube-proxy does. ``external_ips`` off:
    spec.externalIPs are left out, with a warning (CVE-2020-8554: who may create Services could take
    anybody's address). ``algorithm``: where the Service names none.
    """
    return _Reader(service, external_ips, algorithm).read()


class _Reader:
    def __init__(self, service: Service, external_ips: bool, algorithm: Algorithm) -> None:
        self._service = service
        self._external_ips = external_ips
        self._default_algorithm = algorithm
        self._key = key_of(service)
        self._warnings: list[Warning] = []

    def _warn(self, field: str, message: str) -> None:
        self._warnings.append(Warning(Resource.SERVICES, self._key, field, message))

    def read(self) -> ServiceFrontends:
        service, spec = self._service, self._service.spec
        age = (service.metadata.creation_timestamp or "", *self._key)
        labels = service.metadata.labels

        def none(why: str, others: tuple[bytes, ...] = ()) -> ServiceFrontends:
            return ServiceFrontends(age, (), tuple(self._warnings), others=others, unserved=why)

        if spec.type == "ExternalName":
            return none("type ExternalName")
        cluster_ips = spec.cluster_ips or ((spec.cluster_ip,) if spec.cluster_ip else ())
        if not cluster_ips or cluster_ips[0] in ("None", ""):
            return none("headless: clusterIP None" if cluster_ips and cluster_ips[0] else "no cluster IP yet")
        if labels is not None and labels.proxy_name is not None:
            others = tuple(address for text in cluster_ips if (address := parse_address(text)) is not None)
            return none("label service.kubernetes.io/service-proxy-name: another proxy serves it", others)
        if spec.type not in ("ClusterIP", "NodePort", "LoadBalancer"):
            self._warn("spec.type", f"unknown type {spec.type!r}")
            return none(f"unknown type {spec.type!r}")
        for field, name in zip(("namespace", "name"), self._key, strict=True):
            reason = unusable_name(name)
            if reason is not None:
                self._warn(f"metadata.{field}", reason)
                return none(f"its {field} {reason}")

        internal = self._policy("internalTrafficPolicy", spec.internal_traffic_policy)
        external = self._policy("externalTrafficPolicy", spec.external_traffic_policy)
        if spec.type == "ClusterIP" and not spec.external_ips:
            external = _CLUSTER  # kube-proxy's ExternallyAccessible() looks at the spec alone
        addresses = list(self._addresses(cluster_ips, internal, external))
        families = sorted({_family(each[1]) for each in addresses if each[0] is _CLUSTER_IP})
        # An address that is there twice is of the kind that comes first.
        unique = {each[1]: each for each in reversed(addresses)}
        by_family = {
            family: [each for each in reversed(unique.values()) if _family(each[1]) is family]
            for family in families
        }
        affinity = self._affinity_seconds()
        algorithm, weights = self._algorithm(), self._weights()
        ranges = self._source_ranges()

        ports: list[PortFrontends] = []
        for port, protocol in self._ports():
            for family in families:
                found = tuple(
                    [
                        Frontend(kind, address, port.port, protocol, inside, outside)
                        for kind, address, inside, outside in by_family[family]
                    ]
                )
                if port.node_port and spec.type != "ClusterIP":
                    found += (
                        Frontend(
                            _NODE_PORT,
                            _ANY[family],
                            port.node_port,
                            protocol,
                            _CLUSTER,
                            external,
                        ),
                    )
                key = ServicePortKey(*self._key, sys.intern(port.name), protocol, family)
                ports.append(PortFrontends(key, found, affinity, algorithm, ranges[family]))
        return ServiceFrontends(
            age, tuple(ports), tuple(self._warnings), internal, external, self._health_port(external), weights
        )

    def _algorithm(self) -> Algorithm:
        annotations = self._service.metadata.annotations
        if annotations is None or annotations.lb_algorithm is None:
            return self._default_algorithm
        found, remark = parse_algorithm(annotations.lb_algorithm)
        if found is None:
            remark += f"; {self._default_algorithm} is used"
        if remark:
            self._warn(f"metadata.annotations[{ALGORITHM_ANNOTATION}]", remark)
        return self._default_algorithm if found is None else found

    def _weights(self) -> Weights | None:
        annotations = self._service.metadata.annotations
        if annotations is None or annotations.weights is None:
            return None
        weights, problems = parse_weights(annotations.weights)
        for problem in problems:
            self._warn(f"metadata.annotations[{WEIGHTS_ANNOTATION}]", problem)
        return weights

    def _health_port(self, external: Policy) -> int:
        spec = self._service.spec
        if spec.type != "LoadBalancer" or external is not _LOCAL or not spec.health_check_node_port:
            return 0
        if not valid_port(spec.health_check_node_port):
            self._warn("spec.healthCheckNodePort", f"{spec.health_check_node_port} is not in 1 to 65535")
            return 0
        return spec.health_check_node_port

    def _source_ranges(self) -> Mapping[Family, tuple[Prefix, ...] | None]:
        """The ranges by family. A family without any is open to all (kube-proxy splits them in the same way).

        One that cannot be read opens nothing: it may have been of either family.
        """
        texts = self._service.spec.load_balancer_source_ranges
        if not texts:
            return _OPEN_TO_ALL
        found: dict[Family, set[Prefix]] = {family: set() for family in Family}
        unreadable = False
        for i, text in enumerate(texts):
            prefix = parse_prefix(text.strip())
            if prefix is None:
                unreadable = True
                self._warn(f"spec.loadBalancerSourceRanges[{i}]", f"{text!r} is not a CIDR")
            else:
                found[_family(prefix.address)].add(prefix)
        return {f: tuple(sorted(ranges)) if ranges or unreadable else None for f, ranges in found.items()}

    def _policy(self, field: str, value: str | None) -> Policy:
        if value not in (None, "", "Cluster", "Local"):
            self._warn(f"spec.{field}", f"unknown policy {value!r}, Cluster is used")
        return _LOCAL if value == "Local" else _CLUSTER

    def _affinity_seconds(self) -> int:
        """The time-out of session affinity; 0 without it."""
        spec = self._service.spec
        if spec.session_affinity in ("None", ""):
            return 0
        if spec.session_affinity != "ClientIP":
            self._warn("spec.sessionAffinity", f"unknown affinity {spec.session_affinity!r}, none is used")
            return 0
        config = spec.session_affinity_config
        seconds = config.client_ip.timeout_seconds if config and config.client_ip else None
        if seconds is None:
            return DEFAULT_AFFINITY_SECONDS
        if not 0 < seconds <= MAX_AFFINITY_SECONDS:
            self._warn(
                "spec.sessionAffinityConfig.clientIP.timeoutSeconds",
                f"{seconds} is not in 1 to {MAX_AFFINITY_SECONDS}, {DEFAULT_AFFINITY_SECONDS} is used",
            )
            return DEFAULT_AFFINITY_SECONDS
        return seconds

    def _addresses(
        self, cluster_ips: tuple[str, ...], internal: Policy, external: Policy
    ) -> Iterator[tuple[FrontendKind, bytes, Policy, Policy]]:
        """Kind, address, and the policies of the internal and the external scope.

        Load-balancer addresses come before external IPs, because source ranges apply to them even where
        spec.externalIPs has them, too (kube-proxy adds each of them to its firewall).
        """
        spec, status = self._service.spec, self._service.status
        families = set()
        for i, text in enumerate(cluster_ips):
            address = self._address(f"spec.clusterIPs[{i}]", text)
            if address is not None:
                families.add(_family(address))
                yield _CLUSTER_IP, address, internal, internal
        # kube-proxy uses it for any type: the API server keeps it where AllowServiceLBStatusOnNonLB is set.
        balancer = status.load_balancer if status is not None else None
        for i, ingress in enumerate((balancer.ingress or ()) if balancer is not None else ()):
            if not ingress.ip or ingress.ip_mode not in (None, "", "VIP"):
                continue
            address = self._address(f"status.loadBalancer.ingress[{i}].ip", ingress.ip)
            if address is not None and _family(address) in families:
                yield _LOAD_BALANCER, address, _CLUSTER, external
        if spec.external_ips and not self._external_ips:
            self._warn("spec.externalIPs", "not used: external IPs are switched off")
        for i, text in enumerate((spec.external_ips or ()) if self._external_ips else ()):
            address = self._address(f"spec.externalIPs[{i}]", text)
            if address is not None and _family(address) in families:
                yield _EXTERNAL_IP, address, _CLUSTER, external

    def _address(self, field: str, text: str) -> bytes | None:
        address = parse_address(text)
        if address is None:
            self._warn(field, f"{text!r} is not an IP address")
            return None
        reason = unusable_address(address)
        if reason is not None:
            self._warn(field, f"{text} {reason}")
            return None
        return address

    def _ports(self) -> Iterator[tuple[ServicePortSpec, Protocol]]:
        """The usable ports. A NodePort that cannot be used is left out of its port; the port itself stays."""
        names: set[str] = set()
        numbers: set[tuple[int, Protocol]] = set()
        node_ports: set[tuple[int, Protocol]] = set()
        for i, port in enumerate(self._service.spec.ports or ()):
            field = f"spec.ports[{i}]"
            protocol = parse_protocol(port.protocol)
            if protocol is None:
                self._warn(f"{field}.protocol", f"unknown protocol {port.protocol!r}")
            elif not valid_port(port.port):
                self._warn(f"{field}.port", f"{port.port} is not in 1 to 65535")
            elif (reason := unusable_name(port.name)) is not None:
                self._warn(f"{field}.name", reason)
            elif port.name in names:
                self._warn(f"{field}.name", f"another port of this Service has the name {port.name!r}")
            elif (port.port, protocol) in numbers:
                self._warn(f"{field}.port", f"another port of this Service is {port.port}/{protocol.name}")
            else:
                names.add(port.name)
                numbers.add((port.port, protocol))
                reason = _unusable_node_port(port.node_port, protocol, node_ports)
                if reason is None:
                    node_ports.add((port.node_port, protocol))
                    yield port, protocol
                else:
                    self._warn(f"{field}.nodePort", reason)
                    yield msgspec.structs.replace(port, node_port=0), protocol


def _unusable_node_port(number: int, protocol: Protocol, taken: Set[tuple[int, Protocol]]) -> str | None:
    if not number:
        return None
    if not valid_port(number):
        return f"{number} is not in 1 to 65535"
    if (number, protocol) in taken:
        return f"another port of this Service has the nodePort {number}/{protocol.name}"
    return None


def _family(address: bytes) -> Family:
    return _IPV4 if len(address) == 4 else _IPV6
