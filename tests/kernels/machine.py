"""One boot of a kernel in qemu."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

from tests.kernels import network
from tests.kernels.kernels import Kernel
from tests.kernels.results import Run, read
from tests.kernels.root import TOP, Root


def boot(kernel: Kernel, root: Root, release: str, disk: Path, console: Path, minutes: float) -> Run:
    """Boots a kernel and returns what its tests have found. Nothing that it writes to the disk is kept.

    The console's text is kept in a file, and copied to our output. After ``minutes`` the emulator is killed.
    """
    results = console.with_suffix(".results")
    results.unlink(missing_ok=True)
    groups = " ".join(name.replace(" ", "_") for name in kernel.groups)
    arguments = f"console=ttyS0 quiet panic=-1 root=/dev/vda rw init={TOP}/tests/kernels/init {kernel.arguments} -- {groups}"
    command: list[str | Path] = [
        *network.in_a_namespace(),
        *("qemu-system-x86_64", "-accel", "tcg,thread=multi", "-m", "3G", *kernel.machine),
        *(
            "-nographic",
            "-no-reboot",
            *network.arguments(),
            "-serial",
            "mon:stdio",
            "-serial",
            f"file:{results}",
        ),
        *("-kernel", root.kernel(release), "-initrd", root.initrd(release), "-append", arguments),
        *("-drive", f"file={disk},format=raw,if=virtio,snapshot=on"),
    ]
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
