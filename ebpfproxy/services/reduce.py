"""What the tracker needs of each object: computed once, as soon as the object is decoded."""

from __future__ import annotations

from ebpfproxy.kube.objects import EndpointSlice, Node, Object, Reduce, Service, ServiceCidr
from ebpfproxy.services.cidrs import ranges_of
from ebpfproxy.services.endpoints import endpoints_of
from ebpfproxy.services.frontends import frontends_of
from ebpfproxy.services.model import Algorithm


def reducer(node_name: str, *, external_ips: bool = True, algorithm: Algorithm = Algorithm.RANDOM) -> Reduce:
    """Services to ServiceFrontends, slices to SliceEndpoints as this node sees them, ServiceCIDRs to
    ServiceRanges; a Node stays.

    ``algorithm`` is that of Services which name none.
    """

    def reduce(each: Object) -> object:
        if isinstance(each, Service):
            return frontends_of(each, external_ips=external_ips, algorithm=algorithm)
        if isinstance(each, EndpointSlice):
            return endpoints_of(each, node_name)
        if isinstance(each, ServiceCidr):
            return ranges_of(each)
        assert isinstance(each, Node)
        return each

    return reduce
