"""Files, modules and names that comments, docstrings and docs refer to exist."""

from __future__ import annotations

import ast
import functools
import io
import re
import subprocess
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

TOP = Path(__file__).parents[1]
#: ``lib/maps.h``, but neither a pattern nor a part of an address or a longer name.
FILE = re.compile(r"(?<![\w./{}$*<-])((?:[\w-]+/)*[\w-]+\.(?:py|c|h|sh|md))(?![\w/*])")
#: ``datapath.kernel.maps`` or ``services.reduce.reducer``.
DOTTED = re.compile(r"(?<!`)``((?:[a-z_]\w*\.)+[A-Za-z_]\w*)``")
#: A role of Sphinx with a name of this module, or with a dotted one.
ROLE = re.compile(r":\w+:`~?([\w.]+)`")

#: A function, macro or field with the file of bpf/ that has it: ``find_source`` of flow.h.
IN_C = re.compile(r"\b([A-Za-z_]{3,})(?:\(\))?(?:``)?\s+(?:in|of)\s+(?:bpf/)?(?:lib/)?([a-z_]+\.[ch])\b")
#: A row of a package's table of modules.
MODULE_ROW = re.compile(r"^\| (``\w+``(?:, ``\w+``)*) \|", re.MULTILINE)

#: Files of the kernel, libc, Kubernetes, Cilium and CoreDNS.
ELSEWHERE = re.compile(
    r"(linux|asm-generic|net/netfilter|include/uapi)/.*\.[ch]|(nf_|ip_vs|tcp_states|kernel/bpf/syscall).*\.[ch]"
    r"|bpf/lib/neigh\.h|docs/specification\.md"
)
#: Names that look like a module's but are of a file, a sysctl or an attribute of a variable.
NO_MODULE = re.compile(
    r".*\.(json|jsonl|crt|key|conf|test|c|h|io)|kernel\.bpf_\w+|conntrack\.max\w+|(a|master|pod|wanted)\.\w+"
)


@functools.cache
def files() -> dict[str, Path]:
    """Returns the files of the repository by their relative names."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    found = subprocess.run(listed, cwd=TOP, check=True, capture_output=True, text=True).stdout.splitlines()
    return {name: TOP / name for name in found if (TOP / name).is_file()}


@functools.cache
def suffixes() -> frozenset[str]:
    """Returns each file's name with all, some and none of its folders."""
    return frozenset(
        "/".join(parts[at:]) for parts in (name.split("/") for name in files()) for at in range(len(parts))
    )


@functools.cache
def in_c() -> dict[str, str]:
    """Returns the code of bpf/ by files' names, without comments."""
    return {
        path.name: re.sub(r"/\*.*?\*/", "", path.read_text(), flags=re.S)
        for name, path in files().items()
        if re.fullmatch(r"bpf/(lib/)?\w+\.[ch]", name)
    }


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def docstrings(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
        yield ast.get_docstring(node) or ""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt | ast.ExceptHandler):
            yield from docstrings(child)


def comments(source: str) -> Iterator[str]:
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    yield from (token.string for token in tokens if token.type == tokenize.COMMENT)


def texts(path: Path) -> Iterator[str]:
    """Yields docstrings of code, comments of C, and whole documents."""
    if path.suffix == ".md":
        yield path.read_text()
    elif path.suffix in (".c", ".h"):
        yield from re.findall(r"/\*.*?\*/|//[^\n]*", path.read_text(), re.S)
    else:
        yield from docstrings(parsed(path))


@functools.cache
def names_in(path: Path) -> frozenset[str]:
    """Returns all names that a module defines or imports at any depth."""
    found = set()
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found.update(alias.asname or alias.name for alias in node.names)
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.add(node.id if isinstance(node, ast.Name) else node.attr)
    return frozenset(found)


def is_there(dotted: str, path: Path) -> bool:
    """Returns True for a module or a name in one, relative to the top, the package or the text's folder."""
    parts = dotted.split(".")
    for base in (TOP, TOP / "ebpfproxy", TOP / "tests", *path.parents):
        if not base.is_relative_to(TOP):
            continue
        for split in range(len(parts), 0, -1):
            module = base.joinpath(*parts[:split])
            if (module / "__init__.py").is_file():
                module /= "__init__"
            source = module.with_suffix(".py")
            if source.is_file() and set(parts[split:]) <= names_in(source):
                return True
    return False


def wrong(path: Path) -> list[str]:
    found = [name for text in texts(path) for name in wrong_in(text, path)]
    if path.suffix == ".py":
        source = path.read_text()
        # A tokenizer takes its time: it is asked only where the rest of a line after # has something wrong.
        rests = (line[line.index("#") :] for line in source.splitlines() if "#" in line)
        if any(name for rest in rests for name in wrong_in(rest, path)):
            found += [name for comment in comments(source) for name in wrong_in(comment, path)]
    return found


def wrong_in(text: str, path: Path) -> Iterator[str]:
    for name in FILE.findall(text):
        if not ELSEWHERE.fullmatch(name) and name not in suffixes():
            yield name
    for name, file in IN_C.findall(text):
        if (
            not re.match(r"[A-Z]?[a-z]+$", name)
            and file in in_c()
            and not re.search(rf"\b{name}\b", in_c()[file])
        ):
            yield f"{name} in {file}"
    if path.suffix == ".py":
        for name in DOTTED.findall(text):
            if not NO_MODULE.fullmatch(name) and not is_there(name, path):
                yield name
        for name in ROLE.findall(text):
            if name.partition(".")[0] not in names_in(path) and not is_there(name, path):
                yield name


@pytest.mark.parametrize("suffix", [".py", ".c", ".h", ".md"])
def test_references_of_comments_and_docs_exist(suffix: str) -> None:
    found = {
        f"{name}: {each}"
        for name, path in files().items()
        if path.suffix == suffix and "include" not in path.parts
        for each in wrong(path)
    }
    assert not found


@pytest.mark.parametrize(
    "package", sorted({path.parent for name, path in files().items() if re.match(r"ebpfproxy/.*\.py$", name)})
)
def test_tables_of_modules_are_complete(package: Path) -> None:
    """A package whose docstring has a table of its modules has all of them there, and no others."""
    rows = MODULE_ROW.findall(ast.get_docstring(parsed(package / "__init__.py")) or "")
    found = {name for row in rows for name in re.findall(r"\w+", row)}
    assert not found or found == {path.stem for path in package.glob("*.py")} - {"__init__"}
