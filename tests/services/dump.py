"""Service ports in readable columns, the format of the expected files of tests/cases."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ebpfproxy.datapath.abi.layout import format_frontend
from ebpfproxy.services.model import (
    Algorithm,
    Backend,
    HealthCheck,
    Policy,
    ServicePort,
    format_address,
    format_endpoint,
)
from ebpfproxy.services.values import Warning


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def _backends(port: ServicePort, policy: Policy) -> str:
    chosen = port.cluster if policy is Policy.CLUSTER else port.local
    if not chosen:
        return "dropped" if policy is Policy.LOCAL and port.cluster else "rejected"
    return " ".join(
        format_endpoint(b.address, b.port) + ("(terminating)" if b in port.terminating else "")
        for b in chosen
    )


def _draining(backends: Iterable[Backend]) -> str:
    return " ".join(format_endpoint(b.address, b.port) for b in backends)


def dump(
    ports: Sequence[ServicePort], warnings: Sequence[Warning], health: Sequence[HealthCheck] = ()
) -> str:
    rows = [("SERVICE", "KIND", "SCOPE", "FRONTEND", "BACKENDS")]
    extra = []
    for port in ports:
        name = f"{port.key.namespace}/{port.key.name}:{port.key.port_name}"
        for f in port.frontends:
            frontend = format_frontend(f.address, f.port, f.protocol)
            rows += [
                (name, str(f.kind), scope, frontend, _backends(port, policy))
                for scope, policy in (("internal", f.internal), ("external", f.external))
            ]
        if port.draining:
            extra.append(f"draining: {name} {port.key.family} {_draining(port.draining)}")
        if port.idle:
            extra.append(f"idle: {name} {port.key.family} {_draining(port.idle)}")
        if port.drained:
            extra.append(f"drained: {name} {port.key.family} {_draining(port.drained)}")
        if port.algorithm is not Algorithm.RANDOM:
            extra.append(f"algorithm: {name} {port.key.family} {port.algorithm}")
        if port.weights:
            shown = " ".join(f"{format_endpoint(b.address, b.port)}={weight}" for b, weight in port.weights)
            extra.append(f"weights: {name} {port.key.family} {shown}")
        if port.source_ranges is not None:
            shown = " ".join(f"{format_address(r.address)}/{r.length}" for r in port.source_ranges)
            extra.append(f"sources: {name} {port.key.family} {shown or 'nobody'}")
        if port.affinity_seconds:
            extra.append(f"affinity: {name} {port.key.family} {port.affinity_seconds} s")
    extra += [f"health: {h.namespace}/{h.name} port {h.port} local {h.local_endpoints}" for h in health]
    extra += [f"warning: {warning}" for warning in sorted(warnings, key=str)]
    lines = _columns(rows) if len(rows) > 1 else ["no frontends"]
    return "\n".join([*lines, *extra]) + "\n"
