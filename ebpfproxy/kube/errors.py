"""Errors of a source's configuration, which a user can act on; apart from the modules that need urllib3."""

from __future__ import annotations


class ConfigError(Exception):
    """The connection's configuration cannot be used; the message names the file and the field."""


class ManifestError(Exception):
    """A file is wrong; the message names document, object and field."""
