"""``make test-newest``: the newest versions that pyproject.toml allows, and what of the tests they break.

Makes a lock of them in an environment of its own (.venv-newest), says which versions differ from the lock in
tools/lock, and runs the tests, or the part that the arguments name. What fails there and not with the locked
versions is run again with one package after the other at its locked version, to say which breaks it.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

TOP = Path(__file__).parents[1]
LOCK = TOP / "tools/lock/test.txt"
VENV = TOP / ".venv-newest"
_BLOCK = re.compile(r"^([A-Za-z0-9._-]+)==([^ \\]+)(?:.*\n)(?: {4}.*\n?)*", re.MULTILINE)


def blocks(lock: Path) -> dict[str, tuple[str, str]]:
    """By package: its version, and its lines with their hashes."""
    return {found[1]: (found[2], found[0]) for found in _BLOCK.finditer(lock.read_text())}


def _pytest(python: Path, *arguments: str) -> list[str]:
    """The tests that fail; what pytest says goes to the terminal."""
    done = subprocess.run(
        [python, "-m", "pytest", "-q", "-rfE", *arguments],
        cwd=TOP,
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    print(done.stdout, flush=True)
    if done.returncode > 1:
        raise SystemExit(f"pytest ended with {done.returncode}")
    return re.findall(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", done.stdout, re.MULTILINE)


def _install(lines: str) -> None:
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as requirements:
        requirements.write(lines)
        requirements.flush()
        command = [str(VENV / "bin/python"), "-m", "pip", "install", "-q", "--no-deps", "--require-hashes"]
        subprocess.run([*command, "-r", requirements.name], check=True)


def main(arguments: list[str]) -> int:
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([TOP / "tools/lock.sh", folder], check=True)
        subprocess.run([TOP / "tests/setup.sh", VENV, folder], check=True, cwd=TOP)
        newest, locked = blocks(Path(folder, "test.txt")), blocks(LOCK)
    none = ("not there", "")
    differing = [
        name
        for name in sorted(newest.keys() | locked.keys())
        if newest.get(name, none)[0] != locked.get(name, none)[0]
    ]
    for name in differing:
        print(f"{name}: locked {locked.get(name, none)[0]}, newest {newest.get(name, none)[0]}")
    if not differing:
        print("the lock has the newest versions of all packages")
        return 0
    broken = _pytest(VENV / "bin/python", *arguments)
    if not broken:
        print("nothing breaks: make lock")
        return 0
    broken = sorted(set(broken) - set(_pytest(TOP / ".venv/bin/python", *broken)))
    if not broken:
        print("what fails does so with the locked versions, too")
        return 1
    guilty: dict[str, list[str]] = {}
    for name in differing:
        if name not in locked or name not in newest:
            continue
        _install(locked[name][1])
        for test in set(broken) - set(_pytest(VENV / "bin/python", *broken)):
            guilty.setdefault(test, []).append(f"{name} {newest[name][0]}")
        _install(newest[name][1])
    for test in broken:
        print(f"{test}: broken by {' and '.join(guilty.get(test, ['several together']))}")
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
