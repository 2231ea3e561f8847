"""A kernel that boots from this machine's root file system: nothing is installed or copied, as for :mod:`tests.kernels.root`.

The emulator sees it by virtiofs, below an overlay that keeps in memory what is written.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.kernels import packages
from tests.kernels.kernels import AGAIN
from tests.kernels.machine import INIT
from tests.kernels.packages import output_of
from tests.lab.waiting import until

#: Debian 12 has it in qemu-system-common, later releases in a package of its own.
VIRTIOFSD = Path("/usr/lib/qemu/virtiofsd")
_BUSYBOX = Path("/bin/busybox")
#: They find the root, and what they depend on comes with them.
_MODULES = ("virtio_pci", "virtiofs", "overlay")
_MEMORY = "2G"
#: One processor: here more of them take more time.
_MACHINE = ("-m", _MEMORY, "-smp", "1", "-nic", "none")
#: What protects processes from others, and pages from those that had them before, does not change what programs do, and
#: takes an emulator more than a third of its time.
_KERNEL = "console=ttyS0 quiet panic=-1 mitigations=off init_on_alloc=0"


class SharedRoot:
    """A kernel of this machine's suite, unpacked below ``folder``, which the emulator has to see at the same path."""

    def __init__(self, folder: Path, package: str) -> None:
        self.folder = folder
        debs = folder / "packages"
        packages.download(package, debs, ("-o", "APT::Sandbox::User=root"))
        self.release = packages.release_in(debs)
        self._modules = folder / "lib/modules" / self.release
        if not (self._modules / "modules.dep").exists():
            packages.unpack(debs, folder)
            output_of(_BUSYBOX, "depmod", "-b", folder, self.release)

    @contextmanager
    def booting(self, tests: Iterable[str]) -> Iterator[list[str | Path]]:
        """The end of qemu's command for a boot that runs single tests; the file system is served meanwhile."""
        with tempfile.TemporaryDirectory() as temporary:
            initrd, socket = Path(temporary, "initrd"), Path(temporary, "socket")
            self._write_initrd(initrd, tests)
            command = [
                f"{VIRTIOFSD}",
                f"--socket-path={socket}",
                "-o",
                "source=/,sandbox=chroot,cache=always",
            ]
            with subprocess.Popen(command, stderr=subprocess.DEVNULL) as server:
                try:
                    until(socket.exists, "virtiofsd does not listen")
                    yield [
                        *_MACHINE,
                        *("-object", f"memory-backend-memfd,id=memory,size={_MEMORY},share=on"),
                        *("-numa", "node,memdev=memory", "-chardev", f"socket,id=machine,path={socket}"),
                        *("-device", "vhost-user-fs-pci,chardev=machine,tag=machine"),
                        *("-kernel", self.folder / "boot" / f"vmlinuz-{self.release}", "-initrd", initrd),
                        *("-append", f"{_KERNEL} -- {AGAIN}"),
                    ]
                finally:
                    server.kill()

    def _write_initrd(self, initrd: Path, tests: Iterable[str]) -> None:
        with tempfile.TemporaryDirectory() as temporary:
            made = Path(temporary)
            for name in ("bin", "dev", "proc", "machine", "written", "root"):
                (made / name).mkdir()
            shutil.copy(_BUSYBOX, made / "bin")
            shutil.copy(INIT.with_name("init-shared"), made / "init")
            (made / "tests").write_text("\n".join(tests))
            (made / "modules").write_text(f"{self._modules}")
            (made / "next").write_text(f"{INIT}")
            copy = made / "lib/modules" / self.release
            for each in self._files():
                (copy / each).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(self._modules / each, copy / each)
            archive = 'cd "$1"; find . | "$2" cpio -o -H newc 2>/dev/null >"$3"'
            output_of("sh", "-e", "-c", archive, "-", made, _BUSYBOX, initrd)

    def _files(self) -> Iterator[str]:
        """The files of modules, and those that they depend on, below the folder of all modules; and its index."""
        index = "modules.dep"
        yield index
        for line in (self._modules / index).read_text().splitlines():
            path, _, needed = line.partition(":")
            if Path(path).name.partition(".")[0] in _MODULES:
                yield path
                yield from needed.split()
