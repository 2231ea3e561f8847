"""``python3 -m ebpfproxy.agent.prepare``: the DaemonSet's first init container, before the agent's own.

Pins have to outlive containers, which requires a bpffs of the host: where none is mounted, this mounts one in
the host's mount namespace. And the address of the control plane is needed before Services work: kubeadm's
kubelet has it in its kubeconfig, of which nothing else is handed on.

It needs no other program, of this image or of the host: neither has to have a shell, nsenter or mount.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from pathlib import Path

from ebpfproxy.datapath.kernel.roots import is_bpffs_at
from ebpfproxy.kube.control_plane import server_of

#: Where the manifest mounts folders of the host, and the emptyDir of the pod.
_BPFFS, _NAMESPACES, _KUBERNETES = Path("/host/bpf"), Path("/host/ns"), Path("/host/kubernetes")
_HANDED_ON = Path("/tmp/kubelet.conf")  # noqa: S108 - the pod's own folder
_PLACE_ON_HOST = Path("/sys/fs/bpf")
_CLONE_NEWNS = 0x20000


def main() -> int:
    try:
        hand_on_server(_KUBERNETES / "kubelet.conf", _HANDED_ON)
        if not is_bpffs_at(_BPFFS):
            mount_bpffs(_NAMESPACES / "mnt", _PLACE_ON_HOST)
    except OSError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    return 0


def hand_on_server(kubeconfig: Path, copy: Path) -> None:
    """Writes a kubeconfig with the server of the current context and nothing else; none where there is none.

    Raises OSError.
    """
    server = server_of(kubeconfig)
    if server is None:
        return
    name = "control-plane"
    document = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": name, "cluster": {"server": server}}],
        "contexts": [{"name": name, "context": {"cluster": name}}],
        "current-context": name,
    }
    copy.write_text(json.dumps(document))


def mount_bpffs(namespace: Path, place: Path) -> None:
    """Takes this process into a mount namespace for good, and mounts a bpffs there, for root alone.

    Raises OSError.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    fd = os.open(namespace, os.O_RDONLY | os.O_CLOEXEC)
    try:
        # A process with several threads cannot do this.
        _check(libc.setns(fd, _CLONE_NEWNS), f"setns {namespace}")
    finally:
        os.close(fd)
    result = libc.mount(b"bpf", os.fsencode(place), b"bpf", 0, b"mode=0700")
    _check(result, f"mount a bpffs at the host's {place}")


def _check(result: int, what: str) -> None:
    if result:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")


if __name__ == "__main__":
    sys.exit(main())
