"""All metadata is in pyproject.toml; here is only the step that compiles the BPF programs into the wheel."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithBytecode(build_py):
    """The bytecode is for the architecture that builds; on another one, the agent compiles and needs bcc.

    It takes ``--no-build-isolation``: bcc comes from the distribution, and this package is imported.
    """

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        missing = [name for name in ("bcc", "msgspec") if find_spec(name) is None]
        if missing:
            self.warn(f"no bytecode in this wheel: {' and '.join(missing)} cannot be imported")
            return
        top = Path(self.build_lib).resolve()
        folder = top / "ebpfproxy/bytecode"
        # An earlier build of other sources has left its programs there.
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run(
            [sys.executable, "-m", "ebpfproxy.datapath.programs.build", str(folder)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(top), *filter(None, sys.path)])},
            check=True,
        )


setup(cmdclass={"build_py": BuildWithBytecode})
