"""Discovery of network namespaces: the process's own and those mounted in the runtimes' folders."""

from __future__ import annotations

import subprocess
import sys
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


@pytest.mark.root
@pytest.mark.parametrize(("capabilities", "found"), [("+all", "1 True"), ("-sys_admin", "1 False")])
def test_no_namespace_may_be_entered_where_none_is_seen_without_the_capability(
    capabilities: str, found: str
) -> None:
    """As in a container with processes and folders of its own."""
    code = "from ebpfproxy.netlink import namespaces as n; print(len(list(n.namespaces())), n.may_enter(), end='')"
    alone = ["unshare", "--pid", "--fork", "--mount-proc", "--", "sh", "-c"]
    script = 'mount -t tmpfs none /run && exec setpriv "--bounding-set=$0" "$@"'
    run = [*alone, script, capabilities, sys.executable, "-c", code]
    assert subprocess.run(run, capture_output=True, text=True, check=True).stdout == found
