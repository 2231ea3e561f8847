"""The disk that kernels boot from: Debian 12 with the checkout, and the kernels of other suites unpacked into it.

The suites are known to apt files of their own below the work folder, not to the machine's.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

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
_ENVIRONMENT = os.environ | {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}


def test_list(release: str) -> Path:
    """Returns where the disk names single tests for a kernel."""
    return Path("/tests", release)


def _run(*command: str | Path, cwd: Path | None = None) -> str:
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=cwd, env=_ENVIRONMENT)
    return done.stdout


class Root:
    """A folder with the root file system, below ``work``; what is there already is used, unless the packages changed."""

    def __init__(self, work: Path) -> None:
        self._work = work
        self.folder = work / "root"
        packages = work / "packages.txt"
        if not self.folder.exists() or not packages.exists() or packages.read_text() != _PACKAGES:
            made = work / "root.part"
            # Nobody else knows the folder; what an interrupted run left there is worth nothing.
            shutil.rmtree(made, ignore_errors=True)
            _run("mmdebstrap", "--quiet", "--variant=minbase", f"--include={_PACKAGES}", SUITE, made)
            for name, text in _INITRAMFS.items():
                (made / name).write_text(text)
            shutil.rmtree(self.folder, ignore_errors=True)
            made.rename(self.folder)
            packages.write_text(_PACKAGES)

    def add_kernel(self, suite: str, package: str) -> str:
        """Unpacks the kernel that a package of a suite depends on. Returns its release."""
        debs = self._work / "packages" / suite / package
        if not debs.exists():
            self._download(suite, package, debs)
        release = next(
            found[1] for deb in debs.iterdir() if (found := re.match(r"linux-image-(\d[^_]*)_", deb.name))
        )
        if not self.initrd(release).exists():
            for deb in debs.iterdir():
                # dpkg-deb would replace the link /lib by a folder.
                unpack = 'dpkg-deb --fsys-tarfile "$1" | tar -x --keep-directory-symlink -C "$2"'
                _run("bash", "-e", "-o", "pipefail", "-c", unpack, "-", deb, self.folder)
            modules = self.folder / "lib/modules" / release
            for name in ("config", "vmlinuz"):
                # Packages of newer suites have them beside the modules.
                if (modules / name).exists():
                    shutil.copy(modules / name, self.folder / "boot" / f"{name}-{release}")
            _run("chroot", self.folder, "depmod", release)
            made = self.initrd(release).with_suffix(".part")
            _run("chroot", self.folder, "mkinitramfs", "-o", f"/boot/{made.name}", release)
            made.rename(self.initrd(release))
        return release

    def _download(self, suite: str, package: str, folder: Path) -> None:
        """Downloads the packages of a kernel, with the mirror and the keys that mmdebstrap has given to the root."""
        apt = self._work / "apt" / suite
        part = folder.with_suffix(".part")
        for each in ("lists/partial", "cache/archives/partial", "etc/apt.conf.d", "etc/preferences.d"):
            (apt / each).mkdir(parents=True, exist_ok=True)
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
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
        _run("apt-get", *given, "-q", "update")
        told = _run("apt-cache", *given, "depends", "--recurse", "--important", package)
        names = set(re.findall(r"^linux-(?:image|base|binary|modules)-\d\S+$", told, re.MULTILINE))
        _run("apt-get", *given, "-q", "download", *sorted(names), cwd=part)
        part.rename(folder)

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
        _run(sys.executable, "-m", "ebpfproxy.datapath.programs.build", TOP / ".bytecode", cwd=TOP)
        _run(sys.executable, "-m", "compileall", "-q", "-j", "0", ".venv/lib", cwd=TOP)
        copy = self.folder / TOP.relative_to("/")
        shutil.rmtree(copy, ignore_errors=True)
        copy.mkdir(parents=True)
        files = "git ls-files -z --cached --others --exclude-standard | tar -c --ignore-failed-read --null -T - .venv .bytecode"
        _run("bash", "-e", "-o", "pipefail", "-c", f'{files} | tar -x -C "$1"', "-", copy, cwd=TOP)
        with disk.open("wb") as file:
            file.truncate(_BYTES)
        _run("mkfs.ext4", "-q", "-d", self.folder, disk)


def install_tools(packages: Iterable[tuple[str, str]]) -> None:
    """Installs Debian packages that this command alone needs, unless their programs are there: (program, package)."""
    lacking = [
        package for program, package in packages if shutil.which(program, path=_ENVIRONMENT["PATH"]) is None
    ]
    if lacking:
        _run("apt-get", "update", "-q")
        _run("apt-get", "install", "-q", "-y", "--no-install-recommends", *lacking)
