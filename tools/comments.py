"""``python -m tools.comments``: prints comments that are fragments, not sentences, and exits with 1 if any is.

A comment of Python or C may not begin with "Of", "By", "Whether", "Who" or "That": what follows is hardly ever a
sentence. After "What", "For", "With" and the like it may be one: such a comment is reported if its first
sentence has too few words that can be its verb. Plurals look like verbs, so that fragments can pass; sentences
are not reported.
"""

from __future__ import annotations

import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

TOP = Path(__file__).parents[1]

_NEVER = frozenset(("of", "by", "whether", "who", "whom", "whose", "that"))
#: The number of verbs of a sentence, by its first word.
_VERBS = dict.fromkeys(("for", "with", "without", "from", "in", "at", "to"), 1) | dict.fromkeys(
    ("what", "which", "where", "as"), 2
)
_VERB = re.compile(
    r"\b(?:is|are|was|were|be|has|have|had|does|do|did|came|went|said|gave|took|showed|can|cannot|could|may|might|must|will|would|should|need"
    r"|(?!(?:this|its|us|as|plus|thus|always|less|unless|across|besides|towards|those|yes|various|previous)\b)"
    r"[a-z]{2,}(?<!s)s)\b"
)
_C_COMMENT = re.compile(r'"(?:\\.|[^"\\\n])*"|(/\*.*?\*/|//[^\n]*(?:\n[ \t]*//[^\n]*)*)', re.DOTALL)
_C_MARKS = re.compile(r"^[ \t]*(?:/\*+|\*/|\*|//+)|\*/$", re.MULTILINE)


def is_fragment(comment: str) -> bool:
    """``comment`` is the text without its marks, with its lines joined."""
    words = comment.split(maxsplit=1)
    if len(words) < 2:
        return False
    first = words[0].rstrip(",").lower()
    if not words[0][0].isupper() or first not in _NEVER | _VERBS.keys():
        return False
    sentence = re.split(r"[.;:](?:\s|$)", words[1], maxsplit=1)[0]
    return first in _NEVER or len(_VERB.findall(sentence)) < _VERBS[first]


def comments(path: Path) -> Iterator[tuple[int, str]]:
    """The first line of each comment and its text; whole lines that follow each other are one comment."""
    text = path.read_text()
    yield from _in_python(text) if path.suffix == ".py" else _in_c(text)


def _in_python(text: str) -> Iterator[tuple[int, str]]:
    first, last, column = 0, 0, 0
    parts: list[str] = []
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type != tokenize.COMMENT:
            continue
        line, start = token.start
        if parts and (line, start) != (last + 1, column):
            yield first, " ".join(parts)
            parts = []
        if not parts:
            first, column = line, start
        # A comment behind code does not go on in the next line.
        last = line if token.line.lstrip().startswith("#") else -1
        parts.append(token.string.lstrip("#:").strip())
    if parts:
        yield first, " ".join(parts)


def _in_c(text: str) -> Iterator[tuple[int, str]]:
    for match in _C_COMMENT.finditer(text):
        if match[1]:
            yield text.count("\n", 0, match.start()) + 1, " ".join(_C_MARKS.sub("", match[1]).split())


def main() -> int:
    listed = ["git", "ls-files", "*.py", "*.c", "*.h", ":!bpf/include"]
    names = subprocess.run(listed, cwd=TOP, capture_output=True, text=True, check=True).stdout.split()
    found = [
        f"{name}:{line}: {text[:100]}"
        for name in names
        if (TOP / name).exists()
        for line, text in comments(TOP / name)
        if is_fragment(text)
    ]
    for each in found:
        print(each)
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
