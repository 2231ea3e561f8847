"""What a kubeconfig says, checked before the ``kubernetes`` package uses it.

The package finds some mistakes late and says of others which Python operation they broke; an exec plugin that
fails it only logs, and goes on without credentials. Here each is one error that names the file and the field.
"""

from __future__ import annotations

import base64
import binascii
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import yaml

from ebpfproxy.kube.decode import explain


class ConfigError(Exception):
    """The connection's configuration cannot be used; the message names the file and the field."""


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
    value: str


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


class _Context(msgspec.Struct, frozen=True):
    cluster: str
    user: str = ""


class _NamedCluster(msgspec.Struct, frozen=True):
    name: str
    cluster: _Cluster


class _NamedUser(msgspec.Struct, frozen=True):
    name: str
    user: _User


class _NamedContext(msgspec.Struct, frozen=True):
    name: str
    context: _Context


class _File(_Kebab, frozen=True):
    current_context: str
    contexts: list[_NamedContext] | None = None
    clusters: list[_NamedCluster] | None = None
    users: list[_NamedUser] | None = None


class Kubeconfig(msgspec.Struct, frozen=True):
    """What the client must know of the current context beside what the kubernetes package makes of it."""

    #: ``tokenFile``: the package reads it once, but it rotates.
    token_file: Path | None
    has_plugin: bool


def check(path: Path) -> Kubeconfig:
    """Reads the file. Raises ConfigError with the path and the first field that is wrong."""
    try:
        found = msgspec.convert(yaml.safe_load(path.read_text()), _File)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not a text file: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML: {error}") from error
    except msgspec.ValidationError as error:
        raise ConfigError(f"{path}: {explain(error)}") from error
    contexts = {each.name: each.context for each in found.contexts or ()}
    context = contexts.get(found.current_context)
    if context is None:
        raise ConfigError(f"{path}: current-context: contexts has no {found.current_context!r}")
    clusters = {each.name: each.cluster for each in found.clusters or ()}
    cluster = clusters.get(context.cluster)
    if cluster is None:
        raise ConfigError(f"{path}: contexts[{found.current_context}]: clusters has no {context.cluster!r}")
    users = {each.name: each.user for each in found.users or ()}
    user = users.get(context.user)
    if user is None and context.user:
        raise ConfigError(f"{path}: contexts[{found.current_context}]: users has no {context.user!r}")
    _check_cluster(cluster, f"{path}: clusters[{context.cluster}].cluster")
    if user is None:
        return Kubeconfig(None, False)
    _check_user(user, f"{path}: users[{context.user}].user")
    return Kubeconfig(path.parent / user.token_file if user.token_file else None, user.exec is not None)


def check_url(url: str, field: str, schemes: tuple[str, ...] = ("http", "https")) -> None:
    """Raises ConfigError."""
    if url.partition("://")[0] not in schemes or "://" not in url:
        raise ConfigError(f"{field}: {url!r} does not begin with {' or '.join(f'{s}://' for s in schemes)}")


def _check_cluster(cluster: _Cluster, field: str) -> None:
    check_url(cluster.server, f"{field}.server")
    if cluster.proxy_url:
        check_url(cluster.proxy_url, f"{field}.proxy-url", ("http", "https", "socks5", "socks5h"))
    _check_base64(cluster.certificate_authority_data, f"{field}.certificate-authority-data")


def _check_user(user: _User, field: str) -> None:
    _check_base64(user.client_certificate_data, f"{field}.client-certificate-data")
    _check_base64(user.client_key_data, f"{field}.client-key-data")


def _check_base64(data: str | None, field: str) -> None:
    try:
        base64.b64decode("".join((data or "").split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ConfigError(f"{field}: not base64: {error}") from error


@contextmanager
def errors_of_the_package() -> Iterator[list[str]]:
    """What the kubernetes package logs as errors in this thread, instead of raising it.

    It logs on the root logger, for every try: here the lines are kept for whoever says it once.
    """
    said: list[str] = []
    here = threading.get_ident()

    def keep(record: logging.LogRecord) -> bool:
        if record.thread != here or record.levelno < logging.ERROR:
            return True
        said.append(record.getMessage())
        return False

    root = logging.getLogger()
    root.addFilter(keep)
    try:
        yield said
    finally:
        root.removeFilter(keep)
