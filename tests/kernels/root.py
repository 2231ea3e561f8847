"""The disk that kernels boot from: Debian 12 with the checkout, and the kernels of other suites unpacked into it.

The suites are known to apt files of their own below the work folder, not to the machine's.
"""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

from tests.kernels import packages
from tests.kernels.packages import output_of

TOP = Path(__file__).parents[2]
SUITE = "bookworm"
_PACKAGES = (
    "apparmor,bpftool,busybox-static,clang,conntrack,initramfs-tools,ipset,iproute2,iptables,ipvsadm,kmod,nftables,"
    "libxdp1,procps,python3-bpfcc,runc,socat,xdp-tools"
)
#: What an initramfs needs to find the disk; all modules would take it minutes to unpack in an emulator.
_INITRAMFS = {
    "etc/initramfs-tools/conf.d/kernels": "MODULES=list\nCOMPRESS=gzip\n",
    "etc/initramfs-tools/modules": "virtio_pci\nvirtio_blk\next4\n",
}
_BYTES = 6 << 30


def test_list(release: str) -> Path:
    """Returns where the disk names single tests for a kernel."""
    return Path("/tests", release)


class Root:
    """A folder with the root file system, below ``work``; what is there already is used, unless the packages changed."""

    def __init__(self, work: Path) -> None:
        self._work = work
        self.folder = work / "root"
        known = work / "packages.txt"
        if not self.folder.exists() or not known.exists() or known.read_text() != _PACKAGES:
            made = work / "root.part"
            # Nobody else knows the folder; what an interrupted run left there is worth nothing.
            shutil.rmtree(made, ignore_errors=True)
            output_of("mmdebstrap", "--quiet", "--variant=minbase", f"--include={_PACKAGES}", SUITE, made)
            for name, text in _INITRAMFS.items():
                (made / name).write_text(text)
            shutil.rmtree(self.folder, ignore_errors=True)
            made.rename(self.folder)
            known.write_text(_PACKAGES)

    def add_kernel(self, suite: str, package: str) -> str:
        """Unpacks the kernel that a package of a suite depends on. Returns its release."""
        debs = self._work / "packages" / suite / package
        if not debs.exists():
            packages.download(package, debs, self._sources(suite))
        release = packages.release_in(debs)
        if not self.initrd(release).exists():
            packages.unpack(debs, self.folder)
            output_of("chroot", self.folder, "depmod", release)
            made = self.initrd(release).with_suffix(".part")
            output_of("chroot", self.folder, "mkinitramfs", "-o", f"/boot/{made.name}", release)
            made.rename(self.initrd(release))
        return release

    def _sources(self, suite: str) -> list[str]:
        """Returns options of apt with the sources of a suite: the mirror and the keys that mmdebstrap has given to the root."""
        apt = self._work / "apt" / suite
        for each in ("lists/partial", "cache/archives/partial", "etc/apt.conf.d", "etc/preferences.d"):
            (apt / each).mkdir(parents=True, exist_ok=True)
        known = (self.folder / "etc/apt/sources.list").read_text()
        if suite == "sid":
            # It has neither updates nor security.
            known = re.sub(rf"^.* {SUITE}-.*$", "", known, flags=re.MULTILINE)
        (apt / "sources.list").write_text(re.sub(rf"\b{SUITE}\b", suite, known))
        options = {
            "Dir::Etc": apt / "etc",
            "Dir::Etc::SourceList": apt / "sources.list",
            "Dir::Etc::TrustedParts": self.folder / "etc/apt/trusted.gpg.d",
            "Dir::State::Lists": apt / "lists",
            "Dir::State::Status": "/dev/null",
            "Dir::Cache": apt / "cache",
            "Acquire::Languages": "none",
            "APT::Sandbox::User": "root",
        }
        given = [word for name, value in options.items() for word in ("-o", f"{name}={value}")]
        output_of("apt-get", *given, "-q", "update")
        return given

    def kernel(self, release: str) -> Path:
        return self.folder / "boot" / f"vmlinuz-{release}"

    def initrd(self, release: str) -> Path:
        return self.folder / "boot" / f"initrd.img-{release}"

    def write_tests(self, release: str, tests: Iterable[str]) -> None:
        """Has the next disk name single tests for a kernel: its command line has no room for them."""
        file = self.folder / test_list(release).relative_to("/")
        file.parent.mkdir(exist_ok=True)
        file.write_text("\n".join(tests))

    def write_disk(self, disk: Path) -> None:
        """Writes the file system of a disk, with the checkout as it is where it is: the virtual environment knows
        its path."""
        # What is compiled here need not be compiled in the emulator.
        output_of(sys.executable, "-m", "ebpfproxy.datapath.programs.build", TOP / ".bytecode", cwd=TOP)
        output_of(sys.executable, "-m", "compileall", "-q", "-j", "0", ".venv/lib", cwd=TOP)
        copy = self.folder / TOP.relative_to("/")
        shutil.rmtree(copy, ignore_errors=True)
        copy.mkdir(parents=True)
        files = "git ls-files -z --cached --others --exclude-standard | tar -c --ignore-failed-read --null -T - .venv .bytecode"
        output_of("bash", "-e", "-o", "pipefail", "-c", f'{files} | tar -x -C "$1"', "-", copy, cwd=TOP)
        with disk.open("wb") as file:
            file.truncate(_BYTES)
        output_of("mkfs.ext4", "-q", "-d", self.folder, disk)
