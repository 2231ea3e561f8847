"""The wheel has everything that a node needs: BPF sources and the header tree."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

TOP = Path(__file__).parents[1]


def test_the_wheel_ships_the_bpf_sources(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(tmp_path), str(TOP)], check=True
    )
    (wheel,) = tmp_path.glob("ebpfproxy-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    sources = {p.relative_to(TOP / "bpf") for p in (TOP / "bpf").rglob("*") if p.suffix in (".c", ".h")}
    assert {f"ebpfproxy/bpf/{path}" for path in sources} <= names
    assert "ebpfproxy/py.typed" in names
    assert not [name for name in names if name.startswith("tests")]
