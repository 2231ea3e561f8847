"""How one API server is reached: its URL, TLS, a proxy, and the credentials of each request."""

from __future__ import annotations

import os
import ssl
from collections.abc import Callable, Mapping
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit
from urllib.request import getproxies, proxy_bypass

import urllib3

from ebpfproxy.kube.errors import ConfigError

_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
TOKEN_FILE, CA_FILE = _ACCOUNT / "token", _ACCOUNT / "ca.crt"


class Access(NamedTuple):
    """``server`` is a URL without a slash at its end; ``proxy`` None takes the environment's.

    ``authorization`` returns the header's value as it is to be now, empty for none; it may be slow, and
    raises ConfigError. ``kubeconfig_server``: what the kubeconfig names, whatever ``--master`` says; empty
    without a kubeconfig.
    """

    server: str
    tls: ssl.SSLContext | None = None
    authorization: Callable[[], str] = str
    server_name: str | None = None
    proxy: str | None = None
    kubeconfig_server: str = ""

    @property
    def is_unverified(self) -> bool:
        return self.tls is not None and self.tls.verify_mode is ssl.CERT_NONE


def check_server(url: str, field: str) -> None:
    """Raises ConfigError."""
    _check_scheme(url, field, ("http", "https"))
    if "@" in url:
        # It is in the log and in the state that anybody may read.
        raise ConfigError(
            f"{field}: {without_user(url)!r} has a user: credentials are those of a kubeconfig's user"
        )


def check_proxy(url: str, field: str) -> None:
    """Raises ConfigError."""
    _check_scheme(url, field, ("http", "https", "socks5", "socks5h"))


def _check_scheme(url: str, field: str, schemes: tuple[str, ...]) -> None:
    if url.partition("://")[0] not in schemes or "://" not in url:
        begins = " or ".join(f"{scheme}://" for scheme in schemes)
        raise ConfigError(f"{field}: {without_user(url)!r} does not begin with {begins}")


def without_user(url: str) -> str:
    """A URL as others may see it: a proxy's may have a user with a password."""
    scheme, has_scheme, rest = url.partition("://") if "://" in url else ("", "", url)
    return f"{scheme}{has_scheme}{rest.rpartition('@')[2]}"


def bearer(token: str, source: str = "the token") -> str:
    """Returns the header for a token. Raises ConfigError."""
    token = token.strip()
    if not (token.isascii() and token.isprintable()):
        raise ConfigError(f"credentials: {source}: not one line of ASCII text")
    return f"Bearer {token}" if token else ""


def token_file(path: Path) -> Callable[[], str]:
    """Reads the file for each request, since tokens rotate."""

    def authorization() -> str:
        try:
            return bearer(path.read_text(), str(path))
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"credentials: {path}: {error}") from error

    return authorization


def verifying(certificates: str | None = None, file: str | None = None) -> ssl.SSLContext:
    """Trusts the authorities of a PEM text or a PEM file, without either those of the system.

    Raises OSError and ssl.SSLError.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    if certificates is None and file is None:
        context.load_default_certs()
    else:
        context.load_verify_locations(cafile=file, cadata=certificates)
    return context


def unverified() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def in_cluster(environment: Mapping[str, str] = os.environ) -> Access:
    """Reads the environment and the files of a pod's service account. Raises ConfigError."""
    host, port = (environment.get(f"KUBERNETES_SERVICE_{name}", "") for name in ("HOST", "PORT"))
    if not host or not port:
        raise ConfigError("KUBERNETES_SERVICE_HOST and _PORT are not set")
    authorization = token_file(TOKEN_FILE)
    if not authorization():
        raise ConfigError(f"service account: {TOKEN_FILE}: the file is empty")
    try:
        tls = verifying(file=str(CA_FILE))
    except (ssl.SSLError, OSError) as error:
        raise ConfigError(f"service account: certificate-authority ({CA_FILE}): {error}") from error
    return Access(f"https://{f'[{host}]' if ':' in host else host}:{port}", tls, authorization)


def pool(access: Access, **options: object) -> urllib3.PoolManager:
    """Makes a pool of connections; ``options`` are urllib3's. Raises ConfigError."""
    given: dict[str, object] = {"retries": False, **options}
    if access.tls is not None:
        given["ssl_context"] = access.tls
    if access.server_name is not None:
        given["server_hostname"] = access.server_name
    proxy = proxy_of(access)
    if proxy is None:
        return urllib3.PoolManager(**given)  # type: ignore[arg-type]
    try:
        if proxy.startswith("socks"):
            from urllib3.contrib.socks import SOCKSProxyManager  # noqa: PLC0415 - needs PySocks

            return SOCKSProxyManager(proxy, **given)  # type: ignore[arg-type]
        # The cluster's authority vouches for a proxy with HTTPS, too, as it does for kubectl.
        given |= {"proxy_ssl_context": access.tls, "proxy_headers": _proxy_headers(proxy)}
        return urllib3.ProxyManager(proxy, **given)  # type: ignore[arg-type]
    except urllib3.exceptions.LocationParseError as error:
        # Where the URL is wrong, a part of the password may be taken for the host.
        why = "this is no URL" if "@" in proxy else str(error)
        raise ConfigError(f"proxy {without_user(proxy)}: {why}") from None
    except (urllib3.exceptions.HTTPError, ValueError, ImportError) as error:
        raise ConfigError(f"proxy {without_user(proxy)}: {error}") from error


def _proxy_headers(proxy: str) -> dict[str, str]:
    """The credentials of a proxy's URL (RFC 7617), as kubectl sends them. Raises HTTPError."""
    user = urllib3.util.parse_url(proxy).auth
    if user is None:
        return {}
    return dict(urllib3.make_headers(proxy_basic_auth=unquote(user)))


def proxy_of(access: Access) -> str | None:
    """The URL of the proxy on the way to the server; None without one."""
    return access.proxy or _environments_proxy(access.server)


def _environments_proxy(server: str) -> str | None:
    """Understands what Go does, and so kubectl, beyond the standard library: a proxy without a scheme,
    networks in NO_PROXY, and that no proxy leads to this machine itself."""
    proxies, split = getproxies(), urlsplit(server)
    found = proxies.get(split.scheme) or proxies.get("all")
    if not found or split.hostname == "localhost" or proxy_bypass(split.netloc):
        return None
    if "://" not in found:
        found = f"http://{found}"
    try:
        address = ip_address(split.hostname or "")
    except ValueError:
        return found
    if address.is_loopback:
        return None
    for each in proxies.get("no", "").split(","):
        try:
            if address in ip_network(each.strip(), strict=False):
                return None
        except ValueError:
            continue
    return found
