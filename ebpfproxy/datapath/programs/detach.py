"""Takes away every attachment and every pin of a root."""

from __future__ import annotations

import shutil
from pathlib import Path

from ebpfproxy.datapath.programs.attach import LINKS
from ebpfproxy.datapath.programs.devices import remove_filters


def remove_everything(pins: Path) -> list[str]:
    """Links first, so that no program is left without its maps. Returns what was removed, in words."""
    removed = remove_filters()
    if (pins / LINKS).is_dir():
        for link in sorted((pins / LINKS).iterdir()):
            link.unlink()
            removed.append(f"detached {link.name}")
    if pins.is_dir():
        for version in sorted(p for p in pins.iterdir() if p.name != LINKS):
            count = sum(1 for p in version.rglob("*") if not p.is_dir())
            shutil.rmtree(version)
            removed.append(f"unpinned {version} ({count} maps and programs)")
        shutil.rmtree(pins)
    return removed


def remove_other_versions(pins: Path, keep: Path) -> list[Path]:
    """Unpins the maps of other layouts, once no attached program uses them."""
    others = [p for p in pins.iterdir() if p.name != LINKS and p != keep]
    for folder in others:
        shutil.rmtree(folder)
    return others
