"""Health checks of load balancers while an agent is replaced by the next one: none fails."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from ebpfproxy.datapath.abi.hooks import SOCKET_HOOKS
from ebpfproxy.datapath.kernel.roots import pin_folder
from ebpfproxy.datapath.programs.attach import attachments
from tests.faults import report
from tests.faults.faulted import HEALTH_PORT, Faulted
from tests.faults.ladders import start
from tests.faults.probes import Failed, Probe, Prober, Store
from tests.faults.steps import Fault, Step
from tests.lab import Agent
from tests.lab.waiting import until

pytestmark = pytest.mark.root


#: The first program that a start attaches.
_FIRST_ATTACHED = f"LINK_CREATE type {SOCKET_HOOKS[0].attach_type} "


@pytest.mark.faults
def test_healthz_says_503_until_programs_are_attached(faulted: Faulted) -> None:
    """Between the first programming and the attachment /healthz and /livez say 503, however long that takes."""
    faulted.a.cli("cleanup", check=False)
    reached, goes_on = threading.Event(), threading.Event()

    def choose(step: Step) -> Fault | None:
        if not step.name.startswith(_FIRST_ATTACHED):
            return None
        reached.set()
        return Fault(held=goes_on)

    agent, stepped = start(faulted, choose)
    try:
        assert reached.wait(120)
        agent.wait_log("programmed all Services")
        until(lambda: not faulted.differences(), "nothing is programmed")
        probes = [Probe(faulted.a.address, 10256, path) for path in ("/healthz", "/livez")]
        for _ in range(20):
            assert [faulted.outside.call(each.once) for each in probes] == ["status 503"] * 2
            time.sleep(0.05)
        assert not any(each.alive for each in attachments(pin_folder(faulted.a.bpf_root)))
    finally:
        goes_on.set()
    agent.wait_ready()
    until(lambda: not any(faulted.outside.call(each.once) for each in probes), "the agent is not healthy")
    faulted.wait_equal()
    agent.stop()
    stepped.join()


@contextmanager
def probed(faulted: Faulted, fault: str, kills: Sequence[float] = ()) -> Iterator[None]:
    """Asserts that no health check fails meanwhile.

    ``kills``: when the agent was killed. A check that it has accepted then ends with it, one of each address at most.
    """
    address = faulted.a.address
    until(lambda: not _failing(faulted), "the agent's health checks fail")
    prober = Prober(
        faulted.outside,
        [
            Probe(address, 10256, "/healthz"),
            Probe(address, 10256, "/livez"),
            Probe(address, HEALTH_PORT, "/"),
        ],
    )
    try:
        yield
    finally:
        found = prober.stop()
        failed = _left(found.failed, kills)
        report.add_probes(fault, found.made, len(failed))
    assert not failed, f"{len(failed)} of {found.made} failed: {failed[:10]}"
    assert found.made > 100


def _left(failed: Sequence[Failed], kills: Sequence[float]) -> list[Failed]:
    """Without those that had been accepted when the agent was killed."""
    accepted: dict[tuple[str, float], Failed] = {}
    for each in failed:
        killed = next((kill for kill in kills if kill > each.when), None)
        if killed is not None and each.is_disconnected:
            # The last one before the kill: a probe makes one after the other.
            accepted[each.path, killed] = each
    return [each for each in failed if each not in accepted.values()]


def _failing(faulted: Faulted) -> list[str]:
    checks = [Probe(faulted.a.address, 10256, "/healthz"), Probe(faulted.a.address, HEALTH_PORT, "/")]
    return [why for each in checks if (why := faulted.outside.call(each.once))]


def _ended(agent: Agent) -> bool:
    assert agent.process is not None
    return agent.process.poll() is not None


def test_agent_that_stands_by_takes_over_without_a_failed_health_check(faulted: Faulted) -> None:
    """A DaemonSet's rollout and rollback with an overlap (maxSurge): no health check and no connection fails."""
    first = faulted.agent("--standby").start()
    fault = "rollout: the next agent stands by, the old one is told to end"
    with faulted.under_load(fault), probed(faulted, fault):
        second = faulted.agent("--standby").start(wait=False)
        second.wait_log("waiting for the other agent to end")
        # Init containers of the next pod run beside the old agent as well.
        loaded = faulted.agent("--standby", "--init-only").start(wait=False)
        until(lambda: _ended(loaded), "--init-only does not end")
        time.sleep(0.3)
        assert not _ended(first)
        assert first.stop() == 0
        second.wait_ready()
        third = faulted.agent("--standby").start(wait=False)
        third.wait_log("waiting for the other agent to end")
        time.sleep(0.3)
        assert second.stop() == 0
        third.wait_ready()
        time.sleep(0.5)
    assert "another agent takes over" in first.text + second.text
    faulted.wait_equal()
    third.stop()


