"""Commands on an operator's machine without bcc, libbpf and root."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

#: Hides bcc and libbpf and drops root in a process that then runs a command.
_HIDDEN = """
import ctypes, os, sys

real = ctypes.CDLL

def without_libbpf(name, *arguments, **options):
    if name is not None and "bpf" in str(name):
        raise OSError(f"{name}: cannot open shared object file")
    return real(name, *arguments, **options)

ctypes.CDLL = without_libbpf
sys.modules["bcc"] = None
if os.geteuid() == 0:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
from MODULE import main
main()
"""


def run(*arguments: str, module: str = "ebpfproxy.cli") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", _HIDDEN.replace("MODULE", module), *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "HOME": "/nonexistent", "PYTHONDONTWRITEBYTECODE": "1"},
        timeout=60,
    )


@pytest.mark.parametrize(
    "arguments",
    [
        ("config", "defaults"),
        ("install", "--image", "x", "--dry-run", "--no-inherit", "--api-server", "https://cp.example:6443"),
        ("uninstall", "--help"),
        ("test", "--help"),
        ("migrate", "plan", "--help"),
        ("migrate", "run", "--help"),
        ("migrate", "rollback", "--help"),
        ("completion", "bash"),
    ],
    ids=" ".join,
)
def test_command_runs_without_bcc_libbpf_and_root(arguments: tuple[str, ...]) -> None:
    """Commands that use the API server only, or no server, need nothing of a node."""
    done = run(*arguments)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_migrate_plan_of_all_nodes_runs_without_them() -> None:
    """`migrate plan --all-nodes` gets as far as the API server, which is unreachable."""
    done = run("migrate", "plan", "--all-nodes", "--master", "http://127.0.0.1:9", "--timeout", "1s")
    assert done.returncode != 0
    assert "127.0.0.1" in done.stderr
    assert "libbpf" not in done.stderr


def test_plugin_of_kubectl_runs_without_them() -> None:
    """It knows the options of commands that run in pods, and gets as far as the kubeconfig."""
    done = run("trace", "--help", module="ebpfproxy.cli.kubectl")
    assert done.returncode == 0, done.stderr
    assert "--all-nodes" in done.stdout and "--sample N" in done.stdout
    done = run("top", "--help", module="ebpfproxy.cli.kubectl")
    assert done.returncode == 0, done.stderr
    assert "--all-nodes" in done.stdout and "--interval DURATION" in done.stdout
    done = run("explain", "a", "b:80", "--kubeconfig", "/nonexistent", module="ebpfproxy.cli.kubectl")
    assert done.returncode == 2
    assert done.stderr.startswith("Error: /nonexistent: no such kubeconfig")


def test_commands_that_read_maps_report_missing_maps_without_libbpf() -> None:
    """The error is about what is missing on this machine, in one line."""
    done = run("status", "--bpf-root", "/tmp")
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
