"""Kubeconfig files, merged as kubectl merges them, to an :class:`Access`.

Every mistake is one error that names the file and the field. Of the ``kubernetes`` package only plugins'
credentials are used (``plugins``): it is not imported for files that need none.
"""

from __future__ import annotations

import base64
import binascii
import ssl
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import msgspec
import yaml

from ebpfproxy import yaml_text
from ebpfproxy.kube.access import Access, bearer, check_proxy, check_server, token_file, unverified, verifying
from ebpfproxy.kube.decode import explain, from_plain
from ebpfproxy.kube.errors import ConfigError


class _Kebab(msgspec.Struct, frozen=True, rename="kebab"):
    pass


class _Cluster(_Kebab, frozen=True):
    server: str = ""
    certificate_authority: str | None = None
    certificate_authority_data: str | None = None
    insecure_skip_tls_verify: bool | None = None
    tls_server_name: str | None = None
    proxy_url: str | None = None


class _Variable(msgspec.Struct, frozen=True):
    name: str
    value: str = ""


class _Exec(msgspec.Struct, frozen=True, rename="camel"):
    api_version: str
    command: str
    args: list[str] | None = None
    env: list[_Variable] | None = None


class _User(_Kebab, frozen=True):
    token: str | None = None
    token_file: str | None = msgspec.field(name="tokenFile", default=None)
    username: str | None = None
    password: str | None = None
    client_certificate: str | None = None
    client_certificate_data: str | None = None
    client_key: str | None = None
    client_key_data: str | None = None
    exec: _Exec | None = None
    auth_provider: dict[str, Any] | None = None


class _Context(msgspec.Struct, frozen=True):
    cluster: str
    user: str = ""


class _NamedCluster(msgspec.Struct, frozen=True):
    name: str
    cluster: _Cluster


class _NamedUser(msgspec.Struct, frozen=True):
    name: str
    #: Without its credentials, as the DaemonSet hands a kubelet's file on, it is null.
    user: _User | None = None


class _NamedContext(msgspec.Struct, frozen=True):
    name: str
    context: _Context


class File(_Kebab, frozen=True):
    current_context: str | None = None
    contexts: list[_NamedContext] | None = None
    clusters: list[_NamedCluster] | None = None
    users: list[_NamedUser] | None = None


def parse(text: str | bytes) -> File:
    """Raises YAMLError, ValueError and msgspec.ValidationError."""
    return from_plain(yaml_text.load(text), File)


def server_of(file: File) -> str:
    """Returns the server of the current context; empty without one.

    In kubeadm's cluster-info there is no context, and the one cluster has no name.
    """
    contexts = {each.name: each.context.cluster for each in file.contexts or ()}
    clusters = {each.name: each.cluster.server for each in file.clusters or ()}
    return clusters.get(contexts.get(file.current_context or "", ""), "")


T = TypeVar("T")


class _Found(NamedTuple, Generic[T]):
    """A cluster or a user, and its file, to which names of files in it are relative."""

    value: T
    path: Path
    field: str


def load(paths: Sequence[Path], context: str | None = None, master: str | None = None) -> Access:
    """Uses ``context`` instead of the current one, ``master`` instead of its server. Raises ConfigError."""
    context, cluster, user = _select(paths, context)
    check_server(cluster.value.server, f"{cluster.field}.server")
    own = cluster.value.server.rstrip("/")
    if master is not None:
        cluster = cluster._replace(value=msgspec.structs.replace(cluster.value, server=master))
    if cluster.value.proxy_url:
        check_proxy(cluster.value.proxy_url, f"{cluster.field}.proxy-url")
    tls = _tls(cluster)
    authorization: Callable[[], str] = str
    if user is not None:
        authorization = _authorization(user, paths, context, tls)
    return Access(
        server=cluster.value.server.rstrip("/"),
        tls=tls,
        authorization=authorization,
        server_name=cluster.value.tls_server_name,
        proxy=cluster.value.proxy_url,
        kubeconfig_server=own,
    )


