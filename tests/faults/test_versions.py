"""A rollout of this version over one with other maps or with the same, and back: N-1, N, N-1, N."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from ebpfproxy.config.datapath import Capacity
from ebpfproxy.datapath.abi.schema import SCHEMA_VERSION, version_name
from ebpfproxy.datapath.programs import bytecode
from tests.faults.faulted import Faulted
from tests.lab.waiting import until

pytestmark = [pytest.mark.root, pytest.mark.faults, pytest.mark.timeout(900)]

_ROOT = Path(__file__).parents[2]
_SCHEMA = "ebpfproxy/datapath/abi/schema.py"
#: A program that says what the folder of maps is called.
_NAME = """
from ebpfproxy.config.datapath import Capacity
from ebpfproxy.datapath.abi.schema import version_name
print(version_name(Capacity()))
"""
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
    return _checkout(commit, tmp_path_factory.mktemp("former"))


def _checkout(commit: str, folder: Path) -> Path:
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


@pytest.fixture(scope="module")
def first_with_the_same_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout of the first version whose folder of maps has the name of this one's."""
    name, first = version_name(Capacity()), None
    for commit in _git("log", "--first-parent", "--format=%H", "--", "ebpfproxy/datapath/abi").split():
        folder = _checkout(commit, tmp_path_factory.mktemp("first"))
        command = [sys.executable, "-c", _NAME]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        if done.stdout.strip() != name:
            break
        first = folder
    if first is None:
        pytest.skip("this checkout has no history")
    # An agent compiles for two minutes at most, and beside the load that may be too short.
    build = [sys.executable, "-m", "ebpfproxy.datapath.programs.build", str(bytecode.CACHE)]
    for _ in range(3):
        if not subprocess.run(build, cwd=first, check=False).returncode:
            break
    return first


def test_rollback_to_the_first_version_with_the_same_maps(
    faulted: Faulted, first_with_the_same_folder: Path
) -> None:
    """It finds all maps in their folder, and goes on with them at its first start, as the next one does."""
    agent = faulted.agent().start()
    for checkout in (first_with_the_same_folder, None):
        with faulted.under_load("rollback to a version with the same maps, and rollout"):
            assert agent.stop() == 0
            faulted.put_endpoints("web", "w1")
            agent.start(cwd=checkout, wait=False)
            agent.wait_ready(600)
            faulted.put_endpoints("web", "w1", "w2")
            until(lambda: not faulted.differences(), "the change is not programmed")
    faulted.wait_equal()
    agent.stop()
