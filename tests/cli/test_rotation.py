"""Files of lines: none is lost or written twice, whoever renames them."""

from __future__ import annotations

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
