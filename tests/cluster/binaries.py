"""The folder that ``KUBE_BIN`` names, with the binaries of one Kubernetes version, and their versions."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

#: A cluster needs all of these.
REQUIRED = (
    "etcd",
    "kube-apiserver",
    "kube-controller-manager",
    "kube-scheduler",
    "kubeadm",
    "kubectl",
    "kubelet",
)
#: Each of these is needed by some of the tests, which are skipped without it.
OPTIONAL = ("agnhost", "e2e.test", "helm", "kube-proxy", "regression-issue-74839")

KUBE_BIN = Path(os.environ.get("KUBE_BIN", "/nonexistent"))


def missing() -> list[str]:
    """Returns the required binaries that ``KUBE_BIN`` lacks."""
    return [name for name in REQUIRED if not (KUBE_BIN / name).is_file()]


def has(name: str) -> bool:
    return (KUBE_BIN / name).is_file()


def kubernetes_version() -> str:
    """Returns the version of kubeadm, such as ``v1.36.2``, which is that of the images that it pulls."""
    message = subprocess.run(
        [str(KUBE_BIN / "kubeadm"), "version", "-o", "short"], check=True, capture_output=True, text=True
    ).stdout.strip()
    if not re.fullmatch(r"v\d+\.\d+\.\d+.*", message):
        raise RuntimeError(
            f"kubeadm in {KUBE_BIN} says it is {message!r}; kubeadm init needs a version like v1.36.0"
        )
    return message


def versions() -> dict[str, str]:
    """Returns names and versions of the machine and its programs."""
    found = {"Kubernetes": kubernetes_version(), "Linux": os.uname().release}
    for name, command in {"containerd": "containerd --version", "runc": "runc --version"}.items():
        message = subprocess.run(command.split(), check=True, capture_output=True, text=True).stdout
        match = re.search(r"\d+\.\d+\.\d+\S*", message)
        found[name] = match[0] if match else "unknown"
    found["CNI plugins"] = _package("containernetworking-plugins")
    return found


def _package(name: str) -> str:
    command = ["dpkg-query", "-W", "-f", "${Version}", name]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
