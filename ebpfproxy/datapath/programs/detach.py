"""Takes away every attachment and every pin of a root."""

from __future__ import annotations

import shutil
from pathlib import Path

from ebpfproxy.datapath.programs import xdp_places
from ebpfproxy.datapath.programs.attach import LINKS, detach
from ebpfproxy.datapath.programs.devices import remove_filters

#: Seconds for answers to datagrams that were sent to a backend of our choice. Where they come later, the
#: application sees the backend's address and not the one that it asked.
ANSWER_SECONDS = 1.5
#: These hooks choose backends; the others tell applications the frontend's address.
_CHOOSING = ("connect4", "connect6", "sendmsg4", "sendmsg6")


def choose_no_more(pins: Path) -> list[str]:
    """Detaches the hooks that choose backends for sockets; replies to them still pass the other hooks.

    Returns what was removed, in words. If anything was, the caller waits :data:`ANSWER_SECONDS` before
    :func:`remove_everything`.
    """
    return [f"detached {name}" for name in _CHOOSING if detach(pins / LINKS / name)]


def remove_everything(pins: Path) -> list[str]:
    """Links first, so that no program is left without its maps. Returns what was removed, in words."""
    removed = remove_filters()
    if (pins / LINKS).is_dir():
        for link in sorted((pins / LINKS).iterdir()):
            removed.append(xdp_places.detach(link) if _is_chained(link) else f"detached {link.name}")
            link.unlink(missing_ok=True)
    if pins.is_dir():
        for version in sorted(p for p in pins.iterdir() if p.name != LINKS):
            count = sum(1 for p in version.rglob("*") if not p.is_dir())
            shutil.rmtree(version)
            removed.append(f"unpinned {version} ({count} maps and programs)")
        shutil.rmtree(pins)
    return removed


def _is_chained(link: Path) -> bool:
    place = xdp_places.place_of(link)
    return place is not None and place.is_chained


def remove_other_versions(pins: Path, keep: Path) -> list[Path]:
    """Unpins the maps of other layouts, once no attached program uses them."""
    others = [p for p in pins.iterdir() if p.name != LINKS and p != keep]
    for folder in others:
        shutil.rmtree(folder)
    return others
