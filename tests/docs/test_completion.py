"""``completion``: scripts in a real bash, and names that are completed from maps."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from ebpfproxy.cli import main
from ebpfproxy.config.datapath import BPFFS
from tests.lab import Lab, LabNode, manifests


@pytest.fixture
def path(tmp_path: Path) -> str:
    """Returns a PATH on which ``ebpfproxy`` is this checkout's."""
    program = tmp_path / "ebpfproxy"
    program.write_text(f"#!{sys.executable}\nfrom ebpfproxy.cli import main\nmain(prog_name='ebpfproxy')\n")
    program.chmod(0o755)
    return f"{tmp_path}{os.pathsep}{os.environ['PATH']}"


_BASH = """
source <(printf '%s' "$SCRIPT")
COMP_WORDS=("$@")
COMP_CWORD=$(($# - 1))
COMP_LINE="$*"
$(complete -p ebpfproxy | sed 's/.*-F \\([^ ]*\\).*/\\1/') ebpfproxy
printf '%s\\n' "${COMPREPLY[@]}"
"""


@functools.cache
def _script() -> str:
    """Returns the output of ``ebpfproxy completion bash``."""
    command = [sys.executable, "-c", "from ebpfproxy.cli import main; main(prog_name='ebpfproxy')"]
    return subprocess.run([*command, "completion", "bash"], capture_output=True, text=True, check=True).stdout


def completed(path: str, *words: str) -> list[str]:
    """Returns the completions of a bash that sourced the script, for the last word."""
    done = subprocess.run(
        ["bash", "--norc", "-c", _BASH, "bash", "ebpfproxy", *words],
        env={**os.environ, "PATH": path, "SCRIPT": _script()},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stderr == ""
    return done.stdout.split()


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (("sta",), ["status"]),
        (("service", ""), ["get", "list"]),
        (("migrate", "r"), ["rollback", "run"]),
        (("status", "--out"), ["--output"]),
        (("status", "--output", "j"), ["json"]),
        (("completion", "z"), ["zsh"]),
        (("run", "--lb-algorithm", "mag"), ["maglev"]),
        (("service", "get", "--bpf-root", "/nowhere", "shop/"), []),
    ],
)
def test_bash_completes(path: str, words: tuple[str, ...], offered: list[str]) -> None:
    assert completed(path, *words) == offered


@pytest.mark.parametrize(
    ("shell", "needed"), [("bash", "complete -o"), ("zsh", "#compdef"), ("fish", "complete ")]
)
def test_every_shell_has_a_script(shell: str, needed: str) -> None:
    result = CliRunner().invoke(main, ["completion", shell])
    assert result.exit_code == 0
    assert needed in result.output
    assert "_EBPFPROXY_COMPLETE" in result.output
    found = shutil.which(shell)
    if found:
        subprocess.run([found, "-n"], input=result.output, text=True, check=True, timeout=10)


def test_unknown_shell_is_an_error() -> None:
    result = CliRunner().invoke(main, ["completion", "tcsh"])
    assert result.exit_code == 2
    assert "'tcsh' is not one of 'bash', 'zsh', 'fish'" in result.output


@pytest.fixture(scope="module")
def node() -> Iterator[LabNode]:
    """Yields a node with an agent that has programmed two Services."""
    with Lab() as lab:
        node = lab.node("node-a")
        folder = lab.folder / "manifests"
        endpoints = [manifests.endpoint("10.244.1.9", "node-a")]
        manifests.write(
            folder / "services.yaml",
            manifests.service("web", clusterIPs=["10.96.0.10"]),
            manifests.slice_of("web", endpoints),
            manifests.service("dns", namespace="system", clusterIPs=["10.96.0.20"]),
            manifests.slice_of("dns", [manifests.endpoint("fd00::9", "node-a")], namespace="system"),
        )
        agent = node.agent(manifests=folder).start()
        agent.stop()
        yield node


@pytest.mark.root
@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (("service", "get", ""), ["shop/web", "system/dns"]),
        (("service", "get", "sh"), ["shop/web"]),
        (("service", "list", "--namespace", "s"), ["shop", "system"]),
        (("service", "list", "-n", "sy"), ["system"]),
        (("backend", "drain", "10.2"), ["10.244.1.9", "10.244.1.9:8080"]),
        (("conntrack", "list", "--service", "shop/"), ["shop/web"]),
        (("conntrack", "flush", "--backend", "10.244.1.9:"), ["10.244.1.9:8080"]),
        (("affinity", "list", "--service", "system/"), ["system/dns"]),
        (("affinity", "flush", "--backend", "10.244"), ["10.244.1.9", "10.244.1.9:8080"]),
    ],
)
def test_names_are_completed_from_the_maps(
    path: str, node: LabNode, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], offered: list[str]
) -> None:
    monkeypatch.setenv("EBPFPROXY_BPF_ROOT", str(node.bpf_root))
    assert completed(path, *words) == offered


@pytest.mark.root
def test_without_access_to_the_maps_nothing_is_completed(node: LabNode) -> None:
    """There is no error either: only root may read the bpffs."""
    done = subprocess.run(
        [sys.executable, "-c", "from ebpfproxy.cli import main; main(prog_name='ebpfproxy')"],
        env={
            **os.environ,
            "COMP_WORDS": "ebpfproxy service get ",
            "COMP_CWORD": "3",
            "_EBPFPROXY_COMPLETE": "bash_complete",
            "EBPFPROXY_BPF_ROOT": str(node.bpf_root),
        },
        user=65534,
        group=65534,
        extra_groups=[],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.stdout.strip(), done.stderr) == ("", "")
    assert node.bpf_root.is_relative_to(BPFFS)
