"""``python -m tools.layers``: prints imports that violate the layers, and exits with 1 if there are any.

pyproject.toml has them in ``[tool.layers]``. ``may``: what each package may import beside itself; a package
stands below all that it may import, so that there is no circle. A module belongs to the longest name that it
begins with. A name allows all names that begin with it, but to a package inside of it only itself. ``known``: imports that are still to be mended;
one that is mended already is an error, too.
"""

from __future__ import annotations

import ast
import sys
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

TOP = Path(__file__).parents[1]
PACKAGE = "ebpfproxy"


def modules(top: Path) -> dict[str, Path]:
    """Files of the package, by their names without the package's."""
    found = {}
    for path in sorted((top / PACKAGE).rglob("*.py")):
        parts = path.relative_to(top / PACKAGE).with_suffix("").parts
        found[".".join(part for part in parts if part != "__init__")] = path
    return found


def imports(files: Mapping[str, Path]) -> Iterator[tuple[str, str]]:
    """Which module imports which, also within functions, by names as in ``files``; not the package's own two."""
    for importer, path in files.items():
        if importer in ("", "__main__"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names: list[str] = []
            if isinstance(node, ast.ImportFrom):
                package = node.module or ""
                names = [f"{package}.{alias.name}" for alias in node.names]
                names = [name if _inside(name) in files else package for name in names]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            yield from ((importer, name) for full in names if (name := _inside(full)))


def _inside(name: str) -> str:
    """The name without the package's; empty for the package itself and for others."""
    return name.removeprefix(f"{PACKAGE}.") if name.startswith(f"{PACKAGE}.") else ""


def _is_in(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def _allowed(package: str, other: str, names: Iterable[str]) -> list[str]:
    """Which of ``names`` a package may import where it may import ``other``."""
    return [each for each in names if each == other or (_is_in(each, other) and not _is_in(package, other))]


def problems(
    files: Mapping[str, Path], may: Mapping[str, Sequence[str]], known: Sequence[str]
) -> Iterator[str]:
    """One line for each import that is not allowed, and for each setting that is wrong."""
    names = list(may)
    open_to: dict[str, set[str]] = {}
    for at, (package, others) in enumerate(may.items()):
        open_to[package] = {package}
        for other in others:
            allowed = _allowed(package, other, names)
            open_to[package].update(allowed)
            if not allowed or not set(allowed) <= set(names[:at]):
                yield f"[tool.layers.may] {package}: {other} does not stand above it"
    used = set()
    for importer, imported in sorted(set(imports(files))):
        home, target = _home(importer, names), _home(imported, names)
        text = f"{importer} -> {imported}"
        if not home:
            yield f"{text}: no package of [tool.layers.may] has {importer}"
        elif text in known:
            used.add(text)
        elif target not in open_to[home]:
            yield f"{text}: {home} may import {', '.join(may[home]) or 'nothing'}"
    yield from (f"{text}: is mended, known needs it no longer" for text in known if text not in used)


def _home(module: str, names: Iterable[str]) -> str:
    return max((name for name in names if _is_in(module, name)), key=len, default="")


def main() -> int:
    settings = tomllib.loads((TOP / "pyproject.toml").read_text())["tool"]["layers"]
    found = list(problems(modules(TOP), settings["may"], settings["known"]))
    for line in found:
        print(line)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
