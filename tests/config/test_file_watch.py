"""A configuration file that is another one than the one in use."""

from __future__ import annotations

import os
import threading
from pathlib import Path

from ebpfproxy.config.file_watch import ReadFile


def test_change_between_reading_and_watching_is_noticed(tmp_path: Path) -> None:
    """What counts is what was parsed, not what is there when watching begins."""
    path = tmp_path / "config.yaml"
    path.write_text("mode: ipvs")
    file, seen = ReadFile(path, path.read_bytes()), threading.Event()
    assert not file.has_changed
    path.write_text("mode: nftables")
    assert file.has_changed
    file.watch(seen.set, seconds=0.01)
    assert seen.wait(60)


def test_missing_file_is_no_change_until_it_is_back_with_another_content(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    file = ReadFile(path, b"mode: ipvs")
    assert not file.has_changed
    path.write_text("mode: ipvs")
    assert not file.has_changed
    path.write_text("mode: iptables")
    assert file.has_changed


def test_pipe_is_read_once_only(tmp_path: Path) -> None:
    """A shell's ``--config <(command)`` has no content any more after the first read."""
    path = tmp_path / "config.yaml"
    os.mkfifo(path)
    assert not ReadFile(path, b"mode: ipvs").has_changed
