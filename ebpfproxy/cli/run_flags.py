"""Flags of kube-proxy's that ``run`` takes beside its own, and which of all flags were given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click
from click.core import ParameterSource

from ebpfproxy.config.flags import KUBE_PROXY_FLAGS, NO_FIELD

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]

#: Those that have an option of their own, with more to say about it.
_ELSEWHERE = frozenset(
    (
        "cluster-cidr",
        "conntrack-tcp-timeout-close-wait",
        "conntrack-tcp-timeout-established",
        "conntrack-udp-timeout",
        "conntrack-udp-timeout-stream",
        "detect-local-mode",
        "healthz-bind-address",
        "hostname-override",
        "kubeconfig",
        "logging-format",
        "masquerade-all",
        "metrics-bind-address",
        "nodeport-addresses",
        "pod-bridge-interface",
        "pod-interface-name-prefix",
        "v",
        "verbosity",
    )
)
_BOOLEANS = frozenset(
    (
        "bind-address-hard-fail",
        "conntrack-tcp-be-liberal",
        "iptables-localhost-nodeports",
        "ipvs-strict-arp",
        "log-json-split-stream",
        "log-text-split-stream",
        "profiling",
    )
)
#: The number that these take is of kube-proxy's own and means nothing here.
_IGNORED = ("boot-id-file", "machine-id-file")


def boolean(name: str, **attributes: Any) -> Decorator:
    """A flag as Go has it: ``--name``, ``--name=true``, ``--name=false``."""
    return click.option(name, is_flag=False, flag_value="true", metavar="[=BOOL]", **attributes)


def kube_proxy_flags(function: Callable[..., Any]) -> Callable[..., Any]:
    """Adds what is left of kube-proxy's flags; the configuration says which have no effect."""
    for name in sorted(KUBE_PROXY_FLAGS.keys() - _ELSEWHERE, reverse=True):
        said = f"As kube-proxy's: {KUBE_PROXY_FLAGS[name]}."
        if name in _BOOLEANS:
            function = boolean(f"--{name}", help=said)(function)
        else:
            function = click.option(f"--{name}", metavar="VALUE", help=said)(function)
    for name in _IGNORED:
        function = click.option(f"--{name}", hidden=True)(function)
    return function


def given(ctx: click.Context) -> dict[str, Any]:
    """The flags that were given, in the environment or on the command line, by name."""
    said = (ParameterSource.COMMANDLINE, ParameterSource.ENVIRONMENT)
    return {
        name: value
        for name, value in ctx.params.items()
        if ctx.get_parameter_source(name) in said and name.replace("_", "-") not in NO_FIELD
    }
