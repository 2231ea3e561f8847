"""``ebpfproxy migrate`` on a lab node, from this checkout."""

from __future__ import annotations

import subprocess
import sys

from tests.lab import LabNode, command
from tests.lab.waiting import READY_SECONDS

_SECONDS = 2 * READY_SECONDS


class Migration:
    """Runs the commands on node ``a``."""

    a: LabNode

    def migrate(self, *arguments: str, check: bool = True) -> str:
        """Returns the output of the command."""
        done = self._run(*arguments)
        if check and done.code:
            raise RuntimeError(f"migrate {arguments} failed ({done.code}): {done.output}{done.errors}")
        return done.output

    def start_migrate(self, *arguments: str) -> subprocess.Popen[bytes]:
        """Starts the command as a process of its own, which runs while the test goes on."""
        script = "from ebpfproxy.cli.migrate import command; command()"
        return self.a.popen(
            [sys.executable, "-c", script, *arguments, *self.a.roots], stdout=subprocess.DEVNULL
        )

    def fails(self, *arguments: str) -> str:
        """Returns the output of a command that exits with 1."""
        done = self._run(*arguments)
        assert done.code == 1, done.output + done.errors
        return done.output + done.errors

    def _run(self, *arguments: str) -> command.Done:
        command.import_commands()
        return self.a.call(command.run, ["migrate", *arguments, *self.a.roots], timeout=_SECONDS)
