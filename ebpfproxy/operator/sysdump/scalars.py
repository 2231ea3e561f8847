"""Secrets of YAML texts that are more than a word: blocks, and plain scalars with spaces.

A text may be a file, or a string of JSON, in which ends of lines are escaped. What is no YAML, as a log, may
lose more than the secret: the rest of a line that begins with a secret's name, and lines indented below it.
"""

from __future__ import annotations

import re
from typing import NamedTuple

#: Real and escaped ends of lines. Nothing here looks at a row of backslashes more than once.
_END = re.compile(r"(\n|(?<!\\)\\++n)")
#: What follows a colon without being a scalar, or is one that is no secret.
_OTHER = re.compile(r"[{\[*]|(?:true|false|null|~)\s*(?:#.*)?$")
_BLOCK = re.compile(r"[|>][-+0-9]*\s*(?:#.*)?$")
#: A line below a key that is no scalar of it.
_NESTED = re.compile(r"""\s*(?:-\s|[{\[]|[^\s:]+:(?:\s|$))""")
_QUOTED = re.compile(r""""(?:[^"\\]|\\.)*"|'(?:[^']|'')*'""")
_QUOTE = re.compile(r"""\\*+["']""")
_JSON_QUOTE = re.compile(r'(?<!\\)\\*+"')


class _Scalar(NamedTuple):
    """The scalar that goes on in lines indented deeper than its key. ``is_open``: it may begin there."""

    column: int
    in_json: bool
    is_open: bool = False


class Scalars:
    """``name``: a pattern of the names of secrets; ``instead``: what secrets become."""

    def __init__(self, name: str, instead: str) -> None:
        self._instead = instead
        self._entry = re.compile(
            rf"""(?:^|(?P<quote>"))(?P<indent>\ *(?:-\ +)*)'?[\w.-]{{0,100}}?{name}[\w.-]{{0,100}}'?\ *:"""
            rf"""(?:(?P<before>\s+(?:[!&]\S+\s+)*)(?P<value>\S.*)|\s*)$""",
            re.IGNORECASE,
        )

    def remove(self, text: str) -> str:
        """Returns the text without secrets of this kind."""
        parts = _END.split(text)
        scalar: _Scalar | None = None
        for at in range(0, len(parts), 2):
            escaped = at > 0 and parts[at - 1] != "\n"
            if scalar is not None:
                scalar, parts[at], is_done = self._goes_on(scalar, parts[at], escaped=escaped)
                if is_done:
                    continue
            if ":" in parts[at]:
                scalar, parts[at] = self._begins(parts[at], escaped=escaped)
        return "".join(parts)

    def _goes_on(self, scalar: _Scalar, line: str, *, escaped: bool) -> tuple[_Scalar | None, str, bool]:
        """The scalar that goes on after this line, the line, and whether it was the scalar's."""
        if scalar.in_json and not escaped:
            return None, line, False
        body, rest = _cut(line) if scalar.in_json else (line, "")
        stripped = body.lstrip(" ")
        # Without JSON, what looks like an escaped end of a line is a part of it.
        is_deeper = len(body) - len(stripped) > scalar.column or (escaped and not scalar.in_json)
        if not body.strip():
            return (None if rest else scalar), line, True
        if not is_deeper or (scalar.is_open and _NESTED.match(body)):
            return None, line, False
        made = body[: len(body) - len(stripped)] + self._instead + rest
        return (None if rest else scalar._replace(is_open=False)), made, True

    def _begins(self, line: str, *, escaped: bool) -> tuple[_Scalar | None, str]:
        found = self._entry.search(line)
        if found is None:
            return None, line
        in_json = escaped or found["quote"] is not None
        column = len(found["indent"])
        value = found["value"]
        if value is None:
            return _Scalar(column, in_json, is_open=True), line
        body, rest = _cut(value) if in_json else (value, "")
        if not body or _OTHER.match(body):
            return None, line
        if _BLOCK.match(body):
            return (None if rest else _Scalar(column, in_json)), line
        if _QUOTE.match(body):
            # Those that end in their line are a matter of others.
            is_whole = in_json or _QUOTED.match(body) is not None
            return (None, line) if is_whole else (_Scalar(column, in_json), self._with(line, found, rest))
        return (None if rest else _Scalar(column, in_json)), self._with(line, found, rest)

    def _with(self, line: str, found: re.Match[str], rest: str) -> str:
        return line[: found.start("value")] + self._instead + rest


def _cut(text: str) -> tuple[str, str]:
    """What is in a string of JSON, and what is behind it."""
    found = _JSON_QUOTE.search(text)
    return (text[: found.start()], text[found.start() :]) if found is not None else (text, "")
