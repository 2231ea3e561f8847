"""``ebpfproxy sysdump`` of the nodes of a cluster."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
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
    if str(file) == "-":
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    try:
        # Others may not read it, whatever the umask says.
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "wb") as out:
            yield out
    except OSError as error:
        raise click.ClickException(f"{file}: {error.strerror}") from error
