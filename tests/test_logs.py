"""Log lines: text for people, JSON for machines."""

from __future__ import annotations

import json
import logging

import pytest

from ebpfproxy import logs


def test_text(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("text", 0)
    logs.get_logger("ebpfproxy.x").warning(
        "watch is failing", resource="nodes", error="401 Unauthorized", n=3
    )
    line = capsys.readouterr().err
    assert line.endswith(" warning watch is failing resource=nodes error='401 Unauthorized' n=3\n")
    assert line[10] == "T"
    assert line.split()[0].endswith("Z")


def test_json_has_one_object_per_line(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("json", 0)
    log = logs.get_logger("ebpfproxy.x")
    log.info("two\nlines", path=object)
    log.error("second")
    first, second = map(json.loads, capsys.readouterr().err.splitlines())
    assert (first["level"], first["event"]) == ("info", "two\nlines")
    assert (second["level"], second["event"]) == ("error", "second")


def test_verbosity_four_shows_every_event(capsys: pytest.CaptureFixture[str]) -> None:
    log = logs.get_logger("ebpfproxy.x")
    for verbosity, shown in ((0, 0), (3, 0), (4, 1)):
        logs.configure("text", verbosity)
        log.debug("an event")
        assert len(capsys.readouterr().err.splitlines()) == shown


def test_only_warnings_of_libraries_are_logged_with_their_name(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("json", 10)
    logging.getLogger("library").info("noise")
    logging.getLogger("library").warning("odd")
    assert [json.loads(line)["event"] for line in capsys.readouterr().err.splitlines()] == ["library: odd"]
