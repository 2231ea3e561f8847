"""Probing, compiling and loading of programs, and their errors."""

from __future__ import annotations

import ctypes as ct
import os
import platform
import re
import shutil
import signal
import struct
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from ebpfproxy.config.datapath import Capacity
from ebpfproxy.datapath.abi import uapi
from ebpfproxy.datapath.abi.hooks import MODULES, RECORDS, SOCKET_HOOKS, SOCKETS, Module
from ebpfproxy.datapath.kernel import bpf, maps, probe
from ebpfproxy.datapath.kernel.grace import Grace
from ebpfproxy.datapath.kernel.libbpf import ProgInfo
from ebpfproxy.datapath.kernel.maps import MapSet
from ebpfproxy.datapath.kernel.roots import Lock, RootError, check_cgroup, ensure_bpffs, is_locked
from ebpfproxy.datapath.kernel.socket_fields import find_socket_fields
from ebpfproxy.datapath.programs import bytecode, loader
from ebpfproxy.datapath.programs.attach import program_id

pytestmark = pytest.mark.root

OPTIONS = loader.Options(
    features=probe.Features(set_retval=True, socket_fields=find_socket_fields()),
    host_netns_cookie=1,
    node_ports_on_loopback=True,
    forwards_at_xdp=True,
)


@pytest.fixture
def opened(pins: Path) -> Iterator[MapSet]:
    made = maps.open_or_create(pins, Capacity())
    yield made
    made.close()


def test_programs_are_compiled_once_and_reused(opened: MapSet) -> None:
    folder = loader.ensure_loaded(opened, OPTIONS)
    ids = [program_id(folder / hook.name) for hook in SOCKET_HOOKS]
    assert None not in ids
    assert loader.ensure_loaded(opened, OPTIONS) == folder
    assert [program_id(folder / hook.name) for hook in SOCKET_HOOKS] == ids


def test_programs_are_loaded_again_where_a_map_that_they_use_is_another(pins: Path) -> None:
    """Somebody has pinned another map in its place. What is attached stays whole until it is replaced."""
    modules = (SOCKETS, RECORDS)
    opened = maps.open_or_create(pins, Capacity())
    former = loader.ensure_loaded(opened, OPTIONS, modules)
    programs = {pin.name: program_id(pin) for pin in former.iterdir()}
    pin = opened.folder / "maps" / "frontend_generation"
    pin.unlink()
    spec = opened["frontend_generation"].spec
    opened.close()
    other = bpf.map_create(spec.kind, "other", spec.key_size, spec.value_size, 1, flags=spec.flags)
    bpf.pin(other, pin)
    os.close(other)
    again = maps.open_or_create(pins, Capacity())
    folder = loader.ensure_loaded(again, OPTIONS, modules)
    assert {pin.name: program_id(pin) for pin in former.iterdir()} == programs
    ours = {bpf.map_info(each.fd).id: name for name, each in again.maps.items()}
    assert {pin.name for pin in folder.iterdir()} == programs.keys()
    for pin in folder.iterdir():
        with bpf.opened(pin) as fd:
            used = _maps_of_program(fd)
        assert used <= ours.keys(), pin.name
        assert pin.name != "connect4" or "frontend_generation" in {ours[number] for number in used}
    assert loader.remove_others(again, folder) == [former]
    again.close()


def _maps_of_program(fd: int) -> set[int]:
    """Their ids. The kernel lets no program use more (MAX_USED_MAPS)."""
    ids = (ct.c_uint32 * 64)()
    info = bpf._info(fd, ProgInfo(nr_map_ids=len(ids), map_ids=ct.addressof(ids)))
    return set(ids[: info.nr_map_ids])


