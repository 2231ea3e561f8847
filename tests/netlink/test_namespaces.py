"""Discovery of network namespaces: the process's own and those mounted in the runtimes' folders."""

from __future__ import annotations

from pathlib import Path

import pytest

from ebpfproxy.netlink import namespaces
from tests.lab import Lab


@pytest.mark.root
def test_name_that_is_not_mounted_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "stale").touch(mode=0)
    with Lab() as lab:
        node = lab.node("node-a")
        monkeypatch.setattr(namespaces, "FOLDERS", (tmp_path, Path("/run/netns")))
        found = list(namespaces.namespaces())
        assert found[0] == Path("/proc/self/ns/net")
        assert Path("/run/netns", node.netns) in found
        assert tmp_path / "stale" not in found
