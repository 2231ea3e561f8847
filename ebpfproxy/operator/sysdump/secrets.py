"""Takes secrets out of objects and texts.

By the name that a value has, in objects and in texts; by the value's form (keys, certificates, tokens); and
by the values themselves that a kubeconfig holds, wherever else they may stand.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import yaml

from ebpfproxy import yaml_text
from ebpfproxy.operator.sysdump.scalars import Scalars

REMOVED = "(removed)"
_NAME = (
    r"(?:token|passw|passphrase|secret|credential|authorization|api[-_]?key|access[-_]?key|private[-_]?key"
    r"|client-key|client-certificate|certificate-authority-data|auth-provider)"
)
_SECRET = re.compile(_NAME, re.IGNORECASE)
#: Variables that say how an agent runs.
_VARIABLE = re.compile(r"EBPFPROXY_|KUBERNETES_|NODE_NAME$")
#: Headers for a collector.
_HEADERS = re.compile(r"OTEL_EXPORTER_OTLP_(?:\w+_)?HEADERS")
_OWN_ANNOTATION = "ebpfproxy.io/"
#: A value ends with its closing quote or the line; quotes are escaped where the text is in a string of JSON.
_VALUE = (
    r"""(?P<value>"(?:[^"\\\n]|\\.)*"?|'[^'\n]*'?|(?P<escape>\\+)"(?:.*?[^\\])?(?P=escape)"|\\+"[^\n]*"""
    r"""|(?!true\b|false\b|null\b|[|>][-+0-9]*(?:[\s\\]|$)|\(removed\))[^\s,;&}\])"'\\]+)"""
)
#: Names of Services are in lower case, and their ports follow a colon.
_SEPARATOR = r"""(?:\\*+["']\s*[:=]\s*|\s*=\s*|:[ \t]+|:(?=\\*["']))(?:(?:bearer|basic)\s+)?"""
#: Annotations may be long, and nothing here may look at their parts again and again: what follows a name has
#: an end, and an option is looked at where its word begins, after a line's end in a string of JSON, too.
_ASSIGNED = re.compile(
    rf"(?P<name>{_NAME}[\w.-]{{0,100}}+{_SEPARATOR}|(?-i:(?=[A-Z])){_NAME}\w{{0,100}}+:)(?![{{\[]){_VALUE}",
    re.IGNORECASE,
)
_OPTION = re.compile(
    rf"(?:(?<![\w-])|(?<=\\[nrt]))(?P<name>-(?=[\w-]*{_NAME})[\w-]*+\s++)(?!-){_VALUE}", re.IGNORECASE
)
_FORMS = (
    re.compile(r"-----BEGIN ([A-Z0-9 ]+)-----.*?(?:-----END \1-----|\Z)", re.DOTALL),
    # The same in base64, as kubeconfigs have it.
    re.compile(r"LS0tLS1CRUdJTi[A-Za-z0-9+/=]{16,}"),
    # A JSON Web Token.
    re.compile(r"\beyJ[\w-]{8,}\.[\w-]+\.[\w-]*"),
    re.compile(r"(?<=bearer )[\w.~+/=-]{8,}", re.IGNORECASE),
    # A user, a token, or a user and a password of a URL; the digest of an image is none of these.
    re.compile(r"(?<=://)[^/?#\s\"']+(?=@(?!sha\d+:))"),
    # A password may have what ends the part of a URL with the host.
    re.compile(r"(?<=://)(?!\[)[^/\s:@\"']{0,200}:[^\s\"']{0,200}(?=@(?!sha\d+:))"),
)
_SCALARS = Scalars(_NAME, REMOVED)
_LEAST = 8


class Secrets:
    """What is taken out of texts: what has such a name or form, and what was learned."""

    def __init__(self, kubeconfigs: Iterable[Path] = ()) -> None:
        self._known: set[str] = set()
        self.learn_files(kubeconfigs)

    def learn_files(self, paths: Iterable[Path]) -> None:
        """Takes out what kubeconfigs have, and whole files of tokens."""
        for path in paths:
            with suppress(OSError, UnicodeDecodeError, yaml.YAMLError):
                for document in yaml_text.load_all(path.read_text()):
                    self.learn([document] if isinstance(document, str) else _values(document))

    def learn_variables(self, variables: Mapping[str, str]) -> None:
        self.learn(value for name, value in variables.items() if _is_secret_variable(name))
        for name, value in variables.items():
            if _HEADERS.fullmatch(name):
                # NAME=VALUE,…: each value may stand elsewhere, as it is written or as it is sent.
                parts = [value, *(each.partition("=")[2] for each in value.split(","))]
                self.learn([*parts, *map(unquote, parts)])

    def learn(self, values: Iterable[str]) -> None:
        self._known |= {each.strip() for each in values if len(each.strip()) >= _LEAST}

    def text(self, text: str) -> str:
        """Returns the text without secrets."""
        for each in sorted(self._known, key=len, reverse=True):
            text = text.replace(each, REMOVED)
        if _SECRET.search(text):
            text = _OPTION.sub(_replaced, _ASSIGNED.sub(_replaced, _SCALARS.remove(text)))
        for form in _FORMS:
            text = form.sub(REMOVED, text)
        return text


def _replaced(match: re.Match[str]) -> str:
    """JSON stays JSON."""
    quote = re.match(r"\\*[\"']?", match["value"])
    assert quote is not None
    return f"{match['name']}{quote[0]}{REMOVED}{quote[0]}"


def without(value: Any) -> Any:
    """Returns an object of JSON's types without what its names say is secret, and without managed fields.

    Variables' values are taken out, but those of the agent's own, and annotations' (kubectl keeps a whole
    object in one), likewise.
    """
    if isinstance(value, list):
        return [
            REMOVED if at and _is_option(value[at - 1]) and isinstance(each, str) else without(each)
            for at, each in enumerate(value)
        ]
    if not isinstance(value, dict):
        return value
    found: dict[str, Any] = {}
    for name, each in value.items():
        if name == "managedFields":
            continue
        if name == "annotations" and isinstance(each, dict):
            found[name] = {
                key: text if key.startswith(_OWN_ANNOTATION) else REMOVED for key, text in each.items()
            }
        elif name == "auth-provider" or (_SECRET.search(name) and _is_plain(each)):
            found[name] = REMOVED
        else:
            found[name] = without(each)
    if _is_plain(found.get("value")) and not _VARIABLE.match(str(found.get("name", "EBPFPROXY_"))):
        found["value"] = REMOVED
    return found


def _is_plain(value: Any) -> bool:
    return isinstance(value, str | int | float) and not isinstance(value, bool)


def _is_option(value: Any) -> bool:
    return isinstance(value, str) and bool(re.fullmatch(rf"--?[\w-]*{_NAME}[\w-]*", value, re.IGNORECASE))


def _is_secret_variable(name: str) -> bool:
    return bool(_SECRET.search(name)) or name.upper().endswith("KEY")


def _values(value: Any, *, secret: bool = False) -> Iterator[str]:
    """The secrets in a kubeconfig."""
    if isinstance(value, list):
        for each in value:
            yield from _values(each, secret=secret)
    elif isinstance(value, dict):
        variable = str(value.get("name", "")) if "value" in value else ""
        for name, each in value.items():
            # Paths are no secrets.
            is_file = name in ("client-certificate", "client-key", "tokenFile")
            is_secret = bool(_SECRET.search(name)) or (name == "value" and _is_secret_variable(variable))
            yield from _values(each, secret=secret or (is_secret and not is_file))
    elif secret and isinstance(value, str):
        yield value
