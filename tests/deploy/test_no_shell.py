"""No container of any object that is deployed runs a shell, so that an image need not have one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from ebpfproxy.operator.api import Object
from ebpfproxy.operator.image import Image
from ebpfproxy.operator.install import configuration, node_cleanup
from ebpfproxy.operator.install.render import Settings, base_configuration, containers, render
from ebpfproxy.operator.migrate.cluster import work_pod
from ebpfproxy.operator.test import objects as objects_of_test
from tests.deploy import objects
from tests.deploy.chart import render_chart

#: The image's entrypoint, and the interpreter that runs it.
PROGRAMS = {"ebpfproxy", "python3"}
SHELLS = {"sh", "ash", "bash", "busybox", "dash", "env", "ksh", "perl", "rbash", "zsh"}
IMAGE = "registry.example/ebpfproxy:0.1.0"


def deployed() -> Iterator[tuple[str, Object]]:
    """Yields each object with a pod, and who makes it."""
    installed = render(
        Settings(
            image=IMAGE, namespace="kube-system", configuration=configuration.of_base(base_configuration())
        )
    )
    chart = render_chart({"overlap": True, "kubeconfig": "/k", "monitoring": {"enabled": True}})
    for maker, found in (
        ("deploy/base", objects.base().values()),
        ("deploy/chart", render_chart().values()),
        ("deploy/chart with values", chart.values()),
        ("ebpfproxy install", installed),
    ):
        yield from ((maker, each) for each in found if each["kind"] == "DaemonSet")
    daemon_set = objects.base()["DaemonSet", "ebpfproxy"]
    yield "ebpfproxy uninstall", node_cleanup.cleanup(daemon_set, IMAGE)
    image = Image(name=IMAGE)
    yield "ebpfproxy migrate", work_pod.manifest("node-a", "kube-system", image, ["run"], seconds=60)
    for role in (
        objects_of_test.SERVER,
        objects_of_test.CLIENT,
        objects_of_test.HOST,
        objects_of_test.LOAD,
    ):
        yield "ebpfproxy test", objects_of_test.pod(("test", "pod"), role, "node-a", image, {})


def commands(container: Object) -> Iterator[list[str]]:
    """Yields what a container executes: its process, and those of its probes and hooks."""
    yield [*container["command"], *container.get("args", ())]
    hooks = container.get("lifecycle", {})
    probes = [container.get(f"{name}Probe", {}) for name in ("startup", "liveness", "readiness")]
    for each in (*probes, *hooks.values()):
        if "exec" in each:
            yield each["exec"]["command"]


@pytest.mark.parametrize(("maker", "found"), [pytest.param(*each, id=each[0]) for each in deployed()])
def test_containers_execute_no_shell(maker: str, found: Object) -> None:
    """The only programs are the agent's own, which are in every image."""
    spec = found["spec"]["template"]["spec"] if found["kind"] == "DaemonSet" else found["spec"]
    each_command = [command for container in containers(spec) for command in commands(container)]
    assert each_command, maker
    for command in each_command:
        assert command[0] in PROGRAMS, command
        words = {Path(word).name for argument in command for word in argument.split()}
        assert not words & SHELLS, command
