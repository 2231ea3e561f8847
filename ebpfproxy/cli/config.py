"""``ebpfproxy config validate|defaults|effective``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import msgspec
import urllib3

from ebpfproxy.cli.output import echo, json_of
from ebpfproxy.config import load, write
from ebpfproxy.config.bind_address import BindAddressError, parse_bind_address
from ebpfproxy.config.documents import ConfigurationError

_SECONDS = 5.0


@click.group("config")
def command() -> None:
    """Check and show the configuration: KubeProxyConfiguration and EbpfProxyConfiguration."""


@command.command("validate")
@click.argument("file", type=click.Path(path_type=Path))
def validate(file: Path) -> None:
    """Check a configuration file.

    Prints one line per error and exits with 1. For a valid file it lists the fields that are ignored.
    """
    try:
        configuration = load.effective(load.load(file))
    except ConfigurationError as error:
        for problem in error.problems:
            echo(problem, err=True)
        raise SystemExit(1) from error
    echo(f"{file}: valid")
    unused = load.ignored_fields(configuration)
    if unused:
        echo(f"unsupported, ignored: {', '.join(unused)}")


@command.command("defaults")
def defaults() -> None:
    """Print both documents with their defaults."""
    echo(write.to_yaml(load.effective(load.Configuration())), nl=False)


@command.command("effective")
@click.option(
    "--address",
    default="127.0.0.1:10249",
    show_default=True,
    metavar="IP:PORT",
    help="The agent's --metrics-bind-address.",
)
@click.option(
    "-o",
    "--output",
    type=click.Choice(["yaml", "json"]),
    default="yaml",
    show_default=True,
    help="Output format.",
)
def effective(address: str, output: str) -> None:
    """Print the configuration that the running agent uses.

    It combines file, flags and defaults, and is read from the agent's /configz.
    """
    answer = _ask(address)
    if output == "json":
        click.echo(json_of(answer, indent=2))
        return
    documents = [write.dump(each, sort=group == write.KUBE_PROXY_GROUP) for group, each in answer.items()]
    echo("---\n".join(documents), nl=False)


def _ask(address: str) -> dict[str, dict[str, Any]]:
    """Raises ClickException where no agent answers."""
    try:
        host, port = parse_bind_address(address)
    except BindAddressError as error:
        raise click.UsageError(f"--address: {error}") from error
    if address.startswith(("0.0.0.0:", ":")):
        host = "127.0.0.1"
    elif host == "::":
        host = "::1"
    shown = f"[{host}]" if ":" in host else host
    url = f"http://{shown}:{port}/configz"
    try:
        with urllib3.PoolManager(retries=False, timeout=_SECONDS) as pool:
            response = pool.request("GET", url)
    except urllib3.exceptions.HTTPError as error:
        raise click.ClickException(f"no agent answers at {address}: {error}") from error
    if response.status != 200:
        raise click.ClickException(f"{url}: HTTP {response.status}")
    try:
        answer = msgspec.json.decode(response.data, type=dict[str, dict[str, Any]])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise click.ClickException(f"{url}: not an agent's answer: {error}") from error
    if write.OWN_GROUP not in answer:
        # Its own answer would look like the agent's.
        whose = "kube-proxy, which has the agent's port" if write.KUBE_PROXY_GROUP in answer else "no agent"
        raise click.ClickException(f"{url}: the answer is that of {whose}")
    return answer
