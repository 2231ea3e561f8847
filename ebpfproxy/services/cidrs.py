"""From a ServiceCIDR to the ranges that cluster IPs are taken from."""

from __future__ import annotations

import msgspec

from ebpfproxy.kube.objects import Resource, ServiceCidr, key_of
from ebpfproxy.services.model import Prefix
from ebpfproxy.services.values import Warning, parse_prefix


class ServiceRanges(msgspec.Struct, frozen=True, gc=False):
    prefixes: tuple[Prefix, ...]
    warnings: tuple[Warning, ...] = ()


def ranges_of(cidr: ServiceCidr) -> ServiceRanges:
    """All its ranges, ready or not (kube-proxy asks neither): one that is being deleted still has addresses.

    A range that cannot be read is left out, with a warning.
    """
    found, warnings = [], []
    for i, text in enumerate((cidr.spec.cidrs if cidr.spec is not None else None) or ()):
        prefix = parse_prefix(text)
        if prefix is None:
            field = f"spec.cidrs[{i}]"
            warnings.append(Warning(Resource.SERVICECIDRS, key_of(cidr), field, f"{text!r} is not a CIDR"))
        else:
            found.append(prefix)
    return ServiceRanges(tuple(found), tuple(warnings))
