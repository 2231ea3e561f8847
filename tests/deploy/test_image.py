"""The images of the Dockerfile: their size and content, and loading and running as in the DaemonSet."""

from __future__ import annotations

import json
import os
import platform
import socket
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
from tests.deploy.kubelet import Kubelet
from tests.deploy.test_container import Host, on
from tests.deploy.test_no_shell import SHELLS
from tests.e2e.two_node_cluster import SERVICE_IPS, TwoNodeCluster
from tests.lab import Lab, clients
from tests.lab.waiting import until
from tests.operator.migrate import rules
from tests.operator.migrate.kube_proxy_cluster import KubeProxyCluster
from tests.operator.migrate.test_pod import runner
from tests.otlp.receiver import Receiver

pytestmark = [pytest.mark.root, pytest.mark.image, pytest.mark.timeout(600)]

MOST_MEGABYTES = {"full": 400, "slim": 150}
#: An empty folder is mounted over it, as if the image were built for another architecture.
BYTECODE = "/usr/local/lib/python3.11/dist-packages/ebpfproxy/bytecode"
NO_BYTECODE = f"mount -t tmpfs none {BYTECODE} && "

#: Modules that need an extra.
OF_EXTRAS = ("ebpfproxy.ui.", "ebpfproxy.otlp.", "ebpfproxy.trace.decision_sender")


@pytest.fixture(scope="module")
def stages() -> Iterator[dict[str, image.Image]]:
    with tempfile.TemporaryDirectory(prefix="ebpfproxy-image-") as folder, image.built(Path(folder)) as made:
        yield made