def test_maps_of_xdp_have_room_only_with_xdp(pins: Path) -> None:
    """With or without it, all others are reused: an agent with the other setting goes on with them.

    They are pinned in any case: an agent of another version takes a map without a pin for a new folder's.
    """
    others: set[int] = set()
    for xdp in (False, True, False):
        opened = maps.open_or_create(pins, Capacity(), xdp=xdp)
        assert opened.adopted == bool(others)
        assert {pin.name for pin in (opened.folder / "maps").iterdir()} == opened.maps.keys()
        assert maps.unpinned(opened) == []
        sizes = {name: bpf.map_info(opened[name].fd).max_entries for name in ("flow_hops", "flow_cache")}
        assert sizes == {"flow_hops": 65536 if xdp else 1, "flow_cache": 65536}
        found = {bpf.map_info(each.fd).id for name, each in opened.maps.items() if name != "flow_hops"}
        assert found == (others or found)
        others = found
        loader.ensure_loaded(opened, msgspec.structs.replace(OPTIONS, forwards_at_xdp=xdp), (RECORDS,))
        opened.close()


def test_pins_of_maps_are_replaced_in_one_step(pins: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An agent that is killed while it pins its map in another one's place leaves that pin, or its own."""
    opened = maps.open_or_create(pins, Capacity())
    pin = opened.folder / "maps" / "turns"
    pin.unlink()
    bpf.pin(opened["epochs"].fd, pin)

    class KilledError(Exception):
        pass

    def killed(*_: object) -> None:
        raise KilledError

    for where, step in ((bpf, "pin"), (Path, "replace")):
        with monkeypatch.context() as patch, pytest.raises(KilledError):
            patch.setattr(where, step, killed)
            maps.pin_again(opened)
        with bpf.opened(pin) as fd:
            assert bpf.map_info(fd).id == bpf.map_info(opened["epochs"].fd).id
    maps.pin_again(opened)
    assert maps.unpinned(opened) == []
    assert {each.name for each in pin.parent.iterdir()} == opened.maps.keys()
    opened.close()


def _signal_again_and_again(process: int) -> None:
    for _ in range(30):
        os.kill(process, signal.SIGUSR1)
        time.sleep(0.02)
    os._exit(0)


def test_program_is_loaded_although_signals_interrupt_the_verifier() -> None:
    """As they do while an agent is stopped, or frozen, and goes on, again and again."""
    # r1 = 0; do r1 += 1; while (r1 < 300000); r0 = 0; exit: the verifier takes longer than signals leave it.
    code = [(0xB7, 1, 0, 0), (0x07, 1, 0, 1), (0xA5, 1, -2, 300_000), (0xB7, 0, 0, 0), (0x95, 0, 0, 0)]
    program = b"".join(struct.pack("=BBhi", *each) for each in code)
    before = signal.signal(signal.SIGUSR1, lambda *_: None)
    child = os.fork()
    if not child:
        _signal_again_and_again(os.getppid())
    try:
        os.close(bpf.prog_load(uapi.PROG_SCHED_CLS, 0, "slow", program))
    finally:
        os.waitpid(child, 0)
        signal.signal(signal.SIGUSR1, before)


#: The verifier's limit is a million; other kernels may verify more instructions of the same program.
MOST_VERIFIED = 150_000


def verified_instructions(pin: Path) -> int:
    """Returns the number of verified instructions, or 0 if the kernel does not report it (before 5.16)."""
    fd = bpf.get_pinned(pin)
    try:
        found = re.search(r"verified_insns:\s*(\d+)", Path(f"/proc/self/fdinfo/{fd}").read_text())
    finally:
        os.close(fd)
    return int(found[1]) if found else 0


CHOICES: list[dict[str, Any]] = [
    {"features": probe.Features(set_retval=False, mptcp=False)},
    {"node_ports_on_loopback": False, "bypass_netfilter": True, "pod_sockets": False},
    {"masquerade_all": True, "pods_by_cidr": True},
    {"masquerade_all": True, "bypass_netfilter": True, "pods_by_cidr": True},
    {"masquerade_ports": (61000, 65535)},
    {"masquerade_ports": (32768, 65535), "masquerade_ports_shared": True},
    {"masquerade_ports_shared": True, "masquerade_all": True, "bypass_netfilter": True},
    {"forwards_at_xdp": False},
    {"dsr_accepts": True},
    {"dsr_accepts": True, "dsr_sends": True},
    {"dsr_accepts": True, "dsr_sends": True, "masquerade_ports_shared": True, "pods_by_cidr": True},
    {"dsr_accepts": True, "dsr_sends": True, "bypass_netfilter": True, "forwards_at_xdp": False},
    {"dsr_accepts": True, "dsr_sends": True, "trace_decisions": True, "measure_connections": True},
    {"measure_connections": True},
    {"measure_traffic": True, "features": probe.Features(set_retval=True)},
    {"measure_connections": True, "measure_traffic": True, "masquerade_all": True, "trace_decisions": True},
    {"measure_connections": True, "trace_decisions": True, "masquerade_ports_shared": True},
    {"measure_connections": True, "trace_decisions": True, "bypass_netfilter": True, "pods_by_cidr": True},
    {"trace_decisions": True},
    {"trace_decisions": True, "masquerade_ports_shared": True, "bypass_netfilter": True},
    {"trace_decisions": True, "masquerade_all": True, "bypass_netfilter": True, "pods_by_cidr": True},
]


@pytest.mark.parametrize("module", MODULES, ids=lambda module: f"{module.source}{module.suffix}")
def test_every_source_compiles_without_warnings(module: Module) -> None:
    """The options are -Wall -Wextra. A warning is an error only in this test and in ``make lint``."""
    assert bytecode.get(loader.recipe(loader.source_folder(), module)).warnings == ""


#: A module, and the constants that its programs refer to: all that a load depends on.
Load = tuple[Module, frozenset[tuple[str, int]]]


def loads_of(options: loader.Options) -> Iterator[Load]:
    constants = options.constants(loader.Sizes(1, 1, 1, 1, 1))
    for module in MODULES:
        programs = bytecode.get(loader.recipe(loader.source_folder(), module)).programs.values()
        used = {name for each in programs for _, name in (*each.constants, *each.functions)}
        yield module, frozenset((name, constants[name]) for name in used)


@pytest.fixture(scope="module")
def loaded() -> set[Load]:
    """What has been loaded by the tests so far."""
    return set()


@pytest.mark.parametrize("chosen", CHOICES, ids="-".join)
def test_every_option_set_loads(opened: MapSet, chosen: dict[str, Any], loaded: set[Load]) -> None:
    """The modules include those for devices without a link layer.

    A module is not loaded again for options that none of its programs refers to.
    """
    options = msgspec.structs.replace(OPTIONS, **chosen)
    new = set(loads_of(options)) - loaded
    home = loader.ensure_loaded(opened, options, [module for module, _ in new])
    loaded |= new
    verified = {path.name: verified_instructions(path) for path in home.iterdir()}
    assert {name: count for name, count in verified.items() if count > MOST_VERIFIED} == {}


def changed_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str, after: str) -> None:
    """Replaces ``before`` in ``sock.c`` by ``after``."""
    shutil.copytree(loader.source_folder(), tmp_path / "bpf")
    source = tmp_path / "bpf" / "sock.c"
    assert before in source.read_text()
    source.write_text(source.read_text().replace(before, after))
    monkeypatch.setattr(loader, "source_folder", lambda: tmp_path / "bpf")


