"""The API server is gone, answers wrongly, slowly or too much, or takes no token any more."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.faults.faulted import KEEPS_CONNECTIONS, Faulted
from tests.lab import Agent, Lab
from tests.lab.waiting import until

pytestmark = [pytest.mark.root, pytest.mark.faults, pytest.mark.timeout(900)]

#: For so long the API server is gone, and endpoints change.
_LONG_SECONDS = 600
#: Between two of a thread of the load meanwhile: what is lost is counted in hundreds of thousands all the same.
_PAUSE = 0.05
#: Two watches without a byte (kube.watch.reflector.Timing), and the time for a list.
_SILENT_SECONDS = 360


@pytest.fixture(scope="module")
def agent(faulted: Faulted) -> Iterator[Agent]:
    made = faulted.agent().start()
    yield made
    made.stop()


def change_meanwhile(faulted: Faulted) -> None:
    """Some changes, of which all end with an endpoint that serves."""
    faulted.put_endpoints("web", "w1")
    faulted.put_endpoints("other", "x2", "x1")
    faulted.put_endpoints("web", "w2", "w1")


@pytest.mark.timeout(1800)
def test_api_server_that_is_gone_for_long(faulted: Faulted, agent: Agent) -> None:
    """The API server answers nothing for ten minutes; the agent is started anew meanwhile; then all is as it says."""
    with faulted.under_load("API server gone for 10 minutes, and the agent started anew", pause=_PAUSE):
        faulted.control("fault", kind="close", times=100_000)
        faulted.control("drop")
        agent.wait_log("watch is failing")
        time.sleep(_LONG_SECONDS / 2)
        agent.kill()
        agent.start(wait=False)
        time.sleep(_LONG_SECONDS / 2)
        change_meanwhile(faulted)
        faulted.control("heal")
        # Maps may be equal before it has heard of anything, and until then it answers no command.
        agent.wait_ready()
        faulted.wait_equal()


@pytest.mark.parametrize(
    "kind",
    ["close", "cut", "garbage", "expire", "half", "html", "slow", "hang", "401", "403", "429", "500", "504"],
)
def test_api_server_that_answers_wrongly(faulted: Faulted, agent: Agent, kind: str) -> None:
    """Lists and watches that are cut off, garbled, refused, slow, or expired (410), while endpoints change."""
    more = {"retry_after": 1} if kind == "429" else {}
    with faulted.under_load(f"API server: {kind}"):
        for _ in range(3):
            faulted.control("fault", kind=kind, times=2, resource="endpointslices", **more)
            faulted.control("fault", kind=kind, times=1, resource="services", **more)
            if kind not in ("cut", "garbage", "expire"):
                faulted.control("drop")
            change_meanwhile(faulted)
            time.sleep(0.3)
        faulted.control("heal")
        faulted.wait_equal()


def test_api_server_that_has_forgotten_its_history(faulted: Faulted, agent: Agent) -> None:
    """A compaction while all watches are broken: 410 for all of them at once, and all is listed again."""
    with faulted.under_load("API server: 410 for all watches"):
        for _ in range(3):
            faulted.control("fault", kind="close", times=8)
            faulted.control("drop")
            change_meanwhile(faulted)
            faulted.control("compact")
            faulted.control("heal")
            faulted.wait_equal()


def test_api_server_that_is_restored_from_a_backup(faulted: Faulted, agent: Agent) -> None:
    """The API server comes back with an older resourceVersion: watches hear nothing, then all is listed again.

    A watch from a version that is still to come is no error (as with a real server), and has neither events nor
    bookmarks. So the agent lists again after two silent watches, of 150 s each.
    """
    version = faulted.put_further() - 1
    for _ in range(30):
        change_meanwhile(faulted)
    faulted.wait_equal()
    with faulted.under_load("API server restored from a backup"):
        faulted.control("rewind", version=version)
        faulted.control("drop")
        change_meanwhile(faulted)
        time.sleep(5)
    faulted.wait_equal(_SILENT_SECONDS, every=5)
    with faulted.under_load("API server restored from a backup"):
        change_meanwhile(faulted)
        faulted.wait_equal()


@pytest.mark.timeout(1800)
def test_thousand_changes_a_second(faulted: Faulted, agent: Agent) -> None:
    """1,000 endpoint changes a second for ten minutes, beside the Services under load; at its end nothing is behind."""
    with faulted.under_load("1,000 endpoint changes a second for 10 minutes", pause=_PAUSE):
        churn = faulted.churn(1000, _LONG_SECONDS)
        while churn.poll() is None:
            change_meanwhile(faulted)
            time.sleep(5)
        assert churn.wait() == 0
        faulted.wait_equal()


def test_agent_killed_within_a_thousand_changes_a_second(faulted: Faulted, agent: Agent) -> None:
    """kill -9, and SIGSTOP for a while, of the agent within 1,000 endpoint changes a second."""
    with faulted.under_load("kill -9 within 1,000 changes a second"):
        churn = faulted.churn(1000, 12)
        for _ in range(3):
            time.sleep(1)
            agent.kill()
            agent.start()
        until(lambda: churn.poll() is not None, "the changes do not end")
        faulted.wait_equal()


def test_token_that_expires(tmp_path: Path) -> None:
    """A token that is refused from one moment to the next, until its file has another: nothing is lost or forgotten."""
    with Lab() as lab:
        faulted = Faulted(lab, "--token", "first")
        token, config = tmp_path / "token", tmp_path / "kubeconfig"
        token.write_text("first")
        config.write_text(
            yaml.safe_dump(
                {
                    "apiVersion": "v1",
                    "kind": "Config",
                    "current-context": "c",
                    "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
                    "clusters": [{"name": "c", "cluster": {"server": faulted.url}}],
                    "users": [{"name": "u", "user": {"tokenFile": str(token)}}],
                }
            )
        )
        agent = faulted.a.agent("--kubeconfig", str(config), *KEEPS_CONNECTIONS).start()
        faulted.token = "first"
        faulted.wait_equal()
        with faulted.under_load("the token expires"):
            for following in ("second", "third"):
                faulted.control("tokens", accept=following)
                faulted.control("drop")
                faulted.token = following
                change_meanwhile(faulted)
                time.sleep(2)
                beside = token.with_suffix(".new")
                beside.write_text(following)
                beside.rename(token)
                faulted.wait_equal()
        agent.stop()
