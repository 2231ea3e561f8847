"""One boot of a kernel in qemu."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from tests.kernels import network
from tests.kernels.kernels import Kernel
from tests.kernels.results import Run, read
from tests.kernels.root import TOP, Root

#: The first process of a kernel that runs tests.
INIT = TOP / "tests/kernels/init"
_QEMU = (
    "qemu-system-x86_64",
    "-accel",
    "tcg,thread=multi",
    "-nographic",
    "-no-reboot",
    "-serial",
    "mon:stdio",
)


def on_disk(kernel: Kernel, root: Root, release: str, disk: Path) -> list[str | Path]:
    """Returns the end of qemu's command for a kernel whose root is on a disk. Nothing that it writes there is kept."""
    groups = " ".join(name.replace(" ", "_") for name in kernel.groups)
    arguments = f"console=ttyS0 quiet panic=-1 root=/dev/vda rw init={INIT} {kernel.arguments} -- {groups}"
    return [
        *("-m", "3G", *kernel.machine, *network.arguments()),
        *("-kernel", root.kernel(release), "-initrd", root.initrd(release), "-append", arguments),
        *("-drive", f"file={disk},format=raw,if=virtio,snapshot=on"),
    ]


def boot(arguments: Sequence[str | Path], console: Path, minutes: float) -> Run:
    """Boots a kernel and returns what its tests have found.

    ``arguments``: the end of qemu's command. The console's text is kept in a file, and copied to our output. After
    ``minutes`` the emulator is killed.
    """
    results = console.with_suffix(".results")
    results.unlink(missing_ok=True)
    command = [*network.in_a_namespace(), *_QEMU, "-serial", f"file:{results}", *arguments]
    with (
        console.open("w") as file,
        subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, errors="replace"
        ) as process,
    ):
        limit = threading.Timer(60 * minutes, process.kill)
        limit.start()
        try:
            assert process.stdout is not None
            for text in process.stdout:
                file.write(text)
                file.flush()
                sys.stdout.write(text)
        finally:
            limit.cancel()
            process.kill()
    return read(results.read_text(errors="replace").splitlines() if results.exists() else ())
