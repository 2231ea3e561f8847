"""``ebpfproxy ui``."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import click

from ebpfproxy.cli import options
from ebpfproxy.cli.errors import one_line
from ebpfproxy.cli.output import echo
from ebpfproxy.datapath.dump import open_maps
from ebpfproxy.services.values import parse_address, parse_port

_LIBRARIES = ("starlette", "uvicorn")


@click.command("ui")
@click.option(
    "--listen",
    default="127.0.0.1:8090",
    show_default=True,
    metavar="ADDRESS:PORT",
    help="Where to listen; an IPv6 address in brackets, port 0 for any that is free.",
)
@options.cni_results
@options.bpf_root
def command(listen: str, cni_results: Path, bpf_root: Path) -> None:
    """Serve a page about this node: Services and why endpoints are used, decisions, drift, health.

    It prints the page's address, with a key that is new each time and without which no data is given. Nothing
    can be changed on the page. While somebody looks at decisions, it runs a trace, as `ebpfproxy trace` does.

    \b
    From a laptop, with the agent's pod:
    kubectl -n kube-system exec -i POD -- ebpfproxy --end-with-input ui
    kubectl -n kube-system port-forward POD 8090
    """
    address, port = _parse(listen)
    missing = [name for name in _LIBRARIES if find_spec(name) is None]
    if missing:
        raise click.ClickException(f"ui needs {' and '.join(missing)}: pip install 'ebpfproxy[ui]'")
    from ebpfproxy.ui.serve import serve  # noqa: PLC0415 - the extra may be missing

    with one_line():
        open_maps(bpf_root).close()
        try:
            serve(bpf_root, cni_results, address, port, _print)
        except OSError as error:
            raise click.ClickException(f"{listen}: {error.strerror or error}") from error


def _parse(text: str) -> tuple[str, int]:
    """Raises BadParameter."""
    host, _, port = text.rpartition(":")
    bare = host.removeprefix("[").removesuffix("]")
    is_ipv6 = ":" in bare
    if parse_address(bare) is None or is_ipv6 is not (host != bare):
        raise click.BadParameter(f"{text!r} is not ADDRESS:PORT", param_hint="--listen")
    if port != "0" and parse_port(port) is None:
        raise click.BadParameter(f"{text!r}: {port!r} is no port", param_hint="--listen")
    return bare, int(port)


def _print(address: str) -> None:
    echo(address)
