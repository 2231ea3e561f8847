"""Credentials of exec plugins and of identity providers (OIDC), by the ``kubernetes`` package.

The package costs an agent 17 MB, so that ``kubeconfig`` imports this module for such users alone.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from kubernetes import client as kube_client
from kubernetes import config as kube_config
from kubernetes.config.config_exception import ConfigException

from ebpfproxy.kube.errors import ConfigError

#: The package raises these for files and answers that it does not expect.
_UNEXPECTED = (ValueError, TypeError, AttributeError, KeyError)


class Plugin:
    """The credentials of a context's user. Any thread may use it."""

    def __init__(self, paths: Sequence[Path], context: str, *, is_exec: bool) -> None:
        """Runs the plugin. Raises ConfigError."""
        shown = ":".join(map(str, paths))
        # One thread runs the plugin at a time: it may take long.
        self._lock = threading.Lock()
        self._configuration = kube_client.Configuration()
        with _logged_errors() as errors:
            try:
                kube_config.load_kube_config(
                    shown, context=context, client_configuration=self._configuration, persist_config=False
                )
            except (ConfigException, OSError) as error:
                raise ConfigError(f"{shown}: {error}") from error
            except _UNEXPECTED as error:
                raise ConfigError(f"{shown}: the kubernetes package cannot read it: {error!r}") from error
        if errors or (is_exec and not self._configuration.api_key and self.certificate is None):
            reason = "; ".join(errors) or "the plugin gave none"
            raise ConfigError(f"{shown}: user.exec: no credentials: {reason}")

    @property
    def certificate(self) -> tuple[Path, Path | None] | None:
        """Files of a client certificate and its key, where the plugin gave some."""
        found, key = self._configuration.cert_file, self._configuration.key_file
        return (Path(found), Path(key) if key else None) if found else None

    def authorization(self) -> str:
        """Runs the plugin again where its token has expired. Where that fails the old token is used, and the
        server's answer says what it is worth. Raises ConfigError."""
        try:
            with self._lock, _logged_errors():
                found = self._configuration.get_api_key_with_prefix("BearerToken", "authorization")
        except (ConfigException, OSError, *_UNEXPECTED) as error:
            raise ConfigError(f"credentials: {error}") from error
        token = str(found or "").strip()
        if not (token.isascii() and token.isprintable()):
            raise ConfigError("credentials: the plugin's token: not one line of ASCII text")
        return token


@contextmanager
def _logged_errors() -> Iterator[list[str]]:
    """Collects what the package logs as errors in this thread, on the root logger, instead of raising it."""
    errors: list[str] = []
    here = threading.get_ident()

    def keep(record: logging.LogRecord) -> bool:
        if record.thread != here or record.levelno < logging.ERROR:
            return True
        errors.append(record.getMessage())
        return False

    root = logging.getLogger()
    root.addFilter(keep)
    try:
        yield errors
    finally:
        root.removeFilter(keep)
