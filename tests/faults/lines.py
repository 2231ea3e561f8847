"""``python -m tests.faults.lines run …``: the agent, which is killed at a line that stores something in the maps' memory.

Arrays are mapped: what is stored there is no system call, which :mod:`tests.faults.steps` would see. The environment
names a file with lines that are left out (EBPFPROXY_LINES_DONE), to which the line is added at which the process is
killed. Lines count from SIGUSR1 to the next one: a start with each line traced takes many times as long.
"""

from __future__ import annotations

import linecache
import os
import re
import signal
import sys
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any

from ebpfproxy.cli import main

_STORES = re.compile(
    r"\] \|?&?= |\.(store|update|update_many|delete|delete_many|bring|restore|publish|write|set)\("
)
_WHERE = re.compile(r"ebpfproxy/datapath/(services|abi|kernel|flows)/\w+\.py$")
_done_file = Path(os.environ["EBPFPROXY_LINES_DONE"])
_done = set(_done_file.read_text().splitlines()) if _done_file.exists() else set()


@cache
def _stores(name: str, number: int) -> bool:
    return _STORES.search(linecache.getline(name, number)) is not None


def _local(frame: FrameType, event: str, argument: object) -> Any:
    if event == "line":
        name, number = frame.f_code.co_filename, frame.f_lineno
        line = f"{Path(name).name}:{number}"
        if _stores(name, number) and line not in _done:
            with _done_file.open("a") as file:
                file.write(f"{line}\n")
            os.kill(os.getpid(), signal.SIGKILL)
    return _local


def _trace(frame: FrameType, event: str, argument: object) -> Any:
    return _local if _WHERE.search(frame.f_code.co_filename) else None


def _turn(number: int, frame: FrameType | None) -> None:
    """The reconciler, which alone writes, runs in the thread that has the signals."""
    sys.settrace(None if sys.gettrace() else _trace)


signal.signal(signal.SIGUSR1, _turn)
main(prog_name="ebpfproxy")
