"""``ebpfproxy migrate`` on a lab node, from this checkout."""

from __future__ import annotations

import subprocess
import sys

from tests.lab import LabNode
from tests.lab.lab import READY_SECONDS

_SECONDS = 2 * READY_SECONDS


class Migration:
    """Runs the commands on node ``a``."""

    a: LabNode

    def migrate(self, *arguments: str, check: bool = True) -> str:
        """Returns what the command prints."""
        return self.a.run(self._command(*arguments), check=check, timeout=_SECONDS)

    def start_migrate(self, *arguments: str) -> subprocess.Popen[bytes]:
        return self.a.popen(self._command(*arguments), stdout=subprocess.DEVNULL)

    def fails(self, *arguments: str) -> str:
        """Returns what a command prints that ends with 1."""
        process = self.a.popen(self._command(*arguments), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        said = process.communicate(timeout=_SECONDS)[0].decode()
        assert process.returncode == 1, said
        return said

    def _command(self, *arguments: str) -> list[str]:
        command = [sys.executable, "-c", "from ebpfproxy.cli.migrate import command; command()"]
        return [*command, *arguments, *self.a.roots]
