"""A kubelet's part: the DaemonSet's containers on a node of the lab."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ebpfproxy.datapath.abi.hooks import Module
from ebpfproxy.datapath.programs import bytecode, loader
from tests.deploy import objects, runtime
from tests.deploy.runtime import Container
from tests.e2e.two_node_cluster import TwoNodeCluster
from tests.lab.waiting import READY_SECONDS

OBJECTS = objects.base()


def cache_without(module: Module, folder: Path) -> tuple[Path, Path]:
    """A copy of the cache in which one source's programs are lacking, so that the compiler runs, and where they will be.

    All of them take it a quarter of a minute, and too long in an emulator.
    """
    cache = folder / "cache"
    shutil.copytree(bytecode.CACHE, cache)
    lacking = cache / loader.recipe(loader.source_folder(), module).digest()
    lacking.unlink()
    return cache, lacking


class Kubelet:
    """Starts the pod's containers on a lab node, whose bpffs folder and cgroup stand for the host's."""

    def __init__(self, cluster: TwoNodeCluster, image: Path | None = None) -> None:
        """``image``: the root of the image, by default this machine's."""
        self._image = image
        runtime.install("runc", "runc")
        self.cluster = cluster
        self.folder = cluster.lab.folder
        self._config = runtime.write_config_map(OBJECTS, self.folder / "config")
        self._count = 0

    def container(
        self,
        name: str,
        *,
        capabilities: Iterable[str] | None = None,
        seccomp: bool | Path = True,
        app_armor: str = "",
        volumes: dict[str, Path] | None = None,
        manifests: bool = True,
        api: int | None = None,
        account: Path | None = None,
        arguments: Iterable[str] = (),
    ) -> Container:
        """``api``: a port of the node, named by the ConfigMap; ``account``: the service account's volume."""
        self._count += 1
        folder = self.folder / f"container-{self._count}"
        folder.mkdir()
        self.cluster.a.bpf_root.mkdir(parents=True, exist_ok=True)
        places = {
            "config": self._config,
            "bpffs": self.cluster.a.bpf_root,
            "cgroup": self.cluster.a.cgroup,
            "netns": Path("/run/netns"),
            "cni-results": self.cluster.a.cni_results,
            "sysctl": Path("/proc/sys/net"),
            "cache": bytecode.CACHE,
            **(volumes or {}),
        }
        control_plane = {}
        if api is not None:
            control_plane = {"KUBERNETES_SERVICE_HOST": "127.0.0.1", "KUBERNETES_SERVICE_PORT": str(api)}
        return Container(
            OBJECTS,
            name,
            folder,
            account=account,
            image=self._image,
            volumes=places,
            variables={"NODE_NAME": "node-a", **control_plane},
            network=self.cluster.a.netns,
            arguments=[*(["--manifests", str(self.cluster.manifests)] if manifests else []), *arguments],
            mounts=[self.cluster.manifests],
            capabilities=capabilities,
            seccomp=seccomp,
            app_armor=app_armor,
        )

    @contextmanager
    def running(self, container: Container, ready: str = "programs are attached") -> Iterator[Path]:
        """Yields its log; stops it by SIGTERM as a rolling update does, and expects exit code 0."""
        log = self.folder / f"{container.id}.log"
        with log.open("wb") as out:
            process = subprocess.Popen(container.command, stdout=out, stderr=out)
        try:
            until(lambda: ready in log.read_text() or process.poll() is not None, READY_SECONDS)
            assert process.poll() is None, log.read_text()
            yield log
            container.signal("TERM")
            assert process.wait(READY_SECONDS) == 0
        finally:
            container.remove()
            process.wait(10)


def until(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
