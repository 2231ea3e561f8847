"""The systemd unit, run by a real systemd with all of its sandbox."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from ebpfproxy.datapath.kernel.roots import find_cgroup_root
from tests.deploy.kubelet import until
from tests.deploy.objects import DEPLOY, base, container
from tests.deploy.runtime import install
from tests.e2e.two_node_cluster import NODE_PORT, SERVICE_IPS, TwoNodeCluster
from tests.faults.probes import Probe, Prober
from tests.lab import Lab, clients
from tests.lab.holders import Holder

UNIT = DEPLOY / "ebpfproxy.service"
SYSTEMD = "/lib/systemd/systemd"
INSTALLED = "/opt/ebpfproxy/bin/ebpfproxy"
HERE = f"{Path(sys.executable).parent}/ebpfproxy"
IP = SERVICE_IPS["v4"]


class Manager:
    """A systemd of the test: root's user manager, which may do what the system's does.

    It finds a host that systemd has booted, and has its own cgroups.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.units = folder / "config/systemd/user"
        self.units.mkdir(parents=True)
        runtime = folder / "runtime"
        runtime.mkdir(mode=0o700)
        self._environment = {
            **os.environ,
            "XDG_RUNTIME_DIR": str(runtime),
            "XDG_CONFIG_HOME": str(folder / "config"),
        }
        unified = find_cgroup_root()
        self._cgroups = [unified / folder.parent.name, *self._v1(unified, folder.parent.name)]

    @staticmethod
    def _v1(unified: Path, name: str) -> list[Path]:
        beside = unified.parent / "systemd"
        return [beside / name] if (beside / "cgroup.procs").exists() else []

    @contextmanager
    def running(self) -> Iterator[None]:
        script = """
            set -e
            mkdir "$1/netns"; mount --rbind /run/netns "$1/netns"
            mount -t tmpfs run /run; mkdir -p /run/systemd/system /run/netns
            mount --rbind "$1/netns" /run/netns; shift
            # What is mounted over files that a unit may not see; the system's manager makes these.
            hidden=/run/systemd/inaccessible
            mkdir -p $hidden/dir; touch $hidden/reg; mkfifo $hidden/fifo; mknod $hidden/chr c 0 0
            chmod -R 0 $hidden
            for group; do mkdir -p "$group/manager"; echo 0 >"$group/manager/cgroup.procs"; done
            exec "$SYSTEMD" --user --unit=basic.target --log-target=console
        """
        command = [
            "unshare",
            "--mount",
            # On a host the unit sees namespaces that are created later, as /run/netns is shared.
            "--propagation",
            "slave",
            "sh",
            "-c",
            script,
            "sh",
            str(self.folder),
        ]
        with (self.folder / "systemd.log").open("wb") as log:
            process = subprocess.Popen(
                [*command, *map(str, self._cgroups)],
                env={**self._environment, "SYSTEMD": SYSTEMD},
                stdout=log,
                stderr=log,
            )
        self._pid = process.pid
        try:
            until((self.folder / "runtime/systemd/private").exists, 60)
            yield
        finally:
            process.terminate()
            process.wait(20)
            for group in self._cgroups:
                for each in sorted([group, *group.rglob("*")], reverse=True):
                    if each.is_dir():
                        each.rmdir()

    def call(self, *arguments: str) -> str:
        done = self._systemctl(*arguments)
        if done.returncode:
            why = self._systemctl("status", "--no-pager", UNIT.name).stdout
            raise AssertionError(f"{done.stderr}{why}{self.log}")
        return done.stdout

    def _systemctl(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["nsenter", f"--mount=/proc/{self._pid}/ns/mnt", "systemctl", "--user", *arguments],
            env=self._environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    @property
    def log(self) -> str:
        path = self.folder / "agent.log"
        return path.read_text() if path.exists() else ""


def settings() -> dict[str, str]:
    return dict(line.split("=", 1) for line in UNIT.read_text().splitlines() if re.match(r"\w+=", line))


def test_systemd_knows_all_settings_of_the_unit(tmp_path: Path) -> None:
    install("systemd", "systemd-analyze")
    copy = tmp_path / UNIT.name
    # It checks that the program exists.
    copy.write_text(UNIT.read_text().replace(INSTALLED, HERE))
    done = subprocess.run(
        ["systemd-analyze", "verify", str(copy)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_unit_has_the_capabilities_of_the_daemon_set_and_sys_ptrace() -> None:
    of_pods = {
        f"CAP_{each}" for each in container(base(), "ebpfproxy")["securityContext"]["capabilities"]["add"]
    }
    assert set(settings()["CapabilityBoundingSet"].split()) == of_pods | {"CAP_SYS_PTRACE"}


@pytest.mark.root
def test_network_namespace_of_another_users_process_needs_sys_ptrace() -> None:
    """The DaemonSet's containers see no such process; they find the namespaces of pods in /run/netns."""
    user = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    process = subprocess.Popen(
        ["unshare", "--net", *user, "sh", "-c", "echo; exec sleep 60"], stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.readline()
    namespace = Path(f"/proc/{process.pid}/ns/net").stat().st_ino
    script = (
        "from ebpfproxy.netlink.namespaces import namespaces; print(*(p.stat().st_ino for p in namespaces()))"
    )
    command = [sys.executable, "-c", script]
    for drop, is_seen in ((None, True), ("cap_sys_ptrace", False)):
        dropped = ["capsh", f"--drop={drop}", "--shell=/usr/bin/env", "--"] if drop else []
        done = subprocess.run(
            [*dropped, *command], capture_output=True, text=True, check=True, cwd=DEPLOY.parent
        )
        assert (str(namespace) in done.stdout.split()) is is_seen
    process.kill()
    process.wait()


@pytest.mark.root
@pytest.mark.systemd
def test_the_agent_works_in_its_sandbox() -> None:
    install("systemd", "systemd-analyze")
    with Lab() as lab:
        cluster = TwoNodeCluster(lab)
        lab.outside  # noqa: B018 - the property creates it
        folder = lab.folder / "systemd"
        manager = Manager(folder)
        roots = " ".join(
            [*cluster.a.roots, "--manifests", str(cluster.manifests), "--hostname-override", "node-a"]
        )
        (folder / "config.yaml").write_text(
            "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n"
        )
        text = UNIT.read_text().replace(INSTALLED, HERE).replace("/etc/ebpfproxy", str(folder))
        text = re.sub(r"(?m)^(ExecStart\w*=.*)$", rf"\1 {roots}", text)
        (manager.units / UNIT.name).write_text(text)
        drop_in = manager.units / f"{UNIT.name}.d"
        drop_in.mkdir()
        (drop_in / "lab.conf").write_text(
            f"[Service]\nNetworkNamespacePath=/run/netns/{cluster.a.netns}\n"
            # PrivateTmp hides files below /tmp.
            f"BindReadOnlyPaths={lab.folder} {DEPLOY.parent}\n"
            f"StandardOutput=append:{folder}/agent.log\nStandardError=inherit\n"
        )
        with manager.running():
            manager.call("start", UNIT.name)
            until(lambda: "programs are attached" in manager.log, 120)
            assert set(cluster.client.call(clients.spread_tcp, IP, 80, clients.ENOUGH)) == {"w1", "w2"}, (
                manager.log
            )
            outside = lab.outside.call(clients.spread_tcp, cluster.a.address, NODE_PORT, clients.ENOUGH)
            assert set(outside) == {"w1", "w2"}
            # A pod that is newer than the unit's mount namespace is reached as well.
            pods = (cluster.client, cluster.a.pod("late"))
            holders = [Holder(pod, [("udp", "udp", IP, 53, 20)]) for pod in pods]
            for holder in holders:
                holder.wait()
            cluster.write_web(cluster.w2)
            stale = sum(
                n for holder in holders for name, n in holder.connected.items() if cluster.w1.address in name
            )
            assert stale
            until(lambda: f"UDP={stale}" in manager.log, 10)
            assert f"UDP={stale}" in manager.log
            assert "setns" not in manager.log

            shown = manager.call("show", UNIT.name, "-p", "MainPID,NoNewPrivileges,Result")
            pid = int(dict(line.split("=") for line in shown.split())["MainPID"])
            status = Path(f"/proc/{pid}/status").read_text()
            assert "NoNewPrivs:\t1" in status
            assert "Seccomp:\t2" in status
            held = re.search(r"CapEff:\t(\w+)", status)
            assert held is not None
            decoded = subprocess.run(
                ["capsh", f"--decode={held[1]}"], capture_output=True, text=True, check=True
            )
            wanted = settings()["CapabilityBoundingSet"].lower().split()
            assert set(decoded.stdout.strip().partition("=")[2].split(",")) == set(wanted)
            inside = ["nsenter", f"--mount=/proc/{pid}/ns/mnt"]
            touched = subprocess.run(
                [*inside, "touch", "/usr/x"], capture_output=True, text=True, check=False
            )
            assert "Read-only" in touched.stderr
            look = [*inside, "stat", "-fc%T", *(f"/run/netns/{pod.netns}" for pod in pods)]
            kinds = subprocess.run(look, capture_output=True, text=True, check=True).stdout.split()
            assert kinds == ["nsfs", "nsfs"], "a name that is not mounted is a file without permissions"

            # Health checks wait in the sockets, which systemd keeps; RestartSec is less than a check's patience.
            probe = Probe(cluster.a.address, 10256, "/livez")
            prober = Prober(lab.outside, [probe])

            def has_started(times: int) -> bool:
                return manager.log.count("programs are attached") == times

            starts = manager.log.count("programs are attached")
            for more, command in enumerate((["restart"], ["kill", "--signal=KILL"]), 1):
                manager.call(*command, UNIT.name)
                until(partial(has_started, starts + more), 60)
                # Those beside may all have waited for the start.
                assert not any(lab.outside.call(probe.once) for _ in range(20))
            probed = prober.stop()
            assert (probed.failed, probed.made > 0) == ([], True)

            manager.call("stop", UNIT.name)
            assert "stopped, traffic goes on" in manager.log
        assert set(cluster.client.call(clients.spread_tcp, IP, 80, 10)) == {"w2"}
        assert json.loads(cluster.a.cli("status", "-o", "json"))["agent_running"] is False
        cluster.a.cli("cleanup")
