"""``kubectl ebpfproxy top`` in a terminal: the screen is here, the numbers are those of commands in pods.

They need no terminal there, whose keys and size would have to be sent, and several nodes are one screen.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from ebpfproxy.cli import kubectl_streams
from ebpfproxy.cli.output import echo, plain
from ebpfproxy.cli.top import SCREEN_ROWS, is_live
from ebpfproxy.kube.exec import Channel
from ebpfproxy.kube.failures import Failure
from ebpfproxy.operator.agents import Agents
from ebpfproxy.top.merge import merged
from ebpfproxy.top.rows import Sort, Top

if TYPE_CHECKING:
    from ebpfproxy.cli.top_screen import Screen

_TOP = msgspec.json.Decoder(Top)


def decode_top(line: bytes) -> Top:
    """A refresh that a node's command has printed. Raises Failure."""
    try:
        return _TOP.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Failure("exec", f"this is no line of this version's top: {error}") from error


def is_wanted(params: Mapping[str, Any]) -> bool:
    """True if the command line asks for a screen."""
    return not params["once"] and params["output"] == "table" and is_live()


def run(agents: Agents, nodes: Sequence[str], arguments: Sequence[str], params: Mapping[str, Any]) -> int:
    """Returns the highest exit code of the commands."""
    from ebpfproxy.cli.top_screen import Screen  # noqa: PLC0415 - only a terminal needs it

    words = [*arguments, "--output", "json"]
    for sort in Sort:
        words += ["--sort", str(sort)]
    words += ["--rows", str(params["rows"] or SCREEN_ROWS)]
    screen = Screen(Sort(params["sort"][0]), backends=params["backends"] > 0)
    shown = _Nodes(nodes, screen)
    streams = [_TopStream(agents, node, words, shown) for node in nodes]
    code = kubectl_streams.follow(streams, screen.run)
    for each in streams:
        for text in each.errors:
            echo(text, err=True)
    return code


class _Nodes:
    """The last refresh of each node whose command runs, as one."""

    def __init__(self, nodes: Sequence[str], screen: Screen) -> None:
        self._screen = screen
        self._lock = threading.Lock()
        self._names, self._running = nodes, set(nodes)
        self._tops: dict[str, Top] = {}

    def add(self, node: str, top: Top) -> None:
        with self._lock:
            self._tops[node] = top
            self._show_all()

    def remove(self, node: str) -> None:
        with self._lock:
            self._running.discard(node)
            self._tops.pop(node, None)
            if not self._running:
                self._screen.end()
            elif self._tops:
                self._show_all()

    def _show_all(self) -> None:
        tops = list(self._tops.values())
        (name, *others) = self._names
        title = f"{len(tops)} of {len(self._names)} nodes" if others else name
        self._screen.show(merged(tops) if len(tops) > 1 else tops[0], title)


class _TopStream(kubectl_streams.Stream):
    """A command whose lines are refreshes; what else it says waits until the screen is gone."""

    def __init__(self, agents: Agents, node: str, arguments: Sequence[str], nodes: _Nodes) -> None:
        super().__init__(agents, node, arguments)
        self._nodes = nodes
        self._partial = b""
        self.errors: list[str] = []

    def run(self) -> None:
        super().run()
        self._nodes.remove(self.node)

    def say(self, text: str) -> None:
        self.errors.append(f"Error: {self.node}: {text}")

    def take(self, channel: Channel, data: bytes) -> None:
        if channel is Channel.STDERR:
            self.errors += map(plain, data.decode(errors="replace").splitlines())
            return
        *lines, self._partial = (self._partial + data).split(b"\n")
        for line in lines:
            self._nodes.add(self.node, decode_top(line))
