"""Errors that a user can act on become one line and exit code 1."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import click

from ebpfproxy.datapath.dump import NothingPinnedError
from ebpfproxy.datapath.kernel.libbpf import BpfError
from ebpfproxy.datapath.kernel.probe import UnsupportedKernelError
from ebpfproxy.datapath.kernel.roots import RootError
from ebpfproxy.datapath.programs.loader import LoadError


@contextmanager
def one_line() -> Iterator[None]:
    try:
        yield
    except (NothingPinnedError, UnsupportedKernelError, LoadError, RootError) as error:
        raise click.ClickException(str(error)) from error
    except BpfError as error:
        hint = " (root or CAP_BPF is needed)" if error.errno == 1 else ""
        raise click.ClickException(f"{error.strerror}{hint}") from error
    except PermissionError as error:
        raise click.ClickException(f"{error}; root is needed") from error
