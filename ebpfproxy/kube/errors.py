"""Errors of a source's configuration, which a user can act on; apart from the modules that need urllib3."""

from __future__ import annotations

import re

#: A password may have what ends the part of a URL with the host, and an "@".
_CREDENTIALS = re.compile(r"(?<=://)[^\s\"']+(?=@)")


class ConfigError(Exception):
    """The connection's configuration cannot be used; the message names the file and the field."""


class ManifestError(Exception):
    """A file is wrong; the message names document, object and field."""


def without_credentials(text: str) -> str:
    """The text with user and password of URLs replaced: errors and logs are for more people than those."""
    return _CREDENTIALS.sub("***", text)
