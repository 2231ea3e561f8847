"""YAML texts with JSON's types, by libyaml: ten times as fast as PyYAML's own scanner.

Before version 6.0.4 PyYAML's loader by libyaml ends the process where nesting is deep. Its events do not:
they are counted first where a text might be nested deeply. So are those that aliases repeat: a few hundred
bytes may stand for more values than there is memory for, as soon as somebody walks through them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import yaml

#: More than any Kubernetes object has, and far less than what ends the process.
DEEPEST = 100
#: How many values aliases may repeat.
MOST_REPEATED = 1_000_000
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


class TooManyError(yaml.YAMLError):
    """Aliases repeat more than MOST_REPEATED values."""

    def __init__(self) -> None:
        super().__init__(f"aliases repeat more than {MOST_REPEATED:,} values")


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
    """Raises TooDeepError, TooManyError, or another yaml.YAMLError where the text is no YAML."""
    # A zero is of UTF-16, or of no YAML at all.
    plain = text if isinstance(text, str) else text.decode("latin-1")
    has_aliases = "&" in plain and "*" in plain
    if max(map(plain.count, "[{\0")) < DEEPEST and not has_aliases and not _FAR_INDENTED.search(plain):
        return
    try:
        # Since 6.0.4 it refuses what is nested a thousand deep, often before the events of the first hundred.
        _check_events(yaml.parse(text, Loader=Loader))
    except yaml.MarkedYAMLError as error:
        if "nest" not in (error.problem or ""):
            raise
        raise TooDeepError from error


def _check_events(events: Iterable[yaml.Event]) -> None:
    values = repeated = 0
    sizes: dict[str, int] = {}
    # For each that is not closed yet: its anchor, and how many values there were before.
    inside: list[tuple[str | None, int]] = []
    for event in events:
        if isinstance(event, yaml.AliasEvent):
            # One that is inside of what it repeats is refused where it is used.
            size = sizes.get(event.anchor or "", 1)
            values += size
            repeated += size
            if repeated > MOST_REPEATED:
                raise TooManyError
        elif isinstance(event, yaml.CollectionStartEvent):
            inside.append((event.anchor, values))
            values += 1
            if len(inside) > DEEPEST:
                raise TooDeepError
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = inside.pop()
            if anchor is not None:
                sizes[anchor] = values - before
        elif isinstance(event, yaml.ScalarEvent):
            values += 1
