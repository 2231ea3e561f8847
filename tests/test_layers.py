"""``tools.layers``, which ``make lint`` runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools import layers

MAY = {"low": [], "high": ["low"], "high.part": ["high"], "high.other": ["high", "low"], "top": ["high"]}


def found(top: Path, files: dict[str, str], known: tuple[str, ...] = ()) -> list[str]:
    for name, text in files.items():
        path = top / "ebpfproxy" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return list(layers.problems(layers.modules(top), MAY, known))


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("high/a.py", "from ebpfproxy.low import x"),
        ("high/a.py", "from ebpfproxy import low"),
        ("high/a.py", "from ebpfproxy.high.b import x"),
        ("high/part/a.py", "from ebpfproxy.high import b"),
        ("top/a.py", "from ebpfproxy.high.part.a import x"),
        ("__main__.py", "from ebpfproxy.top.a import x"),
        ("low.py", "import json"),
    ],
)
def test_allowed_imports_are_no_problem(tmp_path: Path, module: str, text: str) -> None:
    assert found(tmp_path, {module: text}) == []


@pytest.mark.parametrize(
    ("module", "text", "message"),
    [
        ("low.py", "from ebpfproxy.high import a", "low -> high: low may import nothing"),
        ("low.py", "import ebpfproxy.high", "low -> high: low may import nothing"),
        (
            "low.py",
            "def f() -> None:\n    from ebpfproxy.high.a import x",
            "low -> high.a: low may import nothing",
        ),
        ("high/a.py", "from ebpfproxy.high.part import a", "high.a -> high.part: high may import low"),
        (
            "high/part/a.py",
            "from ebpfproxy.high.other.b import x",
            "high.part.a -> high.other.b: high.part may import high",
        ),
        ("top/a.py", "from ebpfproxy import low", "top.a -> low: top may import high"),
        ("new.py", "from ebpfproxy import low", "new -> low: no package of [tool.layers.may] has new"),
    ],
)
def test_import_that_violates_the_layers_is_reported(
    tmp_path: Path, module: str, text: str, message: str
) -> None:
    files = {"low.py": "", "high/__init__.py": "", "high/part/__init__.py": ""}
    assert found(tmp_path, files | {module: text}) == [message]


def test_known_violations_are_ignored_until_they_are_fixed(tmp_path: Path) -> None:
    known = ("low -> high.a",)
    assert found(tmp_path, {"low.py": "from ebpfproxy.high.a import x", "high/a.py": ""}, known) == []
    assert found(tmp_path, {"low.py": ""}, known) == ["low -> high.a: is mended, known needs it no longer"]


def test_table_with_a_cycle_or_an_unknown_name_is_invalid() -> None:
    may = {"a": ["b"], "b": ["a"], "c": ["nothing"]}
    assert list(layers.problems({}, may, ())) == [
        "[tool.layers.may] a: b does not stand above it",
        "[tool.layers.may] c: nothing does not stand above it",
    ]
