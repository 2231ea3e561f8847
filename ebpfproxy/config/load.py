"""Reads a configuration file, applies flags, and lists ignored fields."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from ebpfproxy.config import flags as flag_table
from ebpfproxy.config import kube_proxy as kp
from ebpfproxy.config import own as ours
from ebpfproxy.config import validation
from ebpfproxy.config.bind_address import BindAddressError, parse_bind_address
from ebpfproxy.config.declarations import options_of
from ebpfproxy.config.documents import ConfigurationError, Document, Problem, convert, read_documents

_BIND_ADDRESSES = ("healthzBindAddress", "metricsBindAddress")

_TYPES: Mapping[str, tuple[str, type[msgspec.Struct]]] = {
    kp.KIND: (kp.API_VERSION, kp.KubeProxyConfiguration),
    ours.KIND: (ours.API_VERSION, ours.EbpfProxyConfiguration),
}


class Configuration(msgspec.Struct, frozen=True):
    """Both documents, with the API's defaults; :func:`effective` adds the others."""

    kube_proxy: kp.KubeProxyConfiguration = kp.with_api_defaults(kp.KubeProxyConfiguration())
    own: ours.EbpfProxyConfiguration = ours.DEFAULTS
    #: Fields of the file that only older versions of kube-proxy had.
    retired: tuple[str, ...] = ()


def load(path: Path) -> Configuration:
    """Reads one file. Raises ConfigurationError with all errors."""
    return parse(read(path), str(path))


