"""The cache of compiled programs."""

from __future__ import annotations

import errno
import os
import platform
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from ebpfproxy.datapath.abi.schema import SEARCHED_SLOTS
from ebpfproxy.datapath.programs import bytecode, loader
from ebpfproxy.datapath.programs.bytecode import Bytecode, Program, Recipe

SOURCE = """
#include "lib/compat.h"
#include "lib/maps.h"

static int (*function)(void *ctx) = KERNEL_FUNCTION(FUNCTION);

int counted(void *ctx)
{
	unsigned int key = 0;
	u64 *value = map_lookup(second, &key), *only = map_value(first);

	if (CONSTANT(FUNCTION) && function(ctx))
		return 2;
	return ctx && value && *value == CONSTANT(SECRET) && *only;
}
"""


_COMPILE = bytecode._compile


@pytest.fixture(scope="module")
def compile_once() -> Callable[[Recipe], Bytecode]:
    """The compiler, which is asked once for the same input in all tests: they are about files."""
    done: dict[str, Bytecode] = {}

    def compiled(recipe: Recipe) -> Bytecode:
        digest = recipe.digest()
        if digest not in done:
            done[digest] = _COMPILE(recipe)
        return done[digest]

    return compiled


@pytest.fixture
def recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compile_once: Callable[[Recipe], Bytecode]
) -> Recipe:
    """Returns the recipe of a small program, with an empty cache."""
    monkeypatch.setattr(bytecode, "_compile", compile_once)
    monkeypatch.setattr(bytecode, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(bytecode, "SHIPPED", tmp_path / "shipped")
    (tmp_path / "bpf").mkdir()
    for name in ("include", "lib"):
        (tmp_path / "bpf" / name).symlink_to(loader.source_folder() / name)
    (tmp_path / "bpf" / "small.c").write_text(SOURCE)
    defines = (f"-DSEARCHED_SLOTS={SEARCHED_SLOTS}",)
    return Recipe(
        tmp_path / "bpf", "small.c", ("counted",), defines, ("first", "second"), ("FUNCTION", "SECRET")
    )


def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(recipe: Recipe) -> Bytecode:
        raise AssertionError(f"{recipe.source} was compiled")

    monkeypatch.setattr(bytecode, "_compile", fail)


def test_relocations_are_stored_by_name_and_resolved(recipe: Recipe) -> None:
    program = bytecode.get(recipe).programs["counted"]
    places = {name: at for at, name in program.maps}
    assert len(places) == len(program.maps)
    assert places.keys() == {"first", "second"}
    (constant_at,) = (at for at, name in program.constants if name == "SECRET")
    fds = {"first": 66, "second": 77}
    linked = program.linked(fds, {"SECRET": 0xFEDCBA9876543210, "FUNCTION": 55})
    assert len(linked) == len(program.instructions)
    opcode, registers, _, low, _, _, _, high = struct.unpack_from("=BBhIBBhI", linked, constant_at * 8)
    assert (opcode, registers >> 4, high << 32 | low) == (0x18, 0, 0xFEDCBA9876543210)
    # BPF_PSEUDO_MAP_FD, and BPF_PSEUDO_MAP_VALUE with the offset 0.
    for name, meaning, number in (("second", 1, 77), ("first", 2, 66)):
        _, registers, _, fd, _, _, _, offset = struct.unpack_from("=BBhIBBhI", linked, places[name] * 8)
        assert (registers >> 4, fd, offset) == (meaning, number, 0)


@pytest.mark.parametrize(
    ("function", "instruction"),
    # BPF_PSEUDO_KFUNC_CALL; where the kernel has no such function, a register is set to 0.
    [(55, (0x85, 2, 0, 55)), (0, (0xB7, 0, 0, 0))],
)
def test_calls_of_kernel_functions_are_resolved(
    recipe: Recipe, function: int, instruction: tuple[int, int, int, int]
) -> None:
    program = bytecode.get(recipe).programs["counted"]
    ((at, name),) = program.functions
    assert name == "FUNCTION"
    linked = program.linked({"first": 66, "second": 77}, {"SECRET": 1, "FUNCTION": function})
    opcode, registers, offset, value = struct.unpack_from("=BBhI", linked, at * 8)
    assert (opcode, registers >> 4, offset, value) == instruction


def test_cached_program_is_not_compiled_again(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    made = bytecode.get(recipe)
    no_compiler(monkeypatch)
    assert bytecode.get(recipe) == made
    (file,) = bytecode.CACHE.iterdir()
    assert (file.stat().st_mode & 0o777, bytecode.CACHE.stat().st_mode & 0o777) == (0o600, 0o700)


def test_shipped_bytecode_precedes_the_cache(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    made = bytecode.compiled(recipe, bytecode.SHIPPED)
    no_compiler(monkeypatch)
    assert bytecode.get(recipe) == made
    assert not bytecode.CACHE.exists()


def test_damaged_shipped_file_is_compiled_again(recipe: Recipe) -> None:
    made = bytecode.compiled(recipe, bytecode.SHIPPED)
    (file,) = bytecode.SHIPPED.iterdir()
    file.write_bytes(file.read_bytes()[:-1])
    assert bytecode.get(recipe) == made
    assert [path.name for path in bytecode.CACHE.iterdir()] == [file.name]


def test_compiler_warning_is_stored_and_is_no_error(recipe: Recipe, caplog: pytest.LogCaptureFixture) -> None:
    """A newer compiler may have more warnings."""
    source = recipe.sources / "small.c"
    source.write_text(source.read_text().replace("key = 0;", "key = 0, unused = 1;"))
    made = bytecode.get(recipe)
    assert made.programs["counted"].maps
    assert "unused variable 'unused'" in made.warnings

    def logged() -> list[str]:
        return [record.getMessage() for record in caplog.records if record.name == bytecode.__name__]

    assert logged() == ["compiler warnings"]
    assert bytecode.get(recipe) == made
    assert len(logged()) == 1


def test_missing_compiler_is_named_if_the_cache_has_no_file(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A package named bcc that is another one counts as missing."""
    monkeypatch.setattr(bytecode, "_compile", _COMPILE)
    (tmp_path / "modules" / "bcc").mkdir(parents=True)
    (tmp_path / "modules" / "bcc" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path / "modules")
    with pytest.raises(bytecode.NoCompilerError) as missing:
        bytecode.get(recipe)
    output = str(missing.value)
    assert output.startswith(f"no bytecode of small.c for {platform.machine()} in {bytecode.SHIPPED} or ")
    assert "cannot import name 'BPF' from 'bcc'" in output
    assert "python3-bpfcc" in output
    assert "\n" not in output


def test_changed_source_or_option_is_another_program(recipe: Recipe) -> None:
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


def test_damaged_cache_file_is_replaced(recipe: Recipe) -> None:
    made = bytecode.get(recipe)
    (file,) = bytecode.CACHE.iterdir()
    content = bytearray(file.read_bytes())
    for damage in (bytes(content[:40]), b"", bytes([*content[:-1], content[-1] ^ 1])):
        file.write_bytes(damage)
        assert bytecode.get(recipe) == made
        assert file.read_bytes() == content


def test_unwritable_cache_folder_is_no_error(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(bytecode, "CACHE", tmp_path / "file" / "cache")
    assert bytecode.get(recipe).programs["counted"].maps


def test_cache_file_whose_time_cannot_be_set_is_used(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache may be part of a read-only image."""

    def read_only(path: Path) -> None:
        raise OSError(errno.EROFS, "read-only")

    made = bytecode.get(recipe)
    no_compiler(monkeypatch)
    monkeypatch.setattr("os.utime", read_only)
    assert bytecode.get(recipe) == made


def test_full_disk_leaves_no_partial_file(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(source: Path, target: Path) -> None:
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr(Path, "replace", full)
    assert bytecode.get(recipe).programs["counted"].maps
    assert not list(bytecode.CACHE.iterdir())


def test_most_recently_used_files_are_kept(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_partial_files_of_killed_agents_are_deleted_with_old_files(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bytecode, "_compile", lambda _: Bytecode({"counted": Program(b"", [], [])}, ""))
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
