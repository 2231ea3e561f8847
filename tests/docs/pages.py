"""Code blocks, code spans, headings and links of the documents."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tools.docs.made import DOCS, ROOT

PAGES = (ROOT / "README.md", *sorted(DOCS.glob("*.md")))
#: Generated text is not compared with the code.
WRITTEN = tuple(page for page in PAGES if page.name != "commands.md")

_FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)
_SPAN = re.compile(r"`([^`\n]+(?:\n[^`\n]+)?)`")
_LINK = re.compile(r"\[(?:[^\]\[]|\[[^\]]*\])*\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#{1,6} (.+)$", re.MULTILINE)


class Block(NamedTuple):
    page: Path
    language: str
    text: str


def blocks(page: Path) -> Iterator[Block]:
    for match in _FENCE.finditer(page.read_text()):
        indent = len(match[1])
        yield Block(page, match[2], "".join(line[indent:] for line in match[3].splitlines(keepends=True)))


def prose(page: Path) -> str:
    """Returns the text without fenced blocks."""
    return _FENCE.sub("", page.read_text())


def spans(page: Path) -> Iterator[str]:
    """Returns code spans; a span across lines becomes one line."""
    for match in _SPAN.finditer(prose(page)):
        yield " ".join(match[1].split())


def links(page: Path) -> Iterator[str]:
    for match in _LINK.finditer(prose(page)):
        yield match[1]


def anchors(page: Path) -> set[str]:
    """Returns anchors of headings as on GitHub: lower case, hyphens for spaces, no punctuation, repeats numbered."""
    found: set[str] = set()
    seen: Counter[str] = Counter()
    for match in _HEADING.finditer(prose(page)):
        name = re.sub(r"[^\w\- ]", "", match[1].lower()).strip().replace(" ", "-")
        found.add(f"{name}-{seen[name]}" if seen[name] else name)
        seen[name] += 1
    return found