def test_verifier_log_with_program_and_kernel_is_reported(
    opened: MapSet, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A program that the verifier rejects leaves no pin, nor do those that are loaded beside it."""
    begin = "int recvmsg4(struct bpf_sock_addr *ctx)\n{"
    # Every kernel rejects this access; a wrong return value may be pruned as equal to a verified path before Linux 6.8.
    beyond = "if (ctx->user_port)\n\t\treturn *(volatile int *)((char *)ctx + 4096);"
    changed_source(tmp_path, monkeypatch, begin, f"{begin}\n\t{beyond}")
    with pytest.raises(loader.LoadError) as error:
        loader.ensure_loaded(opened, OPTIONS, (SOCKETS, RECORDS))
    lines = str(error.value).splitlines()
    assert lines[0] == f"program recvmsg4 does not load (kernel {platform.release()}): Permission denied"
    assert any("invalid bpf_context access off=4096" in line for line in lines)
    assert len(lines) <= 13
    assert list(opened.folder.glob("progs-*")) == []


def test_compiler_messages_are_reported(
    opened: MapSet, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    changed_source(tmp_path, monkeypatch, "int recvmsg4(struct bpf_sock_addr *ctx)", "foo recvmsg4(void)")
    with pytest.raises(loader.LoadError) as error:
        loader.ensure_loaded(opened, OPTIONS, (SOCKETS,))
    lines = str(error.value).splitlines()
    assert lines[0] == f"{tmp_path}/bpf/sock.c does not compile (kernel {platform.release()}):"
    assert lines[1].endswith("unknown type name 'foo'")
    assert list(opened.folder.glob("progs-*")) == []


def test_missing_kernel_feature_is_named_with_its_version(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = probe._MustHave("the frobnicator", "5.9", lambda: False)
    monkeypatch.setattr(probe, "_MUST_HAVES", (missing,))
    with pytest.raises(probe.UnsupportedKernelError, match=r"lacks the frobnicator: Linux 5\.9 has it"):
        probe.probe()


@pytest.mark.parametrize(
    ("release", "version", "configuration", "is_preempted"),
    [
        ("6.18.44", "#1 SMP PREEMPT_DYNAMIC Debian 6.18.44-1", "", False),
        ("6.12.117+deb13-rt-amd64", "#1 SMP PREEMPT_RT Debian 6.12.117-1", "", False),
        ("6.17.0-rt", "#1 SMP PREEMPT_RT", "", False),
        ("6.18.0-rt", "#1 SMP PREEMPT_RT", "", True),
        ("7.2.13+deb14-rt-amd64", "#1 SMP PREEMPT_RT Debian 7.2.13-1", "CONFIG_PREEMPT_RT=y\n", True),
        ("7.2.13", "#1 SMP PREEMPT_RT", "# CONFIG_PREEMPT_RT_NEEDS_BH_LOCK is not set\n", True),
        ("7.2.13", "#1 SMP PREEMPT_RT", "CONFIG_PREEMPT_RT=y\nCONFIG_PREEMPT_RT_NEEDS_BH_LOCK=y\n", False),
    ],
)
def test_kernels_with_preempt_rt_have_to_run_packet_programs_one_at_a_time_on_a_cpu(
    release: str, version: str, configuration: str, is_preempted: bool
) -> None:
    assert probe.packet_programs_are_preempted(release, version, lambda: configuration) == is_preempted


def test_kernel_whose_packet_programs_are_preempted_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "packet_programs_are_preempted", lambda *_: True)
    with pytest.raises(
        probe.UnsupportedKernelError, match="PREEMPT_RT without CONFIG_PREEMPT_RT_NEEDS_BH_LOCK"
    ) as error:
        probe.probe()
    assert "PREEMPT_RT" in error.value.mend


def test_this_kernel_has_the_required_features() -> None:
    assert isinstance(probe.probe(), probe.Features)


def test_grace_period_ends() -> None:
    grace = Grace()
    grace.wait()
    grace.close()


def test_folder_is_locked_once(tmp_path: Path) -> None:
    lock = Lock([("--bpf-root", tmp_path)])
    assert is_locked(tmp_path)
    with pytest.raises(RootError, match=f"--bpf-root {tmp_path} is in use"):
        Lock([("--bpf-root", tmp_path)])
    lock.release()
    assert not is_locked(tmp_path)


def test_invalid_cgroup_root(tmp_path: Path) -> None:
    with pytest.raises(RootError, match="not a cgroup v2 folder"):
        check_cgroup(tmp_path)


def test_bpffs_is_mounted_if_missing(tmp_path: Path) -> None:
    root = tmp_path / "bpf"
    try:
        assert ensure_bpffs(root)
        assert not ensure_bpffs(root)
        bpf.pin(fd := bpf.map_create(uapi.MAP_HASH, "x", 4, 4, 1), root / "x")
        os.close(fd)
    finally:
        subprocess.run(["umount", str(root)], check=True)
