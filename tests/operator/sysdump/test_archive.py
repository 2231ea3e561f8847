"""Limits of the archive, and what fails."""

from __future__ import annotations

import io
import itertools
import os
import random
import stat
import tarfile
from base64 import b85encode
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import click
import pytest

from ebpfproxy.cli.sysdump_cluster import opened
from ebpfproxy.operator.sysdump.archive import ERRORS, MOST, MOST_OF_FILE, TOP, Archive, last, members
from ebpfproxy.operator.sysdump.secrets import Secrets


def read(out: io.BytesIO) -> dict[str, str]:
    out.seek(0)
    with tarfile.open(fileobj=out) as tar:
        return {each.name: tar.extractfile(each).read().decode() for each in tar}  # type: ignore[union-attr]


def test_what_fails_is_a_line_and_the_rest_goes_on() -> None:
    def half() -> Iterator[str]:
        yield "the first line\n"
        raise OSError(5, "of\ntwo lines")

    def missing() -> Iterator[str]:
        raise SystemExit("libbpf.so.1 is missing")

    out = io.BytesIO()
    with Archive(out, Secrets()) as archive:
        folder = archive.folder("node-a")
        folder.add("half.txt", half)
        folder.add("missing.txt", missing)
        folder.add("empty.txt", lambda: [""])
        folder.add("whole.txt", lambda: ["all"])
        folder.close()
    found = read(out)
    errors = found.pop(f"{TOP}/node-a/{ERRORS}")
    assert found == {f"{TOP}/node-a/half.txt": "the first line\n", f"{TOP}/node-a/whole.txt": "all"}
    assert errors == "half.txt: [Errno 5] of two lines\nmissing.txt: libbpf.so.1 is missing\n"


def test_files_and_nodes_have_a_limit() -> None:
    """Of random text, which does not get smaller, nor a source that does not end."""
    numbers = random.Random(1)
    # They are repeated only at twice the distance at which gzip finds repetitions.
    lines = [f"{b85encode(numbers.randbytes(800))!r}\n" for _ in range(64)]
    out = io.BytesIO()
    with Archive(out, Secrets()) as archive:
        folder = archive.folder("node-a")
        for at in range(8):
            folder.add(f"{at}.txt", lambda: itertools.cycle(lines))
        folder.close()
        assert MOST - MOST_OF_FILE < len(out.getvalue()) <= MOST
        other = archive.folder("node-b")
        other.add("a.txt", lambda: ["x"])
        other.close()
    found = read(out)
    assert found[f"{TOP}/node-b/a.txt"] == "x"
    assert "7.txt: left out: the archive has " in found[f"{TOP}/node-a/{ERRORS}"]
    assert all(len(text) <= MOST_OF_FILE + 100 for text in found.values())
    cut = f"[cut here: a file has {MOST_OF_FILE} bytes at most]\n"
    assert found[f"{TOP}/node-a/0.txt"].endswith(f"\n{cut}")
    assert f"0.txt: cut after {MOST_OF_FILE} bytes" in found[f"{TOP}/node-a/{ERRORS}"]


def test_of_a_long_log_the_end_is_kept() -> None:
    assert "".join(last("one\ntwo\n")) == "one\ntwo\n"
    found = list(last("".join(f"line {at}\n" for at in range(200_000))))
    assert found[0].startswith("[cut here: what came before")
    assert found[1].startswith("line ")
    assert found[-1] == "line 199999\n"


def test_names_of_a_received_archive_stay_below_its_node() -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        for name in (f"{TOP}/n/a.txt", f"{TOP}/n/../../../etc/passwd", "/x/y//z.txt", "short"):
            info = tarfile.TarInfo(name)
            info.size = 1
            tar.addfile(info, io.BytesIO(b"x"))
        link = tarfile.TarInfo(f"{TOP}/n/link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/shadow"
        tar.addfile(link)
    assert list(members(out.getvalue())) == [("a.txt", "x"), ("etc/passwd", "x"), ("y/z.txt", "x")]


def test_a_file_is_replaced_once_the_archive_is_whole(tmp_path: Path) -> None:
    """Ctrl-C would leave a part of an archive, and a file that others have made is readable for them."""
    file = tmp_path / "node.tgz"
    file.write_bytes(b"earlier")
    file.chmod(0o644)
    with suppress(KeyboardInterrupt), opened(file) as out:
        out.write(b"half")
        raise KeyboardInterrupt
    assert ([*tmp_path.iterdir()], file.read_bytes()) == ([file], b"earlier")
    (link := tmp_path.parent / f"{tmp_path.name}-link").symlink_to(file)
    with opened(link) as out:
        out.write(b"whole")
    assert link.is_symlink()
    assert ([*tmp_path.iterdir()], file.read_bytes()) == ([file], b"whole")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


@pytest.mark.parametrize(
    ("place", "said"), [("nowhere/node.tgz", "No such file or directory"), (".", "Is a directory")]
)
def test_archive_that_cannot_be_written_is_one_line(tmp_path: Path, place: str, said: str) -> None:
    with pytest.raises(click.ClickException) as error, opened(tmp_path / place):
        pass
    assert error.value.message == f"{tmp_path / place}: {said}"


def test_an_archive_may_go_to_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(pipe := tmp_path / "pipe")
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    with opened(pipe) as out:
        out.write(b"whole")
    assert os.read(reader, 100) == b"whole"
    os.close(reader)
