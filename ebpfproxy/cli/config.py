"""``ebpfproxy config validate|defaults|effective``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import msgspec
import urllib3

from ebpfproxy.config import load, write
from ebpfproxy.config.bind_address import BindAddressError, parse_bind_address
from ebpfproxy.config.documents import ConfigurationError

_SECONDS = 5.0


@click.group("config")
def command() -> None:
    """The configuration file: KubeProxyConfiguration, EbpfProxyConfiguration, or both as two documents."""


@command.command("validate")
@click.argument("file", type=click.Path(path_type=Path))
def validate(file: Path) -> None:
    """Check a file: a line for everything that is wrong with it.

    Exit code 1 then. Where it is good, says what of it has no effect here.
    """
    try:
        configuration = load.effective(load.load(file))
    except ConfigurationError as error:
        for problem in error.problems:
            click.echo(problem, err=True)
        raise SystemExit(1) from error
    click.echo(f"{file}: good")
    unused = load.without_effect(configuration)
    if unused:
        click.echo(f"without effect here: {', '.join(unused)}")


@command.command("defaults")
def defaults() -> None:
    """Print both documents as they are without a file."""
    click.echo(write.to_yaml(load.effective(load.Configuration())), nl=False)


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
    help="How to print.",
)
def effective(address: str, output: str) -> None:
    """Print what the running agent uses.

    File, flags and defaults together, from its /configz.
    """
    answer = _ask(address)
    if output == "json":
        click.echo(msgspec.json.format(msgspec.json.encode(answer), indent=2).decode())
        return
    documents = [write.dump(each, sort=group == write.KUBE_PROXY_GROUP) for group, each in answer.items()]
    click.echo("---\n".join(documents), nl=False)


def _ask(address: str) -> dict[str, Any]:
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
        return msgspec.json.decode(response.data, type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise click.ClickException(f"{url}: not an agent's answer: {error}") from error
