"""``ebpfproxy completion bash|zsh|fish``, and the completion of names that are in the maps.

If the maps cannot be read, nothing is completed: a shell has no place for an error.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import click
from click.shell_completion import CompletionItem, get_completion_class

from ebpfproxy.config.datapath import BPFFS

PROGRAM = "ebpfproxy"
#: The shell sets this variable when it asks; click derives its name from the program's, too.
VARIABLE = "_EBPFPROXY_COMPLETE"

_SHELLS = ("bash", "zsh", "fish")


@click.command("completion")
@click.argument("shell", type=click.Choice(_SHELLS))
@click.pass_context
def command(ctx: click.Context, shell: str) -> None:
    """Print the script that completes commands, options and names for a shell.

    \b
    bash: ebpfproxy completion bash > /etc/bash_completion.d/ebpfproxy
    zsh:  ebpfproxy completion zsh > "${fpath[1]}/_ebpfproxy"
    fish: ebpfproxy completion fish > ~/.config/fish/completions/ebpfproxy.fish
    """
    found = get_completion_class(shell)
    assert found is not None
    click.echo(found(ctx.find_root().command, {}, PROGRAM, VARIABLE).source())


def services(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:  # noqa: ARG001 - click's
    """``NAMESPACE/NAME`` of every Service in the maps."""
    names = {f"{name}/{service}" for name, service in _services(ctx)}
    return _items(names, incomplete)


def namespaces(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:  # noqa: ARG001 - click's
    """Namespaces of these Services."""
    return _items({namespace for namespace, _ in _services(ctx)}, incomplete)


def backends(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:  # noqa: ARG001 - click's
    """Every backend's address, and the same with its port."""
    found: dict[str, str] = {}
    for address, users in _backends(ctx):
        host = address.rpartition(":")[0].strip("[]")
        found.setdefault(host, "all ports")
        found[address] = users
    return [CompletionItem(name, help=found[name]) for name in sorted(found) if name.startswith(incomplete)]


def clients(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:  # noqa: ARG001 - click's
    """``host``, and ``NAMESPACE/NAME`` of every pod of this node."""
    from ebpfproxy.node.pod_names import CNI_RESULTS, pods  # noqa: PLC0415

    results = ctx.params.get("cni_results") or CNI_RESULTS
    return _items({"host", *(f"{pod.namespace}/{pod.name}" for pod in pods(Path(results)))}, incomplete)


def algorithms(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:  # noqa: ARG001 - click's
    """Names for ``--lb-algorithm``."""
    from ebpfproxy.services.balancing import ALGORITHMS  # noqa: PLC0415

    return _items(ALGORITHMS, incomplete)


def _items(names: Iterable[str], incomplete: str) -> list[CompletionItem]:
    # A shell prints them as they are.
    return [
        CompletionItem(name) for name in sorted(names) if name.startswith(incomplete) and name.isprintable()
    ]


def _root(ctx: click.Context) -> Path:
    given = ctx.params.get("bpf_root")
    return Path(given) if given else BPFFS


def _services(ctx: click.Context) -> list[tuple[str, str]]:
    # Only completions that read the maps wait for this import.
    from ebpfproxy.datapath.dump import Dump, open_maps  # noqa: PLC0415

    try:
        names = Dump(open_maps(_root(ctx))).names.values()
        return [(name.namespace, name.name) for name in names]
    except Exception:  # A shell has no place for an error, whatever it is.
        return []


def _backends(ctx: click.Context) -> list[tuple[str, str]]:
    from ebpfproxy.datapath.dump import Dump, open_maps  # noqa: PLC0415

    try:
        rows = Dump(open_maps(_root(ctx))).backends()
        return [(row.address, ", ".join(row.services)) for row in rows if row.state != "gone"]
    except Exception:  # A shell has no place for an error, whatever it is.
        return []
