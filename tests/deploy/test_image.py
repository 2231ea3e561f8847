"""The image that the Dockerfile makes: its size, and that it compiles and loads, as the DaemonSet runs it."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import ebpfproxy
from ebpfproxy.config.datapath import BPFFS
from ebpfproxy.datapath.kernel.roots import find_cgroup_root, pin_folder
from ebpfproxy.datapath.programs.detach import remove_everything
from tests.deploy import image, objects
from tests.deploy.test_container import Host, Kubelet, on
from tests.e2e.world import SERVICE_IPS, World
from tests.lab import Lab, clients
from tests.operator.migrate import rules
from tests.operator.migrate import world as migrate_world
from tests.operator.migrate.test_pod import runner

pytestmark = [pytest.mark.root, pytest.mark.image, pytest.mark.timeout(600)]

MOST_MEGABYTES = 400


@pytest.fixture(scope="module")
def built() -> Iterator[image.Image]:
    with tempfile.TemporaryDirectory(prefix="ebpfproxy-image-") as folder, image.built(Path(folder)) as made:
        yield made


@pytest.fixture
def cgroup() -> Iterator[Path]:
    """Makes one for the test: nothing else on this machine is translated."""
    folder = find_cgroup_root() / f"ebpfproxy-image-{os.getpid()}"
    folder.mkdir()
    yield folder
    folder.rmdir()


def in_container(
    made: image.Image, cgroup: Path, bpffs: Path | None, *command: str
) -> subprocess.CompletedProcess[str]:
    """Runs it in new mount, process and network namespaces, with a read-only root.

    Its only cgroup v2 mount is ``cgroup``, its only bpffs ``bpffs``; without one it has an empty /sys/fs/bpf.
    """
    script = """
        set -e
        root=$1 cgroup=$2 bpffs=$3; shift 3
        mount --bind -o ro "$root" "$root"; mount -o remount,ro,bind "$root"
        mount -t proc proc "$root/proc"
        mount --rbind /dev "$root/dev"
        mount -t tmpfs tmp "$root/tmp"
        mount -t sysfs sys "$root/sys"
        mount -t tmpfs cgroups "$root/sys/fs/cgroup"
        mkdir "$root/sys/fs/cgroup/unified"
        mount --bind "$cgroup" "$root/sys/fs/cgroup/unified"
        [ -z "$bpffs" ] || mount --bind "$bpffs" "$root/sys/fs/bpf"
        exec chroot "$root" env -i "PATH=/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin" "$@"
    """
    variables = [f"{name}={value}" for name, value in made.environment.items()]
    namespaces = ["unshare", "--mount", "--pid", "--fork", "--net", "--propagation", "private"]
    arguments = [str(made.root), str(cgroup), str(bpffs or ""), *variables, *command]
    return subprocess.run(
        [*namespaces, "sh", "-c", script, "sh", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_it_is_small_enough(built: image.Image, record_property: Callable[[str, object], None]) -> None:
    size = image.megabytes(built.root)
    record_property("megabytes", round(size))
    print(f"the image's root has {size:.0f} MB")
    assert size < MOST_MEGABYTES


def test_it_has_what_a_migration_calls(built: image.Image) -> None:
    """Both backends of iptables; nft prints protocols by the names of /etc/protocols."""
    for family in ("iptables", "ip6tables"):
        for backend in ("legacy", "nft"):
            for program in ("save", "restore"):
                image.run(built.root, [f"{family}-{backend}-{program}", "--version"])
    image.run(built.root, ["nft", "--version"])
    assert (built.root / "etc/protocols").exists()


def test_it_has_no_compiler_nor_package_lists_and_nothing_of_this_machine(built: image.Image) -> None:
    for name in ("gcc", "cc", "pip", "pip3", "clang"):
        assert not list(built.root.glob(f"usr/**/bin/{name}")), name
    for folder in ("var/lib/apt/lists", "usr/share/doc", "mnt", "src", "wheels", "root"):
        found = built.root / folder
        assert not found.exists() or not [path for path in found.iterdir() if not path.name.startswith(".")]
    assert not (built.root / "etc/pip.conf").exists()
    assert not (built.root / "root/.config").exists()


def test_it_starts_the_agent(built: image.Image) -> None:
    assert built.entrypoint == ["ebpfproxy"]
    assert built.command == ["run"]
    for name in ("load", "ebpfproxy"):
        assert objects.container(objects.base(), name)["command"] == [*built.entrypoint, *built.command]
    said = image.run(built.root, [*built.entrypoint, "--version"], built.environment).stdout
    assert ebpfproxy.__version__ in said


def test_all_commands_can_be_imported(built: image.Image) -> None:
    """What the Dockerfile leaves out is not missed."""
    script = (
        "import importlib, pkgutil, ebpfproxy\n"
        "for each in pkgutil.walk_packages(ebpfproxy.__path__, 'ebpfproxy.'):\n"
        "    if not each.name.endswith('__main__'): importlib.import_module(each.name)\n"
        "from kubernetes import client\n"
        "client.CoreV1Api, client.AppsV1Api, client.RbacAuthorizationV1Api\n"
    )
    image.run(built.root, ["python3", "-c", script], built.environment)


def test_the_base_has_what_the_first_init_container_calls(built: image.Image) -> None:
    image.run(built.root, ["sh", "-c", "command -v grep && command -v nsenter"])


@pytest.mark.parametrize("mounted", [True, False], ids=["with a bpffs", "where none is mounted"])
def test_it_compiles_and_loads(built: image.Image, cgroup: Path, mounted: bool) -> None:
    """cgroup v1 and v2 mixed, no kernel headers; pins are where the machine's bpffs is, if it has one."""
    place = BPFFS / cgroup.name
    place.mkdir()
    try:
        commands = "ebpfproxy run --init-only --manifests /tmp && ebpfproxy status && ebpfproxy backend list"
        done = in_container(built, cgroup, place if mounted else None, "sh", "-c", commands)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "never finished" in done.stdout
        assert ("mounted a bpffs" in done.stdout + done.stderr) is not mounted
        found = list(place.glob("ebpfproxy/*/progs-*/connect4"))
        assert len(found) == mounted
    finally:
        remove_everything(pin_folder(place))
        place.rmdir()