@pytest.fixture(params=MOST_MEGABYTES)
def target(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def built(stages: dict[str, image.Image], target: str) -> image.Image:
    return stages[target]


@pytest.fixture
def cgroup() -> Iterator[Path]:
    """Creates a cgroup for the test, so that nothing else on this machine is translated."""
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


def test_image_size_is_within_its_limit(
    built: image.Image, target: str, record_property: Callable[[str, object], None]
) -> None:
    size = image.megabytes(built.root)
    record_property(f"megabytes, {target}", round(size))
    print(f"the root of {target} has {size:.0f} MB")
    assert size < MOST_MEGABYTES[target]


def test_only_target_full_has_llvm(built: image.Image, target: str) -> None:
    found = [*built.root.glob("usr/lib/**/libLLVM*"), *built.root.glob("usr/lib/python3/dist-packages/bcc")]
    assert bool(found) is (target == "full")


def test_image_has_the_programs_that_a_migration_calls(built: image.Image) -> None:
    """These are both backends of iptables, and /etc/protocols, whose names nft prints."""
    for family in ("iptables", "ip6tables"):
        for backend in ("legacy", "nft"):
            for program in ("save", "restore"):
                image.run(built.root, [f"{family}-{backend}-{program}", "--version"])
    image.run(built.root, ["nft", "--version"])
    assert (built.root / "etc/protocols").exists()


def test_image_has_no_compiler_package_lists_or_files_of_this_machine(built: image.Image) -> None:
    for name in ("gcc", "cc", "pip", "pip3", "clang"):
        assert not list(built.root.glob(f"usr/**/bin/{name}")), name
    for folder in ("var/lib/apt/lists", "usr/share/doc", "mnt", "src", "wheels", "root"):
        found = built.root / folder
        assert not found.exists() or not [path for path in found.iterdir() if not path.name.startswith(".")]
    assert not (built.root / "etc/pip.conf").exists()
    assert not (built.root / "root/.config").exists()


def test_entrypoint_of_the_image_is_the_agent(built: image.Image) -> None:
    assert built.entrypoint == ["ebpfproxy"]
    assert built.command == ["run"]
    for name in ("load", "ebpfproxy"):
        assert objects.container(objects.base(), name)["command"] == [*built.entrypoint, *built.command]
    output = image.run(built.root, [*built.entrypoint, "--version"], built.environment).stdout
    assert ebpfproxy.__version__ in output


def test_all_commands_can_be_imported(built: image.Image, target: str) -> None:
    """No module needs a file that the Dockerfile leaves out; those of extras are for target full alone."""
    script = (
        "import importlib, pkgutil, ebpfproxy\n"
        f"extras = {target == 'full'}\n"
        "for each in pkgutil.walk_packages(ebpfproxy.__path__, 'ebpfproxy.'):\n"
        f"    if each.name.startswith({OF_EXTRAS}) and not extras: continue\n"
        "    if not each.name.endswith('__main__'): importlib.import_module(each.name)\n"
        "from kubernetes import client\n"
        "client.CoreV1Api, client.AppsV1Api, client.RbacAuthorizationV1Api\n"
    )
    image.run(built.root, ["python3", "-c", script], built.environment)


def test_only_target_full_has_the_page(built: image.Image, target: str) -> None:
    """The other one says in one line what it lacks."""
    script = "ebpfproxy ui 2>&1 || true"
    said = image.run(built.root, ["sh", "-c", script], built.environment).stdout
    missing = "Error: ui needs starlette and uvicorn: pip install 'ebpfproxy[ui]'\n"
    assert said.startswith("Error: nothing is pinned below") if target == "full" else said == missing


def test_only_target_full_has_opentelemetry(built: image.Image, target: str) -> None:
    packages = built.root / "usr/local/lib/python3.11/dist-packages"
    assert any(packages.glob("opentelemetry/sdk/*/__pycache__/*.pyc")) is (target == "full")


def test_target_no_shell_has_no_shell_and_executes_no_script_of_one(stages: dict[str, image.Image]) -> None:
    """What it executes beside Python, for a migration, are binaries."""
    root = stages["no-shell"].root
    there = {path.name for folder in ("bin", "sbin", "usr/local/bin") for path in (root / folder).iterdir()}
    assert not there & (SHELLS - {"env"})
    called = [
        f"{family}-{backend}-{program}"
        for family in ("iptables", "ip6tables")
        for backend in ("legacy", "nft")
        for program in ("save", "restore")
    ]
    begins = "import shutil, sys; print(*(open(shutil.which(name), 'rb').read(4) for name in sys.argv[1:]))"
    words = image.run(root, ["python3", "-c", begins, "nft", *called]).stdout.split()
    assert words == [r"b'\x7fELF'"] * (1 + len(called))


@pytest.mark.parametrize("mounted", [True, False], ids=["with a bpffs", "where none is mounted"])
@pytest.mark.parametrize("prelude", ["", NO_BYTECODE], ids=["bytecode", "no bytecode"])
def test_image_loads_programs(
    built: image.Image, target: str, cgroup: Path, mounted: bool, prelude: str
) -> None:
    """cgroup v1 and v2 are mixed, there are no kernel headers, and pins are in the machine's bpffs, if any."""
    place = BPFFS / cgroup.name
    place.mkdir()
    try:
        commands = "ebpfproxy run --init-only --manifests /tmp && ebpfproxy status && ebpfproxy backend list"
        done = in_container(built, cgroup, place if mounted else None, "sh", "-c", prelude + commands)
        if prelude and target == "slim":
            assert done.returncode == 1
            (error,) = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
            assert f"no bytecode of sock.c for {platform.machine()} in {BYTECODE} or " in error
            assert "no compiler to make it: No module named 'bcc'. Install" in error
            return
        assert done.returncode == 0, done.stdout + done.stderr
        assert "never finished" in done.stdout
        assert ("mounted a bpffs" in done.stdout + done.stderr) is not mounted
        found = list(place.glob("ebpfproxy/*/progs-*/connect4"))
        assert len(found) == mounted
    finally:
        remove_everything(pin_folder(place))
        place.rmdir()


@pytest.mark.parametrize("target", [*MOST_MEGABYTES, "no-shell"])
def test_containers_of_the_daemon_set_run_from_the_image(
    built: image.Image, target: str, tmp_path: Path
) -> None:
    """With a collector, to which only target full can send; the other one does everything else."""
    with Lab() as lab:
        cluster = TwoNodeCluster(lab)
        kubelet = Kubelet(cluster, built.root)
        host = Host(tmp_path)
        try:
            done = host.run_container(kubelet.container("prepare", volumes=on(host), manifests=False))
            assert done.returncode == 0, done.stderr
            assert host.has_bpffs
        finally:
            host.end()
        done = kubelet.container("load").run()
        assert done.returncode == 0, done.stdout + done.stderr
        collector = Receiver(cluster.a.open(_listener)[0])
        agent = kubelet.container("ebpfproxy", arguments=["--otlp-endpoint", collector.url])
        with kubelet.running(agent):
            answers = cluster.client.call(clients.spread_tcp, SERVICE_IPS["v4"], 80, clients.ENOUGH)
            assert set(answers) == {"w1", "w2"}
            if target == "full":
                until(lambda: collector.metrics and "programs are attached" in collector.bodies())
            found = json.loads(agent.execute("ebpfproxy", "status", "-o", "json"))
            assert found["agent_running"]
            missing = "otlpEndpoint needs OpenTelemetry, which the image's target full has"
            assert found["agent"]["telemetry"]["endpoint"] == collector.url
            assert found["agent"]["telemetry"]["error"].startswith(missing) is (target != "full")
        assert bool(collector.asked) is (target == "full")
        collector.close()
        cluster.a.cli("cleanup")


def _listener() -> tuple[socket.socket, None]:
    return socket.create_server(("127.0.0.1", 0)), None


@pytest.mark.parametrize("target", [*MOST_MEGABYTES, "no-shell"])
def test_pods_of_a_migration_run_from_the_image(built: image.Image) -> None:
    """They read and remove rules that this machine's tools have added, as on a node."""
    with Lab() as lab:
        cluster = KubeProxyCluster(lab)
        run = runner(cluster, built.root)
        for mode in rules.MODES:
            cluster.kube_proxy(mode)
        agent = cluster.agent().start()
        cluster.wait_frontends(20)
        code, output = run("plan", "--brief", "-o", "json")
        assert code == 0, output
        assert json.loads(output)["kube_proxy_frontends"] == 20
        code, output = run("run", "--stopped")
        assert code == 0, output
        for removed in ("iptables-legacy", "iptables-nft", "ip6tables-legacy", "ip6tables-nft"):
            assert f"from {removed}, table nat" in output
        assert "removed nftables table ip6 kube-proxy" in output
        agent.stop()
        cluster.kube_proxy("nftables")
        code, output = run("rollback")
        assert code == 0, output
        assert "detached connect4" in output
