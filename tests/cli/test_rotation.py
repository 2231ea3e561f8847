"""Files of lines: none is lost or written twice, whoever renames them."""

from __future__ import annotations

import resource
import signal
from pathlib import Path

import pytest

from ebpfproxy.trace.rotation import RotatingFile


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines()


def named(folder: Path) -> dict[str, list[str]]:
    return {path.name: lines(path) for path in folder.iterdir()}


def test_a_large_file_is_renamed_and_the_oldest_goes(tmp_path: Path) -> None:
    made = RotatingFile(tmp_path / "log", 4, 3)
    for number in range(9):
        made.write([f"{number}"])
    made.close()
    assert named(tmp_path) == {"log": ["8"], "log.1": ["6", "7"], "log.2": ["4", "5"]}


def test_one_file(tmp_path: Path) -> None:
    made = RotatingFile(tmp_path / "log", 4, 1)
    made.write(["1", "2"])
    made.write(["3"])
    made.close()
    assert named(tmp_path) == {"log": ["3"]}


def test_lines_of_one_call_stay_together(tmp_path: Path) -> None:
    made = RotatingFile(tmp_path / "log", 4, 2)
    made.write(map(str, range(10)))
    made.write(["10"])
    made.close()
    assert named(tmp_path) == {"log": ["10"], "log.1": [str(number) for number in range(10)]}


def test_a_start_goes_on_in_the_file(tmp_path: Path) -> None:
    for text in ("1", "2"):
        made = RotatingFile(tmp_path / "log", 100, 2)
        made.write([text])
        made.close()
    assert named(tmp_path) == {"log": ["1", "2"]}


@pytest.mark.parametrize("is_renamed", [True, False])
def test_a_file_that_is_taken_away_is_made_anew(tmp_path: Path, is_renamed: bool) -> None:
    made = RotatingFile(tmp_path / "log", 100, 2)
    made.write(["1"])
    if is_renamed:
        (tmp_path / "log").rename(tmp_path / "log-20261128")
    else:
        (tmp_path / "log").unlink()
    made.write(["2"])
    made.close()
    assert lines(tmp_path / "log") == ["2"]


def test_others_may_not_read_it(tmp_path: Path) -> None:
    RotatingFile(tmp_path / "log", 100, 2).close()
    assert not (tmp_path / "log").stat().st_mode & 0o027


def test_a_file_that_all_could_read_is_closed_to_them(tmp_path: Path) -> None:
    (tmp_path / "log").touch()
    (tmp_path / "log").chmod(0o666)
    RotatingFile(tmp_path / "log", 100, 2).close()
    assert (tmp_path / "log").stat().st_mode & 0o777 == 0o640


def test_a_mode_that_allows_less_stays(tmp_path: Path) -> None:
    (tmp_path / "log").touch(0o600)
    RotatingFile(tmp_path / "log", 100, 2).close()
    assert (tmp_path / "log").stat().st_mode & 0o777 == 0o600


def test_a_symbolic_link_is_not_followed(tmp_path: Path) -> None:
    """Whoever may write the folder cannot choose another file."""
    (tmp_path / "log").symlink_to(tmp_path / "other")
    with pytest.raises(OSError, match="symbolic links"):
        RotatingFile(tmp_path / "log", 100, 2)
    assert not (tmp_path / "other").exists()


def test_a_failed_write_leaves_whole_lines(tmp_path: Path) -> None:
    """As on a full disk: the kernel writes what there is room for."""
    made = RotatingFile(tmp_path / "log", 100, 2)
    made.write(["first"])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            made.write(["second", "third"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert lines(tmp_path / "log") == ["first", "second"]
    made.write(["fourth"])
    made.close()
    assert lines(tmp_path / "log") == ["first", "second", "fourth"]
