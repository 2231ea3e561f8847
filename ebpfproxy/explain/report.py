"""The answers about all frontends that a question is about, and the one about a Service without any."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from ebpfproxy.explain.answer import Explanation
from ebpfproxy.explain.path import Client
from ebpfproxy.explain.targets import Asked, Programmed
from ebpfproxy.services.model import FrontendKind
from ebpfproxy.services.reasons import ServiceReasons


class Report(msgspec.Struct, frozen=True):
    """The JSON of ``ebpfproxy explain``: these names stay.

    ``works``: all of ``explanations`` do. ``why`` where there are none. ``without_agent``: why there are no
    reasons, empty where the agent has given them.
    """

    works: bool
    why: str = ""
    without_agent: str = ""
    explanations: tuple[Explanation, ...] = ()


def report_of(found: Sequence[Explanation], silence: str) -> Report:
    return Report(all(each.works for each in found), "", silence, tuple(found))


def without_frontend(
    asked: Asked,
    frontends: Sequence[Programmed],
    service: ServiceReasons | None,
    client: Client,
    silence: str,
) -> Report:
    """Says why the client has no frontend of this Service to use. ``frontends``: those in the maps."""
    return Report(False, _why(asked, frontends, service, client, silence), silence)


def _why(
    asked: Asked,
    frontends: Sequence[Programmed],
    service: ServiceReasons | None,
    client: Client,
    silence: str,
) -> str:
    name = f"{asked.namespace}/{asked.name}"
    ports = sorted(
        {
            f"{each.port.port_name or each.key.port} ({each.key.port}/{each.port.protocol.name})"
            for each in frontends
            if each.entry.kind is not FrontendKind.NODE_PORT
        }
    )
    if frontends:
        numbers = {each.port.port_name for each in frontends} | {str(each.key.port) for each in frontends}
        if asked.port and asked.port not in numbers:
            return f"{name} has no port {asked.port}; it has {', '.join(ports)}"
        families = {each.port.family for each in frontends}
        served = " and ".join(map(str, sorted(families)))
        has = {len(address) for address in client.addresses}
        if not any((4 if family == 4 else 16) in has for family in families):
            return f"{name} has {served} only, and {client.name} has no such address"
        return f"{name} has no such port for {client.name}; it has {', '.join(ports)}"
    if silence:
        return f"no frontend of {name} is in the maps"
    if service is None:
        return f"no Service {name}: the agent knows none of this name"
    if service.unserved:
        return f"{name} has no frontends: {service.unserved}"
    lost = [each for port in service.ports for each in port.lost]
    if lost:
        taken = ", ".join(sorted({f"{each.frontend} belongs to {each.owner}" for each in lost}))
        return f"{name} has no frontend of its own: {taken}"
    if not service.ports:
        return f"{name} has no usable port or address" + "".join(f"; {each}" for each in service.warnings)
    return f"{name} is not in the maps: see `ebpfproxy status` for what has no room"
