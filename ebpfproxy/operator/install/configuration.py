"""The agent's configuration file: the base's, one that is given, or the one of a running kube-proxy.

Fields of a file are kept. A field that cannot work in the DaemonSet's pod (:data:`_POD`) gets the value
of ``deploy/base`` instead, and is one remark. Fields with the API's defaults are not written, since kubeadm
names every field.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import msgspec

from ebpfproxy import yaml_text
from ebpfproxy.config import kube_proxy as kp
from ebpfproxy.config import load, write
from ebpfproxy.config.bind_address import parse_bind_address
from ebpfproxy.config.documents import ConfigurationError, Problem, convert, read_documents
from ebpfproxy.config.load import Configuration
from ebpfproxy.config.own import EbpfProxyConfiguration
from ebpfproxy.operator.install.cluster_facts import Networking

Plain = dict[str, Any]
_NOTHING = Networking()


class Rendered(NamedTuple):
    """The file, and where health and metrics are served: host (empty: at all addresses) and port."""

    text: str
    health: tuple[str, int]
    metrics: tuple[str, int]


class _Rule(NamedTuple):
    because: str
    applies: Callable[[Any], bool] = bool


#: The fields that do not work in the pod, by kind and path.
_POD: Mapping[str, Mapping[str, _Rule]] = {
    kp.KIND: {
        "oomScoreAdj": _Rule("less would need SYS_RESOURCE", lambda value: value < -997),
        "clientConnection.kubeconfig": _Rule("the pod has a service account"),
        "hostnameOverride": _Rule("the DaemonSet tells each pod its node's name"),
    },
    "EbpfProxyConfiguration": {
        "bpfRoot": _Rule("the DaemonSet says where the node's bpffs is in the pod"),
        "cgroupRoot": _Rule("the pod takes the mount that the DaemonSet gives it"),
        "manifests": _Rule("the pod reads its cluster"),
        "master": _Rule("the pod has a service account: name an --api-server"),
    },
}
#: While kube-proxy runs on the same nodes, its ports are taken.
_WITH_KUBE_PROXY = {"bindAddressHardFail": _Rule("kube-proxy has its ports until it is stopped")}


def of_base(text: str, where: str = "config.yaml") -> Rendered:
    """Returns it unchanged, with its comments. Raises ConfigurationError."""
    used = load.effective(load.parse(text, where)).kube_proxy
    return Rendered(text, _place(used.healthz_bind_address), _place(used.metrics_bind_address))


def in_a_pod(
    given: Configuration,
    base: str,
    where: str,
    *,
    has_kube_proxy: bool,
    networking: Networking = _NOTHING,
    own_where: str = "",
) -> tuple[Rendered, list[str]]:
    """Merges ``given`` into the base; returns remarks, too.

    ``where`` names the file in remarks, ``own_where`` that of EbpfProxyConfiguration if it is another one.
    ``networking`` fills in what the files leave out. Raises ConfigurationError.
    """
    documents = {each["kind"]: each for each in yaml_text.load_all(base)}
    remarks: list[str] = []
    for kind, found in _said(given):
        rules = {**_POD[kind], **(_WITH_KUBE_PROXY if has_kube_proxy and kind == kp.KIND else {})}
        of_kind = where if kind == kp.KIND else own_where or where
        _replace(found, documents[kind], rules, of_kind, remarks)
        documents[kind] = _over(documents[kind], found)
    remarks += _fill(documents, networking)
    text = "---\n".join(write.dump(documents[kind]) for kind in _POD)
    return of_base(text, where), remarks


def of_kube_proxy(text: str, where: str) -> tuple[Configuration, list[str]]:
    """Reads a kube-proxy's file, of any release: unknown fields are left out, each with a remark.

    Raises ConfigurationError.
    """
    try:
        documents = read_documents(text)
    except ConfigurationError as error:
        raise ConfigurationError([each._replace(where=where) for each in error.problems]) from error
    for document in documents:
        value = document.value
        if isinstance(value, dict) and value.get("kind") == kp.KIND:
            break
    else:
        raise ConfigurationError([Problem(where, "", f"has no {kp.KIND}")])
    problems = list(document.problems)
    found = convert(value, kp.KubeProxyConfiguration, "", problems)
    unknown = [each for each in problems if each.text == "unknown field"]
    if len(problems) > len(unknown):
        raise ConfigurationError([each._replace(where=where) for each in problems if each not in unknown])
    given = load.parse(write.kube_proxy_yaml(kp.with_api_defaults(found)), where)
    return given, [f"{where}: {each.path}: unknown field, ignored" for each in unknown]


def _said(given: Configuration) -> Iterator[tuple[str, Plain]]:
    """Yields, for each kind, the fields that differ from the API's defaults."""
    default = Configuration()
    yield (
        kp.KIND,
        _differing(
            write.kube_proxy_builtins(given.kube_proxy), write.kube_proxy_builtins(default.kube_proxy)
        ),
    )
    own, own_default = (
        msgspec.json.decode(msgspec.json.encode(each), type=Plain) for each in (given.own, default.own)
    )
    yield EbpfProxyConfiguration.__name__, _differing(own, own_default)


def _differing(value: Plain, default: Plain) -> Plain:
    made: Plain = {}
    for key, each in value.items():
        other = default.get(key)
        if isinstance(each, dict) and isinstance(other, dict) and other:
            if inner := _differing(each, other):
                made[key] = inner
        elif each != other:
            made[key] = each
    return made


def _replace(found: Plain, base: Plain, rules: Mapping[str, _Rule], where: str, remarks: list[str]) -> None:
    """Takes out of ``found`` what a rule applies to."""
    for path, rule in rules.items():
        *parents, name = path.split(".")
        holder, below = found, base
        for parent in parents:
            holder, below = holder.get(parent, {}), below.get(parent, {})
        if name not in holder or not rule.applies(holder[name]) or holder[name] == below.get(name):
            continue
        value = holder.pop(name)
        what = f"becomes {below[name]}" if name in below else "left out"
        remarks.append(f"{where}: {path}: {_shown(value)} {what}: {rule.because}")
    for path in rules:
        parent = path.partition(".")[0]
        if found.get(parent) == {}:
            del found[parent]


def _shown(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _over(base: Plain, above: Plain) -> Plain:
    made = dict(base)
    for key, each in above.items():
        below = made.get(key)
        made[key] = _over(below, each) if isinstance(each, dict) and isinstance(below, dict) else each
    return made


def _fill(documents: dict[str, Plain], networking: Networking) -> Iterator[str]:
    kube_proxy, own = documents[kp.KIND], documents[EbpfProxyConfiguration.__name__]
    if networking.pods and "clusterCIDR" not in kube_proxy:
        kube_proxy["clusterCIDR"] = ",".join(networking.pods)
        yield f"clusterCIDR: {kube_proxy['clusterCIDR']}, from kubeadm's podSubnet"
    if networking.services and "serviceCIDRs" not in own:
        own["serviceCIDRs"] = list(networking.services)
        yield f"serviceCIDRs: {','.join(networking.services)}, from kubeadm's serviceSubnet"


def _place(address: str) -> tuple[str, int]:
    host, port = parse_bind_address(address)
    return ("" if host in ("0.0.0.0", "::") else host), port
