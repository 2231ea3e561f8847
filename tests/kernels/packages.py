"""Kernels of Debian's suites, as packages that are downloaded and unpacked, not installed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path

_ENVIRONMENT = os.environ | {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}


def output_of(*command: str | Path, cwd: Path | None = None) -> str:
    """Runs a command with Debian's programs, and returns its standard output.

    Raises subprocess.CalledProcessError.
    """
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=cwd, env=_ENVIRONMENT)
    return done.stdout


def download(package: str, folder: Path, options: Sequence[str] = ()) -> None:
    """Downloads into a folder the packages with the kernel that ``package`` depends on: its newest in these sources.

    ``options``: of apt; without any its sources are the machine's. What an interrupted download left is not used.
    """
    if folder.exists():
        return
    part = folder.with_suffix(".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    told = output_of("apt-cache", *options, "depends", "--recurse", "--important", package)
    names = set(re.findall(r"^linux-(?:image|base|binary|modules)-\d\S+$", told, re.MULTILINE))
    output_of("apt-get", *options, "-q", "download", *sorted(names), cwd=part)
    part.rename(folder)


def release_in(folder: Path) -> str:
    """Returns the release (``uname -r``) of the kernel whose packages are in a folder."""
    found = (re.match(r"linux-image-(\d[^_]*)_", deb.name) for deb in folder.iterdir())
    return next(match[1] for match in found if match)


def unpack(folder: Path, root: Path) -> None:
    """Unpacks the packages in a folder below the root of a file system, with the kernel at ``boot/vmlinuz-RELEASE``."""
    for deb in folder.iterdir():
        # dpkg-deb would replace the link /lib by a folder.
        command = 'dpkg-deb --fsys-tarfile "$1" | tar -x --keep-directory-symlink -C "$2"'
        output_of("bash", "-e", "-o", "pipefail", "-c", command, "-", deb, root)
    release = release_in(folder)
    modules = root / "lib/modules" / release
    for name in ("config", "vmlinuz"):
        # Packages of newer suites have them beside the modules.
        if (modules / name).exists():
            shutil.copy(modules / name, root / "boot" / f"{name}-{release}")


def install_tools(tools: Iterable[tuple[str, str]]) -> None:
    """Installs Debian packages that this command alone needs, unless their programs are there: (program, package)."""
    lacking = [
        package for program, package in tools if shutil.which(program, path=_ENVIRONMENT["PATH"]) is None
    ]
    if lacking:
        output_of("apt-get", "update", "-q")
        output_of("apt-get", "install", "-q", "-y", "--no-install-recommends", *lacking)
