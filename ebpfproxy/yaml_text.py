"""YAML texts with JSON's types, by libyaml: ten times as fast as PyYAML's own scanner.

Before version 6.0.4 PyYAML's loader by libyaml ends the process where nesting is deep. Its events do not:
they are counted first where a text might be nested deeply.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import yaml

#: More than any Kubernetes object has, and far less than what ends the process.
DEEPEST = 100
#: Two levels of a block indent the next line further, by a space or by indicators. Lines end in many ways.
_FAR_INDENTED = re.compile(rf"[ ?:-]{{{DEEPEST // 2}}}")


class Loader(yaml.CSafeLoader):
    """A timestamp is a string. :func:`check_depth` comes first."""


Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.CSafeLoader.yaml_implicit_resolvers.items()
}


class TooDeepError(yaml.YAMLError):
    """A text is nested deeper than DEEPEST."""

    def __init__(self) -> None:
        super().__init__(f"nested more than {DEEPEST} deep")


def load_all(text: str) -> list[Any]:
    """All documents; an empty one is None. Raises yaml.YAMLError."""
    with failures():
        check_depth(text)
        return list(yaml.load_all(text, Loader=Loader))


def load(text: str | bytes) -> Any:
    """The only document; None where there is none. Raises yaml.YAMLError."""
    with failures():
        check_depth(text)
        return yaml.load(text, Loader=Loader)  # noqa: S506 - a safe loader


@contextmanager
def failures() -> Iterator[None]:
    """What else PyYAML raises for a text (0x_, half a surrogate pair, chains of aliases), as YAMLError."""
    try:
        yield
    except RecursionError as error:
        raise TooDeepError from error
    except (ValueError, AttributeError, OverflowError) as error:
        raise yaml.YAMLError(f"a value that cannot be read: {error}") from error


def check_depth(text: str | bytes) -> None:
    """Raises TooDeepError, or another yaml.YAMLError where the text is no YAML."""
    # A zero is of UTF-16, or of no YAML at all.
    plain = text if isinstance(text, str) else text.decode("latin-1")
    if max(map(plain.count, "[{\0")) < DEEPEST and not _FAR_INDENTED.search(plain):
        return
    depth = 0
    try:
        # Since 6.0.4 it refuses what is nested a thousand deep, often before the events of the first hundred.
        for event in yaml.parse(text, Loader=Loader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > DEEPEST:
                raise TooDeepError
    except yaml.MarkedYAMLError as error:
        if "nest" not in (error.problem or ""):
            raise
        raise TooDeepError from error
