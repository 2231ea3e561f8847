"""containerd's folder with all images unpacked, created once and shared with each node as hard links.

Blobs and the files of unpacked layers are never written again (overlayfs writes to upper folders), so nodes can share
them; containerd's databases are copied.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import time
from pathlib import Path

from tests.deploy.runtime import install

_DATABASES = ("io.containerd.metadata.v1.bolt/meta.db", "io.containerd.snapshotter.v1.overlayfs/metadata.db")


def fill(folder: Path, archives: list[Path]) -> None:
    """Runs a containerd on ``folder`` while the archives are imported."""
    install("containerd", "containerd")
    install("containernetworking-plugins", "/usr/lib/cni/ptp")
    with tempfile.TemporaryDirectory(prefix="ebpfproxy-containerd-") as state:
        socket = f"{state}/containerd.sock"
        configuration = Path(state) / "config.toml"
        configuration.write_text(
            f'version = 2\nroot = "{folder}"\nstate = "{state}/run"\ndisabled_plugins = ["io.containerd.grpc.v1.cri"]\n'
            f'[grpc]\n  address = "{socket}"\n'
        )
        with (Path(state) / "log").open("wb") as log:
            process = subprocess.Popen(["containerd", "-c", str(configuration)], stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + 60
            while not Path(socket).exists():
                assert time.monotonic() < deadline, (Path(state) / "log").read_text()[-4000:]
                time.sleep(0.1)
            for archive in archives:
                subprocess.run(
                    ["ctr", "-a", socket, "-n", "k8s.io", "images", "import", str(archive)],
                    check=True,
                    stdout=subprocess.DEVNULL,
                )
        finally:
            process.terminate()
            process.wait(30)


def lend(store: Path, target: Path) -> None:
    """Copies the result of :func:`fill` to the writable ``target``."""
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(target, ignore_errors=True)
    subprocess.run(["cp", "-al", str(store), str(target)], check=True)
    for name in _DATABASES:
        (target / name).unlink()
        shutil.copy2(store / name, target / name)
