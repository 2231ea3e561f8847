"""Compiled programs are kept in files, and are what they were when they are used again."""

from __future__ import annotations

import errno
import os
import struct
from pathlib import Path

import pytest

from ebpfproxy.datapath.programs import bytecode, loader
from ebpfproxy.datapath.programs.bytecode import Program, Recipe
from ebpfproxy.datapath.services import slots

SOURCE = """
#include "lib/compat.h"
#include "lib/maps.h"

int counted(void *ctx)
{
	unsigned int key = 0;
	u64 *value = map_lookup(second, &key);

	return ctx && value && *value == CONSTANT(SECRET);
}
"""


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """A source of its own, and a cache that is empty."""
    monkeypatch.setattr(bytecode, "CACHE", tmp_path / "cache")
    (tmp_path / "bpf").mkdir()
    for name in ("include", "lib"):
        (tmp_path / "bpf" / name).symlink_to(loader.source_folder() / name)
    (tmp_path / "bpf" / "small.c").write_text(SOURCE)
    defines = (f"-DSEARCHED_SLOTS={slots.SEARCHED}",)
    return Recipe(tmp_path / "bpf", "small.c", ("counted",), defines, ("first", "second"), ("SECRET",))


def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(recipe: Recipe) -> dict[str, Program]:
        raise AssertionError(f"{recipe.source} was compiled")

    monkeypatch.setattr(bytecode, "_compile", fail)


def test_references_are_known_by_name_and_filled_in(recipe: Recipe) -> None:
    program = bytecode.get(recipe)["counted"]
    ((map_at, map_name),) = program.maps
    ((constant_at, constant_name),) = program.constants
    assert (map_name, constant_name) == ("second", "SECRET")
    linked = program.linked({"second": 77}, {"SECRET": 0xFEDCBA9876543210})
    assert len(linked) == len(program.instructions)
    opcode, registers, _, low, _, _, _, high = struct.unpack_from("=BBhIBBhI", linked, constant_at * 8)
    assert (opcode, registers >> 4, high << 32 | low) == (0x18, 0, 0xFEDCBA9876543210)
    _, registers, _, fd = struct.unpack_from("=BBhI", linked, map_at * 8)
    assert (registers >> 4, fd) == (1, 77)


def test_what_was_compiled_is_compiled_no_more(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    made = bytecode.get(recipe)
    no_compiler(monkeypatch)
    assert bytecode.get(recipe) == made
    (file,) = bytecode.CACHE.iterdir()
    assert (file.stat().st_mode & 0o777, bytecode.CACHE.stat().st_mode & 0o777) == (0o600, 0o700)


def test_another_source_or_option_is_another_program(recipe: Recipe) -> None:
    bytecode.get(recipe)
    source = recipe.sources / "small.c"
    source.write_text(source.read_text().replace("key = 0", "key = WHICH"))
    other = Recipe(*(getattr(recipe, name) for name in recipe.__struct_fields__))
    with pytest.raises(bytecode.CompileError, match="WHICH"):
        bytecode.get(other)
    chosen = (*recipe.defines, "-DWHICH=5")
    bytecode.get(
        Recipe(recipe.sources, "small.c", recipe.programs, chosen, recipe.maps, recipe.constants),
    )
    assert len(list(bytecode.CACHE.iterdir())) == 2


def test_a_damaged_file_is_made_anew(recipe: Recipe) -> None:
    made = bytecode.get(recipe)
    (file,) = bytecode.CACHE.iterdir()
    content = bytearray(file.read_bytes())
    for damage in (bytes(content[:40]), b"", bytes([*content[:-1], content[-1] ^ 1])):
        file.write_bytes(damage)
        assert bytecode.get(recipe) == made
        assert file.read_bytes() == content


def test_a_folder_that_cannot_be_written_to_is_no_reason_to_stop(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(bytecode, "CACHE", tmp_path / "file" / "cache")
    assert bytecode.get(recipe)["counted"].maps


def test_a_file_whose_time_cannot_be_set_is_used(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder may be part of an image whose root is read-only."""

    def read_only(path: Path) -> None:
        raise OSError(errno.EROFS, "read-only")

    made = bytecode.get(recipe)
    no_compiler(monkeypatch)
    monkeypatch.setattr("os.utime", read_only)
    assert bytecode.get(recipe) == made


def test_a_full_disk_leaves_no_half_file(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(source: Path, target: Path) -> None:
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr(Path, "replace", full)
    assert bytecode.get(recipe)["counted"].maps
    assert not list(bytecode.CACHE.iterdir())


def test_files_used_last_stay(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bytecode, "_KEPT_FILES", 2)
    for number in range(3):
        defines = (*recipe.defines, f"-DNUMBER={number}")
        bytecode.get(
            Recipe(recipe.sources, "small.c", recipe.programs, defines, recipe.maps, recipe.constants)
        )
    assert len(list(bytecode.CACHE.iterdir())) == 2
    no_compiler(monkeypatch)
    assert bytecode.get(
        Recipe(recipe.sources, "small.c", recipe.programs, defines, recipe.maps, recipe.constants)
    )


def test_what_killed_agents_left_half_written_goes_with_what_is_old(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bytecode, "_compile", lambda _: {"counted": Program(b"", [], [])})
    bytecode.CACHE.mkdir()
    for number in range(100):
        left = bytecode.CACHE / f".tmp{number}"
        left.touch()
        os.utime(left, (1, 1))
    held = bytecode.CACHE / ".another.lock"
    held.touch()
    os.utime(held, (0, 0))
    bytecode.get(recipe)
    assert len(list(bytecode.CACHE.iterdir())) == bytecode._KEPT_FILES + 1
    assert held.exists()
    assert (bytecode.CACHE / recipe.digest()).exists()
