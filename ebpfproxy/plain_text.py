"""Text of others, as a terminal may show it: processes choose their names, and the API many others.

What a terminal obeys (escape sequences, also those that begin with one of U+0080 to U+009F) and what changes
the order of letters (bidirectional marks) is replaced.
"""

from __future__ import annotations

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


def plain(text: str) -> str:
    """One line that a terminal shows and does not obey."""
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else _REPLACEMENT for each in text)


def plain_lines(text: str) -> str:
    """The same of several lines."""
    return "\n".join(map(plain, text.split("\n")))


def escaped_json(text: str) -> str:
    """JSON of the same meaning that a terminal does not obey: only strings have what cannot be printed."""
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() or each == "\n" else escaped(each) for each in text)


def escaped(each: str) -> str:
    """A character as JSON escapes it."""
    packed = each.encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{packed[at : at + 2].hex()}" for at in range(0, len(packed), 2))
