"""Commands in the agents' pods, and what they print: of one node, or of several at the same time."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence

from ebpfproxy.cli.output import echo
from ebpfproxy.kube.exec import Channel, Exec
from ebpfproxy.kube.failures import Failure
from ebpfproxy.operator.agents import Agents
from ebpfproxy.operator.api import ApiError


def run(
    agents: Agents, nodes: Sequence[str], arguments: Sequence[str], *, named: bool, failed: int = 1
) -> int:
    """Prints what the command prints, if ``named`` with the node in each line; returns the exit code.

    That is ``failed`` where no command has ended with one.
    """
    width = max(map(len, nodes))
    return follow(
        [Stream(agents, node, arguments, f"{node:<{width}}" if named else "", failed) for node in nodes]
    )


def follow(streams: Sequence[Stream], until: Callable[[], None] | None = None) -> int:
    """Starts commands; waits for them, or ends them when ``until`` returns, or at an interrupt.

    Returns the highest exit code.
    """
    signal.signal(signal.SIGTERM, _interrupt)
    for each in streams:
        each.start()
    try:
        if until is None:
            _wait(streams)
        else:
            until()
    except KeyboardInterrupt:
        pass
    if not all(each.done.is_set() for each in streams):
        for each in streams:
            each.end()
        # What is on its way is still printed; who interrupts again does not want it.
        _wait(streams)
    return max(each.code for each in streams)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _wait(streams: Sequence[Stream]) -> None:
    """Python 3.11 takes a thread for ended whose join() is interrupted."""
    for each in streams:
        each.done.wait()


class Stream(threading.Thread):
    """Prints what the command on one node does; ``name`` begins its lines, where it is one of several."""

    #: Lines of several streams are not mixed.
    _lock = threading.Lock()

    def __init__(
        self, agents: Agents, node: str, arguments: Sequence[str], name: str = "", failed: int = 1
    ) -> None:
        super().__init__(daemon=True)
        self.node = node
        self._agents, self._arguments, self._name = agents, arguments, name
        self._running: Exec | None = None
        self._rest: dict[Channel, bytes] = {}
        self._ended = False
        self.code = failed
        self.done = threading.Event()

    def end(self) -> None:
        """Ends the command, which ends with its standard input."""
        self._ended = True
        if self._running is not None:
            self._running.end_input()

    def run(self) -> None:
        try:
            self._running = self._agents.start(self.node, self._arguments)
            if self._ended:
                self.end()
            self._follow(self._running)
        except ApiError as error:
            self.say(str(error))
        except Failure as failure:
            self.say(self._agents.told(self.node, failure))
        finally:
            self.done.set()

    def _follow(self, running: Exec) -> None:
        try:
            for channel, data in running.output():
                self.take(channel, data)
            for channel, rest in list(self._rest.items()):
                if rest:
                    self.take(channel, b"\n")
        except BrokenPipeError:
            # Nobody reads on, as after `| head`; the interpreter would complain at its end.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            self.end()
        if running.code is not None:
            self.code = running.code
        elif self._ended:
            self.code = 0
        else:
            self.say("the connection was lost")

    def say(self, text: str) -> None:
        with self._lock:
            echo(f"Error: {self.node}: {text}", err=True)

    def take(self, channel: Channel, data: bytes) -> None:
        if not self._name:
            self._write(channel, data)
            return
        *lines, self._rest[channel] = (self._rest.get(channel, b"") + data).split(b"\n")
        self._write(channel, b"".join(self._named(line) for line in lines))

    def _named(self, line: bytes) -> bytes:
        if line.startswith(b"{"):
            return b'{"node":"%s",%s\n' % (self.node.encode(), line[1:])
        return b"%s  %s\n" % (self._name.encode(), line)

    def _write(self, channel: Channel, data: bytes) -> None:
        out = sys.stderr if channel is Channel.STDERR else sys.stdout
        with self._lock:
            out.buffer.write(data)
            out.buffer.flush()