def read(path: Path) -> bytes:
    """Returns the file's content. Raises ConfigurationError."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigurationError([Problem(str(path), "", error.strerror or str(error))]) from error


def parse(text: str | bytes, name: str) -> Configuration:
    """Parses a KubeProxyConfiguration, an EbpfProxyConfiguration, or both in any order, as YAML or JSON.

    ``name`` is the file's, for errors. The file has to be valid by itself: no flag corrects it. Raises
    ConfigurationError.
    """
    try:
        documents = read_documents(text)
    except ConfigurationError as error:
        raise ConfigurationError([each._replace(where=name) for each in error.problems]) from error
    problems: list[Problem] = []
    if not documents:
        problems.append(Problem(name, "", f"has neither a {kp.KIND} nor an {ours.KIND}"))
    found: dict[str, Any] = {}
    retired: list[str] = []
    places: dict[str, str] = {}
    for document in documents:
        place = name if len(documents) == 1 else f"{name}: document {document.number}"
        kind, of_document = _read_document(document, found, retired)
        if kind:
            places[kind] = f"{place} ({kind})" if len(documents) > 1 else place
            place = places[kind]
        problems += [problem._replace(where=place) for problem in of_document]
    configuration = Configuration(retired=tuple(retired))
    if kp.KIND in found:
        configuration = msgspec.structs.replace(
            configuration, kube_proxy=kp.with_api_defaults(found[kp.KIND])
        )
    if ours.KIND in found:
        configuration = msgspec.structs.replace(configuration, own=found[ours.KIND])
    known = {(problem.where, problem.path) for problem in problems}
    for kind, of_kind in _check(kp.complete(configuration.kube_proxy), configuration.own).items():
        for problem in of_kind:
            placed = problem._replace(where=places.get(kind, name))
            # A field that could not be read has its default here, which is no further error.
            if (placed.where, placed.path) not in known:
                problems.append(placed)
    if problems:
        raise ConfigurationError(problems)
    return configuration


def _read_document(
    document: Document, found: dict[str, Any], retired: list[str]
) -> tuple[str, list[Problem]]:
    """Adds the document to ``found``. Returns its kind, empty if that is invalid, and its problems."""
    value, problems = document.value, list(document.problems)
    if not isinstance(value, dict):
        return "", [*problems, Problem("", "", "is not a mapping")]
    kind, version = value.get("kind"), value.get("apiVersion")
    if not isinstance(kind, str) or kind not in _TYPES:
        return "", [*problems, Problem("", "kind", f"{kind!r} is neither {kp.KIND} nor {ours.KIND}")]
    wanted, struct = _TYPES[kind]
    if version != wanted:
        return "", [*problems, Problem("", "apiVersion", f"{version!r} is not {wanted}")]
    if kind in found:
        return "", [*problems, Problem("", "kind", f"a second {kind}")]
    if kind == kp.KIND:
        retired += (name for name in _RETIRED if name in value)
        value = {name: each for name, each in value.items() if name not in _RETIRED}
    found[kind] = convert(value, struct, "", problems)
    return kind, problems


def _check(
    kube_proxy: kp.KubeProxyConfiguration, own: ours.EbpfProxyConfiguration
) -> dict[str, list[Problem]]:
    """Problems by kind. ``kube_proxy`` is complete."""
    of_own = ours.validate(own)
    if own.manifests and (kube_proxy.client_connection.kubeconfig or own.master):
        of_own.append(
            Problem("", "manifests", "excludes --kubeconfig (clientConnection.kubeconfig) and --master")
        )
    return {kp.KIND: validation.validate(kube_proxy), ours.KIND: of_own}


def effective(configuration: Configuration, flags: Mapping[str, Any] | None = None) -> Configuration:
    """The complete configuration with flags applied, as the agent uses it.

    ``flags``: those that were given, by name (see :func:`ebpfproxy.config.flags.lay`). They override the
    file. In contrast to a file, an address for health checks or metrics may be empty in a flag,
    which disables it, or ``:PORT``. A flag also overrides our own document: ``--ipvs-scheduler`` lbAlgorithm,
    ``--kubeconfig`` manifests.

    Raises ConfigurationError, with errors of flags by their names and errors of combinations by path. Raises
    KeyError for an unknown flag.
    """
    laid = flag_table.lay(configuration.kube_proxy, configuration.own, flags or {})
    kube_proxy = kp.complete(_follow_bind_address(laid, configuration.kube_proxy.bind_address))
    problems = list(laid.problems)
    named = {problem.where for problem in problems}
    for kind, found in _check(kube_proxy, laid.own).items():
        by_path = laid.kube_proxy_flags if kind == kp.KIND else laid.own_flags
        for problem in found:
            if kind == kp.KIND and problem.path in _BIND_ADDRESSES and problem.path in by_path:
                continue
            flag = by_path.get(re.sub(r"\[\d+\].*", "", problem.path))
            if flag is None:
                problems.append(problem)
            elif flag not in named:
                problems.append(Problem(flag, "", problem.text))
    for path, address in zip(
        _BIND_ADDRESSES, (kube_proxy.healthz_bind_address, kube_proxy.metrics_bind_address), strict=True
    ):
        flag = laid.kube_proxy_flags.get(path)
        if flag is not None and address:
            try:
                parse_bind_address(address)
            except BindAddressError as error:
                problems.append(Problem(flag, "", str(error)))
    if problems:
        raise ConfigurationError(problems)
    return Configuration(kube_proxy, laid.own, configuration.retired)


def _follow_bind_address(laid: flag_table.Laid, before: str) -> kp.KubeProxyConfiguration:
    """Default addresses for health checks and metrics follow the family of ``--bind-address``."""
    found = laid.kube_proxy
    if found.bind_address == before:
        return found
    was, now = (
        kp.with_api_defaults(kp.KubeProxyConfiguration(bind_address=bind))
        for bind in (before, found.bind_address)
    )
    changed = {}
    if "healthzBindAddress" not in laid.kube_proxy_flags and (
        found.healthz_bind_address == was.healthz_bind_address
    ):
        changed["healthz_bind_address"] = now.healthz_bind_address
    if "metricsBindAddress" not in laid.kube_proxy_flags and (
        found.metrics_bind_address == was.metrics_bind_address
    ):
        changed["metrics_bind_address"] = now.metrics_bind_address
    return msgspec.structs.replace(found, **changed)


# -- ignored fields

#: Fields that the API no longer has; files of upgraded clusters often still contain them.
_RETIRED = ("resourceContainer", "udpIdleTimeout")


def ignored_fields(configuration: Configuration) -> list[str]:
    """The paths of fields that are set and ignored, in the API's order, after those of older versions.

    A field is set if it differs from its default: kubeadm's files, and those of ``--write-config-to``,
    contain every field. ``bindAddress`` decides only the family of the default health check and metrics
    addresses; NodePorts do not follow it.
    """
    return [
        *configuration.retired,
        *(
            option.path
            for option, default in zip(
                options_of(configuration.kube_proxy), flag_table.KUBE_PROXY_OPTIONS, strict=True
            )
            if option.is_ignored
            and option.value != default.value
            and not _is_a_default(option.path, option.value)
        ),
    ]


def _is_a_default(path: str, value: Any) -> bool:
    """A value that means nothing, or that is the default of another mode."""
    section, _, name = path.rpartition(".")
    if path == "featureGates":
        return set(value) <= {kp.EXTERNAL_IPS_GATE}
    if path == "bindAddress":
        return value in ("0.0.0.0", "::")
    if path == "ipvs.excludeCIDRs":
        return not value
    if section in kp.SYNC_PERIODS and name == "minSyncPeriod":
        return not value or value == kp.SYNC_PERIODS[section][1]
    return False
