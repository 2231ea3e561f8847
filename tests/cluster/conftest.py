"""One cluster for all modules of a kind: kubeadm without kube-proxy, routed pods, two nodes with two networks each."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster import binaries, images
from tests.cluster.cluster import Cluster, own_mounts


@pytest.fixture(scope="session")
def _mounts() -> None:
    lacking = binaries.missing()
    if lacking:
        pytest.skip(f"KUBE_BIN ({binaries.KUBE_BIN}) has no {', '.join(lacking)}")
    own_mounts()


@pytest.fixture(scope="session")
def folder(_mounts: None) -> Iterator[Path]:
    """On the file system of the images, which are lent as hard links. Logs stay there where a test failed."""
    made = images.KEPT / f"run-{os.getpid()}"
    made.mkdir(parents=True)
    yield made
    shutil.rmtree(made, ignore_errors=True)


@pytest.fixture(scope="session")
def cluster(folder: Path) -> Iterator[Cluster]:
    """With nodes that are Ready and a DNS, and without any service proxy; a module installs what it is about."""
    with Cluster(folder / "routed") as made:
        yield made.up()
