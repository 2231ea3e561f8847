"""A rollout of this version over one with other maps, and back: N-1, N, N-1, N."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import pytest

from ebpfproxy.datapath.abi.schema import SCHEMA_VERSION
from tests.faults.faulted import Faulted

pytestmark = [pytest.mark.root, pytest.mark.faults, pytest.mark.timeout(900)]

_ROOT = Path(__file__).parents[2]
_SCHEMA = "ebpfproxy/datapath/abi/schema.py"
#: A line of map_specs().
_MAP = r"^ +(_[a-z_]+|MapSpec)\(.*\),$"


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(_ROOT), *arguments], capture_output=True, text=True, check=False)
    return done.stdout.strip() if not done.returncode else ""


@pytest.fixture(scope="module")
def former(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout of the last version whose list of maps is another one."""
    changed = _git("log", "-1", "--format=%H", f"-G{_MAP}", "--", _SCHEMA)
    commit = _git("rev-parse", "--verify", f"{changed}^") if changed else ""
    if not commit:
        pytest.skip("this checkout has no history")
    if f"SCHEMA_VERSION = {SCHEMA_VERSION}\n" not in _git("show", f"{commit}:{_SCHEMA}"):
        pytest.skip("the last version has other structs in its maps: its flows end with a rollout")
    folder = tmp_path_factory.mktemp("former")
    archive = subprocess.run(
        ["git", "-C", str(_ROOT), "archive", commit, "ebpfproxy", "bpf"], capture_output=True, check=True
    )
    subprocess.run(["tar", "-x", "-C", str(folder)], input=archive.stdout, check=True)
    return folder


@pytest.mark.parametrize("ends", ["told", "killed"])
def test_rollout_and_rollback_of_another_version(faulted: Faulted, former: Path, ends: str) -> None:
    """An agent with other maps is replaced by this one, comes back, and is replaced again.

    As with other sizes, of flows of packets one that begins within the last milliseconds before the programs of its
    device are replaced may be lost: they are counted. So is what is lost where a version comes back that leaves a moment
    without a program for sockets of the other maps.
    """
    is_good = "def drop_former" in (former / "ebpfproxy/datapath/programs/attach.py").read_text()
    agent = faulted.agent().start(cwd=former, wait=False)
    # It compiles its programs.
    agent.wait_ready(600)
    fault = f"rollout and rollback of another version, whose agent is {ends}"
    for checkout in (None, former, None):
        with faulted.under_load(fault, packets=False, sockets=is_good or checkout is None):
            if ends == "told":
                assert agent.stop() == 0
            else:
                agent.kill()
            faulted.put_endpoints("web", "w1")
            agent.start(cwd=checkout)
            faulted.put_endpoints("web", "w1", "w2")
            # Commands of this version do not read maps of the other one.
            if checkout is None:
                faulted.wait_equal()
            time.sleep(0.5)
    faulted.wait_equal()
    agent.stop()
