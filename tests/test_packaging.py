"""The wheel has BPF sources, headers and manifests, and the lock files agree with the project."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tools import newest

TOP = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    # pip calls the same, and takes seconds of its own.
    build = f"from setuptools import build_meta; build_meta.build_wheel({str(folder)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=TOP, check=True)
    (found,) = folder.glob("ebpfproxy-*.whl")
    return found


def test_the_wheel_ships_the_bpf_sources(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    sources = {p.relative_to(TOP / "bpf") for p in (TOP / "bpf").rglob("*") if p.suffix in (".c", ".h")}
    assert {f"ebpfproxy/bpf/{path}" for path in sources} <= names
    assert "ebpfproxy/py.typed" in names
    assert not [name for name in names if name.startswith("tests")]


def test_the_wheel_ships_the_bytecode_of_every_program(wheel: Path, tmp_path: Path) -> None:
    """The wheel is unpacked outside the checkout, and the package's own list of programs is used."""
    zipfile.ZipFile(wheel).extractall(tmp_path)
    script = (
        "from ebpfproxy.datapath.abi.hooks import MODULES\n"
        "from ebpfproxy.datapath.programs import bytecode, loader\n"
        "needed = {loader.recipe(loader.source_folder(), module).digest() for module in MODULES}\n"
        "print(needed == {path.name for path in bytecode.SHIPPED.iterdir()}, bytecode.SHIPPED)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == f"True {tmp_path}/ebpfproxy/bytecode\n"


def test_the_wheel_ships_every_package(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = {str(path.relative_to(TOP)) for path in (TOP / "ebpfproxy").rglob("*.py")}
    assert modules <= names


def test_the_wheel_ships_the_page(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    page = {path.name: path.read_bytes() for path in (TOP / "ebpfproxy/ui/static").iterdir()}
    assert {name: archive.read(f"ebpfproxy/ui/static/{name}") for name in page} == page


def test_the_wheel_installs_from_its_manifests(wheel: Path, tmp_path: Path) -> None:
    """The wheel is unpacked outside the checkout."""
    archive = zipfile.ZipFile(wheel)
    base = {path.name: path.read_bytes() for path in (TOP / "deploy/base").iterdir()}
    assert {name: archive.read(f"ebpfproxy/deploy/{name}") for name in base} == base
    archive.extractall(tmp_path)
    script = "from ebpfproxy.operator.install import base; print(base.folder(), len(base.objects()))"
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == f"{tmp_path}/ebpfproxy/deploy 5\n"


# -- the lock files (tools/lock), which setup, image and CI install


LOCKS = {
    name: newest.blocks(TOP / f"tools/lock/{name}.txt")
    for name in ("build", "agent", "ui", "otlp", "test", "fuzz", "setup")
}
PROJECT = tomllib.loads((TOP / "pyproject.toml").read_text())


@pytest.mark.parametrize(
    ("lock", "wanted"),
    [
        ("build", PROJECT["build-system"]["requires"]),
        ("agent", PROJECT["project"]["dependencies"]),
        ("test", PROJECT["project"]["dependencies"]),
        ("test", PROJECT["project"]["optional-dependencies"]["test"]),
        ("test", PROJECT["project"]["optional-dependencies"]["ui"]),
        ("test", PROJECT["project"]["optional-dependencies"]["otlp"]),
        ("ui", PROJECT["project"]["optional-dependencies"]["ui"]),
        ("otlp", PROJECT["project"]["optional-dependencies"]["otlp"]),
        ("fuzz", PROJECT["project"]["optional-dependencies"]["fuzz"]),
        ("setup", PROJECT["project"]["optional-dependencies"]["setup"]),
        ("test", PROJECT["build-system"]["requires"]),
    ],
)
def test_lock_files_have_every_requirement_of_the_project(lock: str, wanted: list[str]) -> None:
    for requirement in map(Requirement, wanted):
        version, _ = LOCKS[lock][canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), requirement


def test_locks_of_extras_have_nothing_that_the_others_have() -> None:
    """The image installs one over the other."""
    assert not LOCKS["ui"].keys() & LOCKS["agent"].keys()
    assert not LOCKS["otlp"].keys() & (LOCKS["agent"].keys() | LOCKS["ui"].keys())


def test_locks_agree_and_pin_every_file_by_its_hash() -> None:
    """They name no registry, and nothing but versions and hashes."""
    for name, lock in LOCKS.items():
        text = (TOP / f"tools/lock/{name}.txt").read_text()
        lines = [line for line in text.splitlines() if line and not line.startswith("#")]
        assert sum(len(block.splitlines()) for _, block in lock.values()) == len(lines)
        for package, (version, block) in lock.items():
            head, *hashes = block.splitlines()
            assert head == f"{package}=={version} \\"
            assert hashes
            assert all(re.fullmatch(r"    --hash=sha256:[0-9a-f]{64}( \\)?", each) for each in hashes)
            # What fuzzing alone needs is not part of the set-up.
            assert LOCKS["test" if package in LOCKS["test"] else name][package][0] == version
