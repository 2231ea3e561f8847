"""Probing, compiling, loading; and what is said when it does not work."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import msgspec
import pytest

from ebpfproxy.config.datapath import Capacity
from ebpfproxy.datapath.abi import uapi
from ebpfproxy.datapath.abi.hooks import GUARD, LOOPBACK, PACKETS, RAW_PACKETS, SOCKET_HOOKS, SOCKETS
from ebpfproxy.datapath.kernel import bpf, maps, probe
from ebpfproxy.datapath.kernel.grace import Grace
from ebpfproxy.datapath.kernel.roots import Lock, RootError, check_cgroup, ensure_bpffs, is_locked
from ebpfproxy.datapath.programs import loader

pytestmark = pytest.mark.root

OPTIONS = loader.Options(
    features=probe.Features(set_retval=True), host_netns_cookie=1, node_ports_on_loopback=True
)


def test_programs_are_compiled_once_and_found_again(pins: Path) -> None:
    opened = maps.open_or_create(pins, Capacity())
    folder = loader.ensure_loaded(opened, OPTIONS)
    ids = [loader.program_id(folder / hook.name) for hook in SOCKET_HOOKS]
    assert None not in ids
    assert loader.ensure_loaded(opened, OPTIONS) == folder
    assert [loader.program_id(folder / hook.name) for hook in SOCKET_HOOKS] == ids


CHOICES: list[dict[str, Any]] = [
    {"features": probe.Features(set_retval=False, mptcp=False)},
    {"node_ports_on_loopback": False, "bypass_netfilter": True, "pod_sockets": False},
    {"masquerade_all": True, "pods_by_cidr": True},
    {"masquerade_all": True, "bypass_netfilter": True, "pods_by_cidr": True},
    {"masquerade_ports": (61000, 65535)},
    {"masquerade_ports": (32768, 65535), "masquerade_ports_shared": True},
    {"masquerade_ports_shared": True, "masquerade_all": True, "bypass_netfilter": True},
]


@pytest.mark.parametrize("chosen", CHOICES, ids="-".join)
def test_every_option_compiles_without_a_warning_and_loads(pins: Path, chosen: dict[str, Any]) -> None:
    """The loader compiles with -Wall -Wextra -Werror; for devices without a link layer, too."""
    options = msgspec.structs.replace(OPTIONS, **chosen)
    opened = maps.open_or_create(pins, Capacity())
    modules = (SOCKETS, GUARD, PACKETS, RAW_PACKETS, LOOPBACK)
    assert loader.ensure_loaded(opened, options, modules).is_dir()


def changed_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str, after: str) -> None:
    """``sock.c`` with ``after`` in the place of ``before``."""
    shutil.copytree(loader.source_folder(), tmp_path / "bpf")
    source = tmp_path / "bpf" / "sock.c"
    assert before in source.read_text()
    source.write_text(source.read_text().replace(before, after))
    monkeypatch.setattr(loader, "source_folder", lambda: tmp_path / "bpf")


def test_the_verifiers_own_words_with_program_and_kernel(
    pins: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A program that the verifier refuses leaves no pin."""
    begin = "int recvmsg4(struct bpf_sock_addr *ctx)\n{"
    changed_source(tmp_path, monkeypatch, begin, f"{begin}\n\tif (ctx->user_port)\n\t\treturn 0;")
    opened = maps.open_or_create(pins, Capacity())
    with pytest.raises(loader.LoadError) as refused:
        loader.ensure_loaded(opened, OPTIONS)
    lines = str(refused.value).splitlines()
    assert lines[0] == f"program recvmsg4 does not load (kernel {platform.release()}): Invalid argument"
    assert any("At program exit the register R0" in line for line in lines)
    assert len(lines) <= 13
    assert list(opened.folder.glob("progs-*")) == []


def test_the_compilers_own_words(pins: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    changed_source(tmp_path, monkeypatch, "int recvmsg4(struct bpf_sock_addr *ctx)", "foo recvmsg4(void)")
    opened = maps.open_or_create(pins, Capacity())
    with pytest.raises(loader.LoadError) as refused:
        loader.ensure_loaded(opened, OPTIONS)
    lines = str(refused.value).splitlines()
    assert lines[0] == f"{tmp_path}/bpf/sock.c does not compile (kernel {platform.release()}):"
    assert lines[1].endswith("unknown type name 'foo'")
    assert list(opened.folder.glob("progs-*")) == []


def test_a_missing_must_have_names_itself_and_its_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = probe._MustHave("the frobnicator", "5.9", lambda: False)
    monkeypatch.setattr(probe, "_MUST_HAVES", (missing,))
    with pytest.raises(probe.UnsupportedKernelError, match=r"lacks the frobnicator: Linux 5\.9 has it"):
        probe.probe()


def test_this_kernel_has_what_is_needed() -> None:
    assert isinstance(probe.probe(), probe.Features)


def test_a_grace_period_ends() -> None:
    grace = Grace()
    grace.wait()
    grace.close()


def test_one_lock_a_folder(tmp_path: Path) -> None:
    lock = Lock([("--bpf-root", tmp_path)])
    assert is_locked(tmp_path)
    with pytest.raises(RootError, match=f"--bpf-root {tmp_path} is in use"):
        Lock([("--bpf-root", tmp_path)])
    lock.release()
    assert not is_locked(tmp_path)


def test_a_cgroup_root_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(RootError, match="not a cgroup v2 folder"):
        check_cgroup(tmp_path)


def test_a_bpffs_is_mounted_where_none_is(tmp_path: Path) -> None:
    root = tmp_path / "bpf"
    try:
        assert ensure_bpffs(root)
        assert not ensure_bpffs(root)
        bpf.pin(fd := bpf.map_create(uapi.MAP_HASH, "x", 4, 4, 1), root / "x")
        os.close(fd)
    finally:
        subprocess.run(["umount", str(root)], check=True)
