"""``python -m tests.faults.lines run …``: the agent, which is killed at a line that stores something in the maps' memory.

Arrays are mapped: what is stored there is no system call, which :mod:`tests.faults.steps` would see. The environment
names a file with lines that are left out (EBPFPROXY_LINES_DONE), to which the line is added at which the process is
killed, and a file that exists once lines count (EBPFPROXY_LINES_ARMED).
"""

from __future__ import annotations

import linecache
import os
import re
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any

from ebpfproxy.cli import main

_STORES = re.compile(
    r"\] \|?&?= |\.(store|update|update_many|delete|delete_many|bring|restore|publish|write|set)\("
)
_WHERE = re.compile(r"ebpfproxy/datapath/(services|abi|kernel|flows)/\w+\.py$")
_done_file, _armed = (Path(os.environ[f"EBPFPROXY_LINES_{name}"]) for name in ("DONE", "ARMED"))
_done = set(_done_file.read_text().splitlines()) if _done_file.exists() else set()


def _local(frame: FrameType, event: str, argument: object) -> Any:
    if event == "line" and _armed.exists():
        name, number = frame.f_code.co_filename, frame.f_lineno
        line = f"{Path(name).name}:{number}"
        if line not in _done and _STORES.search(linecache.getline(name, number)):
            with _done_file.open("a") as file:
                file.write(f"{line}\n")
            os.kill(os.getpid(), signal.SIGKILL)
    return _local


def _trace(frame: FrameType, event: str, argument: object) -> Any:
    return _local if _WHERE.search(frame.f_code.co_filename) else None


# The reconciler, which alone writes, runs in this thread.
sys.settrace(_trace)
main(prog_name="ebpfproxy")
