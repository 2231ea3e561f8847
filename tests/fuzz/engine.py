"""Runs a target on changed inputs, guided by coverage where atheris is installed.

    python -m tests.fuzz.engine TARGET SECONDS FOLDER

atheris does not return to its caller, and so has a process of its own: FOLDER gets the inputs that reach something
new. :func:`sample` needs nothing but this process, and always runs the same inputs.
"""

from __future__ import annotations

import random
import re
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NamedTuple

from tests.fuzz.mutate import mutated

#: No input of these lengths takes longer; a hang does.
SECONDS = 20
_EXECUTIONS = re.compile(r"number_of_executed_units: (\d+)")
_COVERED = re.compile(r"cov: (\d+)")


class Fault(NamedTuple):
    target: str
    data: bytes
    trace: str


class HangError(Exception):
    """A run takes too long."""


@contextmanager
def limited(seconds: int = SECONDS) -> Iterator[None]:
    """Raises HangError in the main thread when the time is over."""

    def end(number: int, frame: FrameType | None) -> None:
        raise HangError(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def attempt(name: str, data: bytes) -> Fault | None:
    """Runs a target once."""
    from tests.fuzz.targets import TARGETS  # noqa: PLC0415 - instrumented by the caller

    try:
        with limited():
            TARGETS[name].run(data)
    except Exception:
        return Fault(name, data, traceback.format_exc())
    return None


def inputs(name: str, count: int, seed: int) -> Iterator[bytes]:
    """The inputs to begin with, and changed ones."""
    from tests.fuzz.targets import TARGETS  # noqa: PLC0415 - as above

    seeds = list(TARGETS[name].seeds())
    yield from seeds
    chance = random.Random(seed)
    for _ in range(count - len(seeds)):
        yield mutated(chance.choice(seeds), chance, seeds)


def sample(name: str, count: int, seed: int = 1) -> Fault | None:
    """The first fault that so many inputs find."""
    return next((fault for data in inputs(name, count, seed) if (fault := attempt(name, data))), None)


class Guided(NamedTuple):
    """What atheris did: executions, edges that it has reached, and the output of a run that failed."""

    executions: int
    edges: int
    failed: str


def guided(name: str, seconds: float, folder: Path) -> Guided:
    """Runs atheris in a process of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "tests.fuzz.engine", name, str(max(1, round(seconds))), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    counted = _EXECUTIONS.search(done.stderr)
    edges = [int(each) for each in _COVERED.findall(done.stderr)]
    failed = done.stdout[-2000:] + done.stderr[-4000:] if done.returncode else ""
    return Guided(int(counted[1]) if counted else 0, max(edges, default=0), failed)


def _main(name: str, seconds: str, folder: str) -> None:
    import atheris  # noqa: PLC0415 - no test needs it

    with atheris.instrument_imports(include=["ebpfproxy"], enable_loader_override=False):
        from tests.fuzz.targets import TARGETS  # noqa: PLC0415 - instrumented

    target = TARGETS[name]
    seeds = list(target.seeds())
    for number, seed in enumerate(seeds):
        Path(folder, f"seed-{number:03}").write_bytes(seed)
    chance = random.Random(1)

    def change(data: bytes, longest: int, seed: int) -> bytes:
        chance.seed(seed)
        if chance.random() < 0.5:
            return mutated(bytes(data), chance, seeds)[:longest]
        return bytes(atheris.Mutate(data, longest))

    def run(data: bytes) -> None:
        target.run(data)

    options = [
        sys.argv[0],
        f"-max_total_time={seconds}",
        f"-timeout={SECONDS}",
        "-max_len=65536",
        "-rss_limit_mb=2048",
        "-print_final_stats=1",
        f"-artifact_prefix={folder}/fault-",
        folder,
    ]
    atheris.Setup(options, run, custom_mutator=change)
    started = time.monotonic()
    atheris.Fuzz()
    print(f"{time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    _main(*sys.argv[1:4])
