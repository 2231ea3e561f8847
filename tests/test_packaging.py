"""The wheel has everything that a node and an operator need: BPF sources, the header tree, manifests."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

TOP = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(folder), str(TOP)], check=True
    )
    (found,) = folder.glob("ebpfproxy-*.whl")
    return found


def test_the_wheel_ships_the_bpf_sources(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    sources = {p.relative_to(TOP / "bpf") for p in (TOP / "bpf").rglob("*") if p.suffix in (".c", ".h")}
    assert {f"ebpfproxy/bpf/{path}" for path in sources} <= names
    assert "ebpfproxy/py.typed" in names
    assert not [name for name in names if name.startswith("tests")]


def test_it_ships_every_package(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = {str(path.relative_to(TOP)) for path in (TOP / "ebpfproxy").rglob("*.py")}
    assert modules <= names


def test_it_installs_from_the_manifests_that_it_ships(wheel: Path, tmp_path: Path) -> None:
    """Unpacked, away from the checkout."""
    archive = zipfile.ZipFile(wheel)
    base = {path.name: path.read_bytes() for path in (TOP / "deploy/base").iterdir()}
    assert {name: archive.read(f"ebpfproxy/deploy/{name}") for name in base} == base
    archive.extractall(tmp_path)
    script = "from ebpfproxy.install import base; print(base.folder(), len(base.objects()))"
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == f"{tmp_path}/ebpfproxy/deploy 5\n"
