"""Images for the nodes' containerds, built here and imported from files without a registry.

An archive is what ``docker save`` writes (``manifest.json``, a configuration, layers), which ``ctr images import`` reads.
Results that take minutes are kept in ``.cluster/`` of the checkout, by a hash of their inputs.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from tests.cluster import stores
from tests.cluster.binaries import KUBE_BIN, has, kubernetes_version
from tests.deploy import image
from tests.deploy.runtime import install

TOP = Path(__file__).parents[2]
KEPT = TOP / ".cluster"
AGENT = "ebpfproxy:0.1.0"
#: This is another version of the same program.
NEXT = "ebpfproxy:0.1.0-next"
PAUSE = "registry.k8s.io/pause:3.10.2"
_E2E = "registry.k8s.io/e2e-test-images"
AGNHOST = f"{_E2E}/agnhost:2.63.0"
BUSYBOX = f"{_E2E}/busybox:1.37.0-1"
#: This server of a conntrack spec sends segments out of window.
REGRESSION = f"{_E2E}/regression-issue-74839:1.5"
#: Specs about DNS use glibc's resolver and dig in it.
GLIBC_DNS = f"{_E2E}/glibc-dns-testing:2.0.0"
#: Specs look at a node's conntrack table in it.
IPTABLES = "registry.k8s.io/build-image/distroless-iptables:v0.9.3"
#: Scripts of the e2e suite call these in agnhost's image, which is usually based on Alpine.
_TOOLS = "bind9-dnsutils,ca-certificates,conntrack,curl,iperf,iproute2,iptables,iputils-ping,netcat-openbsd,procps,wget,usr-is-merged"
#: An image of the agent depends on these paths.
_SOURCES = (
    "deploy/Dockerfile", "deploy/base", "bpf", "ebpfproxy", "tools/lock", "setup.py", "pyproject.toml",
)  # fmt: skip


class Image(NamedTuple):
    """``layers`` are tar files, the lowest first."""

    name: str
    layers: list[Path]
    entrypoint: list[str]
    command: list[str]
    environment: dict[str, str]

    def configuration(self, digests: list[str]) -> bytes:
        """Returns the configuration of the OCI image specification."""
        path = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        content = {
            "architecture": "amd64",
            "os": "linux",
            "config": {
                "Entrypoint": self.entrypoint,
                "Cmd": self.command,
                "Env": [path, *(f"{key}={value}" for key, value in self.environment.items())],
            },
            "rootfs": {"type": "layers", "diff_ids": [f"sha256:{digest}" for digest in digests]},
        }
        return json.dumps(content).encode()


def write_archive(target: Path, images: Sequence[Image]) -> None:
    """Writes an archive of images; a shared layer is in it once."""
    layers = {layer: _digest(layer) for each in images for layer in each.layers}
    manifest = []
    with tarfile.open(target, "w") as tar:

        def add(file: str, content: bytes) -> None:
            member = tarfile.TarInfo(file)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))

        for each in images:
            configuration = each.configuration([layers[layer] for layer in each.layers])
            file = f"{hashlib.sha256(configuration).hexdigest()}.json"
            add(file, configuration)
            names = [f"{layers[layer]}/layer.tar" for layer in each.layers]
            manifest.append({"Config": file, "RepoTags": [each.name], "Layers": names})
        add("manifest.json", json.dumps(manifest).encode())
        for layer, digest in layers.items():
            tar.add(layer, f"{digest}/layer.tar")


def _digest(path: Path) -> str:
    with path.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def pack(root: Path, target: Path) -> None:
    """Writes a layer of all files of a folder, without file systems mounted below it."""
    subprocess.run(
        [
            "tar",
            "--one-file-system",
            "--numeric-owner",
            "--sort=name",
            "-C",
            str(root),
            "-cf",
            str(target),
            ".",
        ],
        check=True,
    )


def binary(name: str, target: Path, folder: str = "usr/local/bin") -> None:
    """Returns a layer with a Kubernetes binary."""
    with tarfile.open(target, "w") as tar:
        tar.add(KUBE_BIN / name, f"{folder}/{name}".lstrip("/"))


def node_images() -> Path:
    """Returns the archive of images for every node, with the agent's."""
    busybox = _kept("busybox", "1", _busybox)
    found = [
        Image(PAUSE, [busybox], ["/bin/sleep"], ["infinity"], {}),
        Image(BUSYBOX, [busybox], [], ["sh"], {}),
        agent_image(AGENT),
        patched_image(NEXT),
    ]
    if has("kube-proxy"):
        # The agent's image has iptables and nft, the content of kube-proxy's own image.
        layers = [agent_layer(), _binary("kube-proxy")]
        found.append(
            Image(f"registry.k8s.io/kube-proxy:{kubernetes_version()}", layers, ["kube-proxy"], [], {})
        )
    if has("agnhost"):
        layers = [_kept("tools", _TOOLS, _tools), _binary("agnhost", "")]
        found.append(Image(AGNHOST, layers, ["/agnhost"], ["pause"], {}))
        found += [Image(name, layers[:1], [], ["sh"], {}) for name in (IPTABLES, GLIBC_DNS)]
    if has("regression-issue-74839"):
        layers = [busybox, _binary("regression-issue-74839", "")]
        found.append(Image(REGRESSION, layers, ["/regression-issue-74839"], [], {}))
    return kept_archive("node", found)