def _select(paths: Sequence[Path], context: str | None) -> tuple[str, _Found[_Cluster], _Found[_User] | None]:
    """Returns the name of the context, too. Where several files have an entry, the first one counts."""
    clusters: dict[str, _Found[_Cluster]] = {}
    users: dict[str, _Found[_User]] = {}
    contexts: dict[str, _Context] = {}
    for path in paths:
        found = _read(path)
        context = context or found.current_context
        for cluster in found.clusters or ():
            field = f"{path}: clusters[{cluster.name}].cluster"
            clusters.setdefault(cluster.name, _Found(cluster.cluster, path, field))
        for user in found.users or ():
            field = f"{path}: users[{user.name}].user"
            users.setdefault(user.name, _Found(user.user or _User(), path, field))
        for each in found.contexts or ():
            contexts.setdefault(each.name, each.context)
    shown, context = ":".join(map(str, paths)), context or ""
    chosen = contexts.get(context)
    if chosen is None:
        raise ConfigError(f"{shown}: current-context: contexts has no {context!r}")
    if chosen.cluster not in clusters:
        raise ConfigError(f"{shown}: contexts[{context}]: clusters has no {chosen.cluster!r}")
    if chosen.user and chosen.user not in users:
        raise ConfigError(f"{shown}: contexts[{context}]: users has no {chosen.user!r}")
    return context, clusters[chosen.cluster], users.get(chosen.user)


def _read(path: Path) -> File:
    try:
        return parse(path.read_text())
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not a text file: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML: {error}") from error
    except msgspec.ValidationError as error:
        raise ConfigError(f"{path}: {explain(error)}") from error


def _tls(cluster: _Found[_Cluster]) -> ssl.SSLContext | None:
    """Returns None for a server without TLS. Errors name file and field, which OpenSSL's do not."""
    value = cluster.value
    data = _decoded(value.certificate_authority_data, f"{cluster.field}.certificate-authority-data")
    if not value.server.startswith("https://"):
        return None
    if value.insecure_skip_tls_verify:
        return unverified()
    file = (
        None if data or not value.certificate_authority else cluster.path.parent / value.certificate_authority
    )
    try:
        # A PEM text may have comments in any encoding; certificates in it are ASCII, which is all ssl takes.
        return verifying(data.decode("ascii", "ignore") if data else None, str(file) if file else None)
    except (ssl.SSLError, OSError, ValueError) as error:
        shown = file or f"{cluster.field}.certificate-authority-data"
        raise ConfigError(f"{cluster.path}: certificate-authority ({shown}): {error}") from error


def _authorization(
    user: _Found[_User], paths: Sequence[Path], context: str, tls: ssl.SSLContext | None
) -> Callable[[], str]:
    """Returns what gives the user's header; loads a client certificate into ``tls``. Raises ConfigError."""
    value, folder = user.value, user.path.parent
    certificate = _decoded(value.client_certificate_data, f"{user.field}.client-certificate-data")
    key = _decoded(value.client_key_data, f"{user.field}.client-key-data")
    if tls is not None and (certificate or value.client_certificate):
        _load_pair(
            tls,
            certificate or folder / (value.client_certificate or ""),
            key or (folder / value.client_key if value.client_key else None),
            user.path,
        )
    if value.token_file:
        authorization = token_file(folder / value.token_file)
        try:
            authorization()
        except ConfigError as error:
            raise ConfigError(f"{user.field}.tokenFile: {error}") from error
        return authorization
    if value.token:
        header = bearer(value.token, f"{user.field}.token")
        return lambda: header
    if value.exec is not None or value.auth_provider is not None:
        from ebpfproxy.kube import plugins  # noqa: PLC0415 - imports the kubernetes package

        plugin = plugins.Plugin(paths, context, is_exec=value.exec is not None)
        if tls is not None and plugin.certificate is not None:
            _load_pair(tls, *plugin.certificate, user.path)
        return plugin.authorization
    if value.username is not None and value.password is not None:
        basic = base64.b64encode(f"{value.username}:{value.password}".encode()).decode()
        return lambda: f"Basic {basic}"
    return str


def _load_pair(
    tls: ssl.SSLContext, certificate: Path | bytes, key: Path | bytes | None, source: Path
) -> None:
    """OpenSSL's Python binding reads a certificate with its key from files only. Raises ConfigError."""
    with tempfile.TemporaryDirectory(prefix="ebpfproxy-") as folder:
        files: list[Path | None] = []
        for name, each in (("certificate", certificate), ("key", key)):
            if isinstance(each, bytes):
                path = Path(folder) / name
                path.touch(0o600)
                path.write_bytes(each)
                files.append(path)
            else:
                files.append(each)
        try:
            # Without a password OpenSSL asks the terminal for that of an encrypted key.
            tls.load_cert_chain(str(files[0]), files[1], password="")
        except (ssl.SSLError, OSError) as error:
            shown = ["its data" if isinstance(each, bytes) else str(each) for each in (certificate, key)]
            raise ConfigError(
                f"{source}: client-certificate ({shown[0]}) with client-key ({shown[1]}): {error}"
            ) from error


def _decoded(data: str | None, field: str) -> bytes:
    try:
        return base64.b64decode("".join((data or "").split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ConfigError(f"{field}: not base64: {error}") from error
