"""Errors that a user can act on."""

from __future__ import annotations

from pathlib import Path

import click
import pytest

from ebpfproxy.cli.errors import one_line


def test_error_of_a_file_system_is_one_line_with_the_file() -> None:
    with (
        pytest.raises(click.ClickException, match=r"No such file or directory: '/nowhere/links'"),
        one_line(),
    ):
        Path("/nowhere/links").mkdir()


def test_error_without_a_file_is_not_hidden() -> None:
    with pytest.raises(TimeoutError), one_line():
        raise TimeoutError