@pytest.mark.faults
def test_agent_that_stands_by_and_is_killed_changes_nothing(faulted: Faulted) -> None:
    """A pod that is replaced before it has taken over, by kill -9, leaves the old agent and its health checks alone."""
    first = faulted.agent("--standby").start()
    fault = "kill -9 of the agent that stands by"
    with faulted.under_load(fault), probed(faulted, fault):
        second = faulted.agent("--standby").start(wait=False)
        second.wait_log("waiting for the other agent to end")
        time.sleep(0.3)
        second.kill()
        # And by the signal of a kubelet that ends the pod.
        third = faulted.agent("--standby").start(wait=False)
        third.wait_log("waiting for the other agent to end")
        assert third.stop() == 0
    faulted.wait_equal()
    first.stop()


@pytest.mark.faults
def test_agent_that_stands_by_follows_one_that_is_killed(faulted: Faulted) -> None:
    """Where the old agent is killed instead, its sockets end with it; the next one makes its own."""
    first = faulted.agent("--standby").start()
    second = faulted.agent("--standby").start(wait=False)
    second.wait_log("waiting for the other agent to end")
    with faulted.under_load("kill -9 of the agent while another stands by"):
        first.kill()
        second.wait_ready()
    until(lambda: not _failing(faulted), "health checks fail")
    faulted.wait_equal()
    second.stop()


@pytest.mark.faults
def test_changed_configuration_fails_no_health_check(faulted: Faulted, tmp_path: Path) -> None:
    """When its configuration changes the agent starts anew in its process: no health check and no connection fails."""
    config = tmp_path / "config.yaml"
    document = {"apiVersion": "kubeproxy.config.k8s.io/v1alpha1", "kind": "KubeProxyConfiguration"}

    def write(**fields: object) -> None:
        beside = config.with_suffix(".new")
        beside.write_text(yaml.safe_dump({**document, **fields}))
        beside.rename(config)

    write()
    agent = faulted.agent("--config", str(config)).start()
    assert agent.process is not None
    fault = "the configuration changes"
    with faulted.under_load(fault), probed(faulted, fault):
        for n, mode in enumerate(("ipvs", "iptables"), 2):
            write(mode=mode)
            agent.wait_log("programs are attached", times=n)
            time.sleep(0.3)
    assert agent.text.count("the configuration has changed") == 2
    faulted.wait_equal()
    assert agent.stop() == 0


@pytest.mark.faults
def test_sockets_outlive_an_agent_that_systemd_restarts(faulted: Faulted, tmp_path: Path) -> None:
    """With systemd's store of descriptors no health check fails when the agent is killed and started again.

    The store speaks the protocol here; tests/deploy/test_unit.py has the real one.
    """
    agent = _Unit(faulted, tmp_path / "notify")
    agent.start()
    fault, kills = "kill -9 of the agent of a systemd unit", list[float]()
    with faulted.under_load(fault), probed(faulted, fault, kills):
        for _ in range(3):
            agent.process.kill()
            kills.append(time.time())
            agent.process.wait()
            time.sleep(0.3)
            agent.start()
            time.sleep(0.3)
    faulted.wait_equal()
    agent.process.terminate()
    agent.process.wait()


class _Unit:
    """An agent with a store of descriptors, which its next process inherits."""

    def __init__(self, faulted: Faulted, path: Path) -> None:
        self._faulted, self._store = faulted, Store(str(path))
        self.agent = faulted.agent()

    def start(self) -> None:
        kept = list(self._store.kept.values())
        code = (
            "import os, sys; fds = [os.dup2(n, 100 + i) for i, n in enumerate(map(int, sys.argv[1].split()))]; "
            "[os.dup2(n, 3 + i, inheritable=True) for i, n in enumerate(fds)]; "
            "os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=str(len(fds))); "
            "os.execv(sys.executable, [sys.executable, '-m', 'ebpfproxy', 'run', *sys.argv[2:]])"
        )
        node = self._faulted.a
        arguments = [*node.roots, "--hostname-override", node.name, "--master", self._faulted.url]
        logged = len(self.agent.text)
        with self.agent.log.open("ab") as log:
            self.process = node.popen(
                [sys.executable, "-c", code, " ".join(map(str, kept)), *arguments],
                join_cgroup=False,
                stdout=log,
                stderr=log,
                pass_fds=kept,
                env={**os.environ, **self._store.environment},
            )
        until(lambda: "programs are attached" in self.agent.text[logged:], "the agent is not ready")
