"""Structures are decoded by decoders that are made when their module is imported."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import ebpfproxy
from ebpfproxy.datapath.programs import bytecode

_PACKAGE = Path(ebpfproxy.__file__).parent
#: Decodes one file in many threads, the first time in this process.
_FIRST_USE = """
import sys, threading
from pathlib import Path
from ebpfproxy.datapath.programs import bytecode
sys.setswitchinterval(1e-6)
path, count = Path(sys.argv[1]), 8
found, start = [], threading.Barrier(count)
def read():
    start.wait()
    found.append(bytecode._read(path))
threads = [threading.Thread(target=read) for _ in range(count)]
for each in threads:
    each.start()
for each in threads:
    each.join()
assert found == [found[0]] * count and found[0] is not None
"""


def _late_decoders(path: Path) -> Iterator[str]:
    """Yields calls of msgspec's decode() for a type of its own; aliases of dict and list are none."""
    tree = ast.parse(path.read_text())
    structures = {node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
    structures |= {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("json.decode", "msgpack.decode")):
            for argument in node.keywords:
                if isinstance(argument.value, ast.Name) and argument.value.id in structures:
                    yield f"{path}:{node.lineno}: {ast.unparse(node)}"


def test_no_structure_is_decoded_by_a_decoder_that_is_made_for_one_call() -> None:
    """msgspec 0.22 makes it in several steps; another thread that decodes the same type meanwhile crashes."""
    found = [late for path in sorted(_PACKAGE.rglob("*.py")) for late in _late_decoders(path)]
    allowed = ("type=Object", "type=Plain")
    assert [late for late in found if not any(alias in late for alias in allowed)] == []


@pytest.mark.parametrize("attempt", range(3))
def test_threads_may_be_the_first_to_decode_bytecode_at_once(tmp_path: Path, attempt: int) -> None:
    stored = bytecode.Bytecode({"x": bytecode.Program(b"12345678", [(0, "m")], [(1, "c")])}, "")
    bytecode._write(tmp_path / "one", stored)
    command = [sys.executable, "-c", _FIRST_USE, str(tmp_path / "one")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
