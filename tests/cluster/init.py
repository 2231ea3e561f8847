"""The first process of a node: makes the node's root, mounts what a kubelet expects, then reaps.

Run in new mount, PID, UTS, IPC and cgroup namespaces and in the node's network namespace. Uses the standard library
only, since it runs before the node has any files. Its settings are JSON on the command line: ``{"name": host name,
"store": folder on a disk, "upper": folder on a tmpfs, "bpffs": folder or null, "shown": {folder of this machine: folder
of the node}}``.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

#: containerd and the kubelet write large amounts here; overlayfs in containerd needs a disk, too.
_ON_DISK = ("var/lib/containerd", "var/lib/kubelet", "var/log")
#: These are created anew at every boot, as by systemd.
_VOLATILE = ("run", "tmp")
_V1 = "/sys/fs/cgroup"


def mount(kind: str, place: Path, options: str = "", source: str = "none") -> None:
    place.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", kind, *(["-o", options] if options else []), source, str(place)]
    subprocess.run(command, check=True)


def bind(source: Path, place: Path) -> None:
    place.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "--bind", str(source), str(place)], check=True)


def hierarchies() -> list[tuple[str, str, str]]:
    """Returns the cgroup mounts of this machine: (folder below ``/sys/fs/cgroup``, type, options)."""
    found = []
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, place, kind, options, *_ = line.split()
        if kind in ("cgroup", "cgroup2"):
            wanted = [each for each in options.split(",") if each not in ("rw", "ro", "relatime", "nosuid")]
            found.append((place.removeprefix(_V1).lstrip("/"), kind, ",".join(wanted)))
    return found


def make_root(name: str, store: Path, upper: Path) -> Path:
    """Mounts an overlay in memory over this machine's root, so that writes of the node are private."""
    groups = hierarchies()
    for part in ("up", "work", "root"):
        (upper / part).mkdir(exist_ok=True)
    root = upper / "root"
    mount("overlay", root, f"lowerdir=/,upperdir={upper}/up,workdir={upper}/work", "root")
    mount("proc", root / "proc")
    subprocess.run(["mount", "--rbind", "--make-rslave", "/dev", str(root / "dev")], check=True)
    mount("sysfs", root / "sys")
    mount("tmpfs", root / "sys/fs/cgroup", "mode=755")
    for folder, kind, options in groups:
        mount(kind, root / "sys/fs/cgroup" / folder, options)
    for each in _VOLATILE:
        mount("tmpfs", root / each, "mode=755")
    for each in _ON_DISK:
        (store / each).mkdir(parents=True, exist_ok=True)
        bind(store / each, root / each)
    (root / "run/netns").mkdir()
    (root / "etc/hostname").write_text(f"{name}\n")
    return root


def main() -> None:
    told = json.loads(sys.argv[1])
    root = make_root(told["name"], Path(told["store"]), Path(told["upper"]))
    if told["bpffs"]:
        bind(Path(told["bpffs"]), root / "sys/fs/bpf")
    else:
        mount("bpf", root / "sys/fs/bpf", "mode=0700")
    for source, place in told["shown"].items():
        bind(Path(source), root / place.lstrip("/"))
    old = root / "mnt"
    subprocess.run(["pivot_root", str(root), str(old)], check=True)
    os.chdir("/")
    subprocess.run(["umount", "-l", "/mnt"], check=True)
    subprocess.run(["hostname", told["name"]], check=True)
    # Volumes with HostToContainer propagation, and the kubelet's own, need a shared root.
    subprocess.run(["mount", "--make-rshared", "/"], check=True)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    print("booted", flush=True)
    while True:
        try:
            os.wait()
        except ChildProcessError:
            signal.sigtimedwait({signal.SIGCHLD}, 1)


if __name__ == "__main__":
    main()