def test_the_daemon_sets_containers_run_from_it(built: image.Image, tmp_path: Path) -> None:
    with Lab() as lab:
        world = World(lab)
        kubelet = Kubelet(world, built.root)
        host = Host(tmp_path)
        try:
            done = host.run_container(kubelet.container("prepare", volumes=on(host), manifests=False))
            assert done.returncode == 0, done.stderr
            assert host.has_bpffs
        finally:
            host.end()
        done = kubelet.container("load").run()
        assert done.returncode == 0, done.stdout + done.stderr
        agent = kubelet.container("ebpfproxy")
        with kubelet.running(agent):
            answers = world.client.call(clients.spread_tcp, SERVICE_IPS["v4"], 80, clients.ENOUGH)
            assert set(answers) == {"w1", "w2"}
            assert json.loads(agent.execute("ebpfproxy", "status", "-o", "json"))["agent_running"]
        world.a.cli("cleanup")


def test_a_migrations_pods_run_from_it(built: image.Image) -> None:
    """They read and remove the rules that this machine's tools have made, as on a node."""
    with Lab() as lab:
        world = migrate_world.World(lab)
        run = runner(world, built.root)
        for mode in rules.MODES:
            world.kube_proxy(mode)
        agent = world.agent().start()
        world.wait_frontends(20)
        code, said = run("plan", "--brief", "-o", "json")
        assert code == 0, said
        assert json.loads(said)["kube_proxy_frontends"] == 20
        code, said = run("run", "--stopped")
        assert code == 0, said
        for removed in ("iptables-legacy", "iptables-nft", "ip6tables-legacy", "ip6tables-nft"):
            assert f"from {removed}, table nat" in said
        assert "removed nftables table ip6 kube-proxy" in said
        agent.stop()
        world.kube_proxy("nftables")
        code, said = run("rollback")
        assert code == 0, said
        assert "detached connect4" in said
