"""``tools.comments``, which ``make lint`` runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.comments import comments, is_fragment


@pytest.mark.parametrize(
    "text",
    [
        "Of the device while it is kept.",
        "By name: the pods.",
        "Whether a packet is translated.",
        "What a packet becomes.",
        "What an install creates: one object of each kind.",
        "For mode ClusterCIDR.",
        "Without an agent.",
    ],
)
def test_fragments(text: str) -> None:
    assert is_fragment(text)


@pytest.mark.parametrize(
    "text",
    [
        "The device is kept.",
        "What cannot be read keeps its place.",
        "For CPUs that are offline the map has no value.",
        "Without a Node object the default route decides.",
        "In the second pass every id is free.",
        "What",
        "of a port",
    ],
)
def test_sentences(text: str) -> None:
    assert not is_fragment(text)


def test_comments_of_python_and_c(tmp_path: Path) -> None:
    python, c = tmp_path / "a.py", tmp_path / "a.c"
    python.write_text('x = "# no"  # behind code\n#: First line,\n#: second line.\n\n# another\n')
    c.write_text('/* one\n * two */\nint x; // behind\n\n// first\n// second\nchar *s = "// no";\n')
    assert list(comments(python)) == [
        (1, "behind code"),
        (2, "First line, second line."),
        (5, "another"),
    ]
    assert list(comments(c)) == [(1, "one two"), (3, "behind"), (5, "first second")]
