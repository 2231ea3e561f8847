"""From the operator's options and the facts about the cluster to the objects, and remarks about both."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec

from ebpfproxy.config import load
from ebpfproxy.config.kube_proxy import HEALTHZ_PORT
from ebpfproxy.config.load import Configuration
from ebpfproxy.operator import kube_proxy_objects
from ebpfproxy.operator.api import Api, ApiError, Object, shown
from ebpfproxy.operator.install import cluster_facts, configuration, server_address
from ebpfproxy.operator.install.cluster_facts import Networking, Version
from ebpfproxy.operator.install.configuration import Rendered
from ebpfproxy.operator.install.render import CONFIG, Settings, base_configuration, render
from ebpfproxy.operator.names import AGENT, AGENT_SWITCH, OFF
from ebpfproxy.operator.printing import Say

#: Since then server-side apply is stable.
OLDEST = Version(1, 22)
#: Since then kube-proxy has /livez, which the DaemonSet's probes ask for.
_LIVEZ = Version(1, 28)
#: `ebpfproxy migrate rollback` keeps the agent from nodes with it.
_OFF = f"{AGENT_SWITCH}={OFF}"


class PrepareError(Exception):
    """This cluster, or these options, cannot be served; the message says why."""


class Wanted(msgspec.Struct, frozen=True, kw_only=True):
    """What the operator says. ``inherit``: kube-proxy's configuration and kubeadm's CIDRs are used."""

    image: str
    namespace: str
    pull_secrets: tuple[str, ...] = ()
    config: Path | None = None
    inherit: bool = True
    api_server: str | None = None

    @property
    def asks(self) -> bool:
        """True if the objects depend on more of the cluster than its version."""
        return self.api_server is None or (self.inherit and self.config is None)


def prepare(wanted: Wanted, api: Api | None, say: Say) -> list[Object]:
    """``api`` may be None where ``wanted.asks`` is False.

    Raises PrepareError, ApiError, ConfigurationError, AddressError.
    """
    address = server_address.parse(wanted.api_server) if wanted.api_server is not None else None
    version, kube_proxy, before = None, None, None
    if api is not None:
        version, kube_proxy = _look(api, say)
        there = cluster_facts.namespace_of_agents(api)
        if there and there != wanted.namespace:
            raise PrepareError(
                f"ebpfproxy is in namespace {there}, and a cluster has one: -n {there}, or uninstall it there"
            )
        before = api.get("ConfigMap", wanted.namespace, AGENT)
        if address is None:
            address = server_address.find(api, before, say)
    found = _configuration(wanted, api, kube_proxy, before, say)
    if kube_proxy is not None and version is not None:
        _same_port(wanted, found, version, say)
    return render(
        Settings(
            image=wanted.image,
            namespace=wanted.namespace,
            configuration=found,
            pull_secrets=wanted.pull_secrets,
            address=address,
            version=version,
        )
    )


def _look(api: Api, say: Say) -> tuple[Version, Object | None]:
    version = cluster_facts.version(api)
    if version < OLDEST:
        raise PrepareError(f"{api.host} is Kubernetes {version}: {OLDEST} is the oldest that is served")
    kube_proxy = kube_proxy_objects.find(api)
    there = "has no DaemonSet kube-system/kube-proxy"
    if kube_proxy is not None:
        there = "kube-proxy runs, and goes on beside ebpfproxy: `ebpfproxy migrate` is the next step"
    say(f"cluster: {api.host}, Kubernetes {version}; {there}")
    for line in _switched_off(api):
        say(line)
    return version, kube_proxy


def _switched_off(api: Api) -> Iterator[str]:
    try:
        found = sorted(each["metadata"]["name"] for each in api.list("Node", "", labelSelector=_OFF))
    except ApiError as error:
        if error.status == 0:
            raise
        # Installing needs no right to list nodes.
        yield f"warning: {error}: whether nodes have the label {_OFF} is not known"
        return
    if found:
        yield (
            f"warning: no agent will run on {', '.join(found)}: label {_OFF}, since a rollback. `ebpfproxy"
            " migrate run` takes it away"
        )


def _configuration(
    wanted: Wanted, api: Api | None, kube_proxy: Object | None, before: Object | None, say: Say
) -> Rendered:
    """``before`` is our own ConfigMap: once kube-proxy is gone, only this has what was inherited from it.

    While kube-proxy is there, its file has one of the two documents; the other stays as it is in our own.
    """
    base = base_configuration()
    has_kube_proxy = kube_proxy is not None
    if wanted.config is not None:
        where, given = str(wanted.config), load.load(wanted.config)
        found, remarks = configuration.in_a_pod(given, base, where, has_kube_proxy=has_kube_proxy)
    elif not wanted.inherit or api is None:
        return configuration.of_base(base)
    else:
        given, where, own_where, remarks = Configuration(), "config.yaml", "", []
        file = kube_proxy_objects.configuration(api, kube_proxy) if kube_proxy is not None else None
        if file is not None:
            where = file.where
            given, remarks = configuration.of_kube_proxy(file.text, where)
            say(f"configuration: KubeProxyConfiguration is kube-proxy's, from {where}")
        elif has_kube_proxy:
            say(
                "warning: kube-proxy's DaemonSet has no --config from a ConfigMap: its flags are not taken"
                " over, see --config"
            )
        kept = ((before or {}).get("data") or {}).get(CONFIG)
        if kept:
            ours = shown("ConfigMap", wanted.namespace, AGENT)
            own_where = f"{ours}: {CONFIG}"
            if file is None:
                say(f"configuration: as it is in {ours}")
                return configuration.of_base(str(kept), own_where)
            given = msgspec.structs.replace(given, own=load.parse(str(kept), own_where).own)
            say(f"configuration: EbpfProxyConfiguration is as it is in {ours}")
        networking = _networking(api, say)
        if file is not None:
            # The file leaves the CIDR out on purpose: kubeadm writes it.
            networking = networking._replace(pods=())
        elif networking == Networking():
            return configuration.of_base(base)
        found, more = configuration.in_a_pod(
            given,
            base,
            where,
            has_kube_proxy=has_kube_proxy,
            networking=networking,
            own_where=own_where,
        )
        remarks += more
    for remark in remarks:
        say(remark)
    return found


def _same_port(wanted: Wanted, found: Rendered, version: Version, say: Say) -> None:
    """Warns that the kubelet's probes reach kube-proxy until the agent gets the port."""
    port = found.health[1]
    if wanted.config is not None and port != HEALTHZ_PORT:
        return
    if version < _LIVEZ:
        say(
            f"warning: kube-proxy before {_LIVEZ} answers the kubelet's probes at port {port} with 404, and"
            " the agent's pods are never ready: give them another healthzBindAddress by --config until then"
        )
    else:
        say(f"while both run, kube-proxy answers the kubelet's probes at port {port}: ready is what it says")


def _networking(api: Api, say: Say) -> Networking:
    try:
        return cluster_facts.networking(api)
    except ApiError as error:
        if error.status == 0:
            raise
        say(f"warning: {error}: kubeadm's CIDRs are not used")
        return Networking()
