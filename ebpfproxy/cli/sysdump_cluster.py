"""``ebpfproxy sysdump`` of the nodes of a cluster."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import mkstemp
from typing import IO

import click

from ebpfproxy.cli.cluster_access import remark
from ebpfproxy.cli.settings import Decorator
from ebpfproxy.operator.agents import Agents
from ebpfproxy.operator.api import Api
from ebpfproxy.operator.sysdump import cluster_files
from ebpfproxy.operator.sysdump.archive import Archive
from ebpfproxy.operator.sysdump.secrets import Secrets

file_argument: Decorator = click.argument(
    "file", metavar="FILE.tgz", type=click.Path(path_type=Path, allow_dash=True)
)


def of_cluster(api: Api, file: Path, nodes: Iterable[str], daemon_set: str, kubeconfig: str) -> None:
    """Raises ApiError and AgentsError."""
    agents = Agents(api, daemon_set)
    chosen = agents.chosen(nodes)
    secrets = Secrets(Path(path).expanduser() for path in kubeconfig.split(":") if path)
    with opened(file) as out, Archive(out, secrets) as archive:
        cluster_files.dump(api, agents, chosen, archive, remark)


@contextmanager
def opened(file: Path) -> Iterator[IO[bytes]]:
    """An archive is there once it is whole. Others may not read it, whoever has made a file of this name."""
    if str(file) == "-":
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    try:
        if file.exists() and not file.is_file():
            with file.open("wb") as pipe:
                yield pipe
            return
        # A link, such as /dev/stdout, is not replaced.
        target = file.resolve()
        descriptor, unfinished = mkstemp(prefix=f".{target.name}-", dir=target.parent)
        try:
            with os.fdopen(descriptor, "wb") as out:
                yield out
            Path(unfinished).rename(target)
        except BaseException:
            Path(unfinished).unlink()
            raise
    except OSError as error:
        raise click.ClickException(f"{file}: {error.strerror}") from error