def control_plane_images() -> Path:
    """Returns the archive of images that kubeadm runs on the first node."""
    busybox = _kept("busybox", "1", _busybox)
    names = ("kube-apiserver", "kube-controller-manager", "kube-scheduler")
    version = kubernetes_version()
    found = [
        Image(f"registry.k8s.io/{name}:{version}", [busybox, _binary(name)], [name], [], {}) for name in names
    ]
    return kept_archive("control-plane", found)


def agent_layer() -> Path:
    """Returns the root that the Dockerfile's steps build as one layer."""

    def make(target: Path) -> None:
        with (
            tempfile.TemporaryDirectory(prefix="ebpfproxy-image-") as folder,
            image.built(Path(folder)) as made,
        ):
            pack(made["full"].root, target)

    return _kept("agent", _stamp(*(TOP / each for each in _SOURCES)), make)


def agent_image(name: str, environment: dict[str, str] | None = None) -> Image:
    """Returns the agent's image by any name: a second one causes a rollout."""
    steps = image.read(image.DOCKERFILE.read_text())
    own = {
        key: value for key, _, value in (s.argument.partition("=") for s in steps if s.instruction == "ENV")
    }
    return Image(name, [agent_layer()], ["ebpfproxy"], ["run"], {**own, **(environment or {})})


def patched_image(name: str) -> Image:
    """Returns another version of the agent's image: a small layer of this checkout's files over the kept root."""
    layer = _kept("patch", _stamp(TOP / "ebpfproxy", TOP / "bpf", TOP / "deploy/base"), _patch)
    known = agent_image(name)
    return known._replace(layers=[*known.layers, layer])


def kept_archive(label: str, found: list[Image]) -> Path:
    told = json.dumps([(*each[:1], [layer.name for layer in each.layers], *each[2:]) for each in found])
    return _kept(f"images-{label}", told, lambda target: write_archive(target, found))


def _patch(target: Path) -> None:
    installed = "usr/local/lib/python3.11/dist-packages/ebpfproxy"
    with tarfile.open(target, "w") as tar:
        for source, place in (("ebpfproxy", ""), ("bpf", "/bpf"), ("deploy/base", "/deploy")):
            for file in sorted((TOP / source).rglob("*")):
                if file.is_file() and file.suffix != ".pyc":
                    tar.add(file, f"{installed}{place}/{file.relative_to(TOP / source)}")


def _binary(name: str, folder: str = "usr/local/bin") -> Path:
    return _kept(name, _stamp(KUBE_BIN / name), lambda target: binary(name, target, folder))


def store() -> Path:
    """Returns containerd's folder with all images of a cluster, to be shared with nodes."""
    archives = [node_images(), control_plane_images()]
    return _kept(
        "store",
        json.dumps([each.name for each in archives]),
        lambda target: stores.fill(target, archives),
        "",
    )


def _kept(name: str, made_of: str, make: Callable[[Path], object], suffix: str = ".tar") -> Path:
    """Returns the file or folder by name and origin; creates it when missing and removes those of other origins."""
    KEPT.mkdir(exist_ok=True)
    target = KEPT / f"{name}-{hashlib.sha256(made_of.encode()).hexdigest()[:16]}{suffix}"
    # Another process of this run may be creating it.
    with (KEPT / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            unfinished = KEPT / f"{target.name}.{os.getpid()}"
            make(unfinished)
            unfinished.rename(target)
            for old in KEPT.glob(f"{name}-{'[0-9a-f]' * 16}{suffix}"):
                if old != target:
                    shutil.rmtree(old) if old.is_dir() else old.unlink()
    return target


def _stamp(*paths: Path) -> str:
    """Returns a hash of the contents of files and folders."""
    found = hashlib.sha256()
    for path in paths:
        files = [path] if path.is_file() else sorted(path.rglob("*"))
        for file in files:
            if file.is_file() and file.suffix != ".pyc":
                found.update(str(file.relative_to(path.parent)).encode())
                with file.open("rb") as content:
                    found.update(hashlib.file_digest(content, "sha256").digest())
    return found.hexdigest()


def _busybox(target: Path) -> None:
    install("busybox-static", "/bin/busybox")
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        for folder in ("bin", "etc", "tmp", "usr/local/bin", "var"):
            (root / folder).mkdir(parents=True)
        shutil.copy("/bin/busybox", root / "bin/busybox")
        subprocess.run(["chroot", str(root), "/bin/busybox", "--install", "-s", "/bin"], check=True)
        pack(root, target)


def _tools(target: Path) -> None:
    install("mmdebstrap", "mmdebstrap")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "root"
        hooks = "--hook-dir=/usr/share/mmdebstrap/hooks/merged-usr"
        command = [
            "mmdebstrap",
            "--quiet",
            "--variant=minbase",
            f"--include={_TOOLS}",
            hooks,
            "bookworm",
            str(root),
        ]
        subprocess.run(command, check=True)
        pack(root, target)
