"""``python -m tests.kernels.guest GROUP...``: in the emulator. Asks the agent if it runs on this kernel, and runs tests.

A group's name has "_" for each space. Each result is written at once, so that those before a crash are known.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import IO

import msgspec
import pytest

from ebpfproxy.datapath.kernel import bpf, probe
from tests.kernels.kernels import AGAIN, GROUPS, LEFT_OUT, group_of
from tests.kernels.results import Result, line
from tests.kernels.root import test_list

CHANNEL = Path("/dev/ttyS1")


class Recorder:
    """A plugin of pytest that writes how many tests there are, and each one's outcome."""

    def __init__(self, channel: IO[str], only: Collection[str] = ()) -> None:
        """``only``: names of single tests; some may no longer exist."""
        self._channel = channel
        self._only = only

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = [each for each in items if not self._only or each.nodeid in self._only]

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self._channel.write(line("planned", Counter(group_of(item.nodeid) for item in session.items)))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.passed:
            return
        reason = ""
        if report.skipped and isinstance(report.longrepr, tuple):
            reason = report.longrepr[2].removeprefix("Skipped: ")
        elif report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            reason = (crash.message if crash else str(report.longrepr)).splitlines()[0][:300]
        self._channel.write(line("result", Result(report.nodeid, report.outcome, reason, report.duration)))


def _machine() -> dict[str, str]:
    """Properties of the kernel and its settings that decide which BPF programs run, and how."""
    files = {
        "bpf_jit_enable": "/proc/sys/net/core/bpf_jit_enable",
        "unprivileged_bpf_disabled": "/proc/sys/kernel/unprivileged_bpf_disabled",
        "lockdown": "/sys/kernel/security/lockdown",
    }
    found = {name: Path(path).read_text().strip() for name, path in files.items() if Path(path).exists()}
    return {
        "release": platform.release(),
        "version": platform.version(),
        "possible CPUs": str(bpf.possible_cpus()),
        "IPv6": "yes" if Path("/proc/net/if_inet6").exists() else "no",
        **found,
    }


def features_of(found: probe.Features) -> dict[str, bool]:
    """What the page has of the probe: of a feature with details, whether it is there."""
    return {name: bool(value) for name, value in msgspec.to_builtins(found).items()}


def _refusal() -> str:
    """Returns what the agent says on a kernel that its probe refuses."""
    with tempfile.TemporaryDirectory() as manifests:
        command = [sys.executable, "-m", "ebpfproxy", "run", "--init-only", "--manifests", manifests]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    print(done.stdout, done.stderr, sep="\n", flush=True)
    return done.stderr.strip().splitlines()[-1] if done.returncode else "it starts, but its probe fails"


def main(groups: list[str]) -> None:
    with CHANNEL.open("w", buffering=1) as channel:
        channel.write(line("machine", _machine()))
        try:
            channel.write(line("features", features_of(probe.probe())))
        except probe.UnsupportedKernelError:
            channel.write(line("refusal", _refusal()))
        else:
            only: list[str] = []
            if groups == [AGAIN]:
                only = test_list(platform.release()).read_text().splitlines()
                paths = sorted({each.partition("::")[0] for each in only})
            else:
                paths = [path for name in groups for path in GROUPS[name.replace("_", " ")]]
            options = ["-v", "--color=no", "-p", "no:cacheprovider", "--timeout", "900", "--durations", "40"]
            # All of them are so marked, and those that make test leaves out are not left out here.
            options += ["-m", "root"]
            pytest.main([*options, "-k", f"not ({LEFT_OUT})", *paths], plugins=[Recorder(channel, only)])
        channel.write(line("complete", True))
    os.sync()


if __name__ == "__main__":
    main(sys.argv[1:])
