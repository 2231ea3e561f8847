"""Commands without an agent: help, errors, and output without pinned maps."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import click
import pytest
import yaml
from click.testing import CliRunner

import ebpfproxy
from ebpfproxy.cli import main
from ebpfproxy.cli.option_types import EndpointType, Seconds
from ebpfproxy.cli.output import age, emit, plain
from ebpfproxy.datapath.dump import BackendRef
from ebpfproxy.inspection.words import share


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(main, arguments)
    return result.exit_code, result.output


def test_version() -> None:
    assert run("--version") == (0, f"ebpfproxy, version {ebpfproxy.__version__}\n")


@pytest.mark.parametrize(
    "command",
    [
        (),
        ("run",),
        ("config", "validate"),
        ("affinity", "list"),
        ("migrate", "plan"),
        ("migrate", "run"),
        ("migrate", "rollback"),
        ("backend", "drain"),
        ("test",),
        ("status",),
        ("service",),
        ("service", "list"),
        ("service", "get"),
        ("backend", "list"),
        ("conntrack",),
        ("conntrack", "list"),
        ("conntrack", "get"),
        ("conntrack", "flush"),
        ("sysdump",),
        ("cleanup",),
        ("check",),
        ("explain",),
        ("trace",),
        ("top",),
        ("ui",),
    ],
)
def test_every_command_has_help(command: tuple[str, ...]) -> None:
    code, said = run(*command, "--help")
    assert code == 0
    assert said.startswith("Usage: main")
    assert len(said.splitlines()) > 5


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--nodeport-addresses", "10.0.0.1"), "'10.0.0.1' is not a CIDR: it has no prefix length"),
        (
            ("--nodeport-addresses", "primary,eth0"),
            "'eth0' is neither a CIDR nor one of 'primary', 'localhost'",
        ),
        (("--cluster-cidr", "10.0.0.0/33"), "--cluster-cidr: '10.0.0.0/33' is not a CIDR"),
        (("--service-cidr", "ten"), "--service-cidr: 'ten' is not a CIDR"),
        (("--detect-local-mode", "BridgeInterface"), "BridgeInterface needs --pod-bridge-interface"),
        (("--masquerade-ports", "9-3"), "'9-3': a range of ports begins at 1"),
        (("--otlp-endpoint", "a:4318"), "--otlp-endpoint: 'a:4318' is not http://HOST:PORT"),
        (("--conntrack-udp-timeout", "soon"), "'soon' is not a duration such as 30s or 1h30m"),
    ],
)
def test_invalid_options_are_named(arguments: tuple[str, ...], said: str) -> None:
    code, output = run("run", "--manifests", "/nowhere", *arguments)
    assert code != 0
    assert said in output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--otlp-endpoint", "http://a", "--file", "x"), "--file excludes --otlp-endpoint"),
        (("--otlp-endpoint", "a:4318"), "--otlp-endpoint: 'a:4318' is not http://HOST:PORT"),
        # Nothing has such a name: it would show nothing for ever.
        (("--service", "a/b/c"), "--service: 'a/b/c' is not NAME or NAMESPACE/NAME"),
        (("--service", ""), "--service: '' is not NAME or NAMESPACE/NAME"),
        (("--service", "shop/"), "--service: 'shop/' is not NAME or NAMESPACE/NAME"),
        (("--pod", "/a"), "--pod: '/a' is not NAME or NAMESPACE/NAME"),
        (("--namespace", ""), "--namespace: the name is empty"),
    ],
)
def test_invalid_options_of_trace_are_named(arguments: tuple[str, ...], said: str) -> None:
    code, output = run("trace", *arguments)
    assert code == 2
    assert said in output


@pytest.mark.parametrize(
    ("text", "seconds"), [("30s", 30), ("1h30m", 5400), ("1.5m", 90), ("250ms", 0.25), ("0s", 0)]
)
def test_durations_use_gos_notation(text: str, seconds: float) -> None:
    assert Seconds().convert(text, None, None) == seconds


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--interval", "1ms"), "shorter than 0.1s"),
        (("--interval", "soon"), "'soon' is not a duration"),
        (("--rows", "-1"), "-1 is not in the range"),
        (("--service", "a/b/c"), "--service: 'a/b/c' is not NAME or NAMESPACE/NAME"),
        (("--sort", "size"), "'size' is not one of 'connections', 'open', 'refused', 'dropped', 'failed', "),
        (("--interval", "-5s"), "'-5s' is negative"),
        # float() makes it infinite, and no clock waits so long.
        (("--interval", f"{'9' * 5000}s"), "is too long a duration"),
        (("--interval", "²s"), "'²s' is not a duration"),
    ],
)
def test_invalid_options_of_top_are_named(arguments: tuple[str, ...], said: str) -> None:
    code, output = run("top", *arguments)
    assert code == 2
    assert said in output


@pytest.mark.parametrize("command", ["conntrack", "affinity"])
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "give a filter or --all"),
        (("--all", "--service", "shop/web"), "--all excludes filters"),
        # What a script takes from an empty variable must not be left out: the rest flushes too much.
        (("--service", ""), "'' is not NAMESPACE/NAME"),
        (("--service", "shop/web", "--client", ""), "--client"),
        (("--service", "shop/web", "--backend", ""), "'' is not ADDRESS or ADDRESS:PORT"),
        # What no list shows would find nothing, and say that there is nothing.
        (("--service", "web"), "'web' is not NAMESPACE/NAME"),
        (("--backend", "10.0.0.1:x"), "'10.0.0.1:x' is not ADDRESS or ADDRESS:PORT"),
        (("--backend", "web-1"), "'web-1' is not ADDRESS or ADDRESS:PORT"),
    ],
)
def test_flush_requires_a_filter_that_can_be_understood(
    command: str, arguments: tuple[str, ...], said: str
) -> None:
    code, output = run(command, "flush", *arguments)
    assert (code, said in output) == (2, True)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("conntrack", "list", "--state", "established?"), "'established?' is not one of"),
        (("conntrack", "get", "192.0.2.1"), "'192.0.2.1' is not ADDRESS:PORT"),
        (("backend", "drain", "192.0.2.1:"), "'192.0.2.1:' is not ADDRESS or ADDRESS:PORT"),
        (("service", "get", "a/b/c"), "'a/b/c' is not NAME or NAMESPACE/NAME"),
        (("service", "get", ""), "'' is not NAME or NAMESPACE/NAME"),
        (("service", "list", "-n", ""), "--namespace: the name is empty"),
        (("install", "--image", "", "--dry-run"), "Invalid value for '--image': it is empty"),
    ],
)
def test_names_that_nothing_has_are_errors(arguments: tuple[str, ...], said: str) -> None:
    code, output = run(*arguments)
    assert (code, said in output) == (2, True)


@pytest.mark.parametrize(
    ("text", "meant", "others"),
    [
        ("10.0.0.1", ["10.0.0.1:80", "10.0.0.1:53"], ["10.0.0.10:80", "[::1]:80"]),
        ("10.0.0.1:80", ["10.0.0.1:80"], ["10.0.0.1:8"]),
        ("fd00:0::1", ["[fd00::1]:80", "[fd00::1]:53"], ["[fd00::11]:80"]),
        ("[FD00::1]", ["[fd00::1]:80"], ["10.0.0.1:80"]),
        ("[fd00::0:1]:80", ["[fd00::1]:80"], ["[fd00::1]:53"]),
        # Without brackets all of it is the address.
        ("fd00::1:80", ["[fd00::1:80]:1"], ["[fd00::1]:80"]),
    ],
)
def test_endpoints_in_any_notation(text: str, meant: list[str], others: list[str]) -> None:
    """A list shows addresses in the shortest notation, and they are meant however somebody writes them."""
    found = EndpointType().convert(text, None, None)
    assert [shown for shown in meant + others if found.is_of(shown)] == meant


@pytest.mark.parametrize("text", ["", ":80", "[fd00::1", "[fd00::1]80", "[fd00::1]:", "10.0.0.1:0", "a:1"])
def test_no_endpoints(text: str) -> None:
    with pytest.raises(click.BadParameter, match="is not ADDRESS or ADDRESS:PORT"):
        EndpointType().convert(text, None, None)


@pytest.mark.root
@pytest.mark.parametrize(
    "command",
    [
        ("status",),
        ("service", "list"),
        ("service", "get", "a/b"),
        ("backend", "list"),
        ("conntrack", "list"),
        ("conntrack", "get", "192.0.2.1:80"),
        ("conntrack", "flush", "--all"),
        ("top", "--once"),
    ],
)
def test_output_without_pinned_maps(command: tuple[str, ...], tmp_path: Path) -> None:
    code, said = run(*command, "--bpf-root", str(tmp_path))
    assert code == 1
    assert (
        said
        == f"Error: nothing is pinned below {tmp_path}/ebpfproxy: no agent has run with this --bpf-root\n"
    )


@pytest.mark.root
@pytest.mark.parametrize("command", [("check",), ("explain", "host", "10.96.0.10:80")], ids=" ".join)
def test_answers_by_exit_code_need_pinned_maps(command: tuple[str, ...], tmp_path: Path) -> None:
    code, said = run(*command, "--bpf-root", str(tmp_path))
    assert (code, f"nothing is pinned below {tmp_path}/ebpfproxy" in said) == (2, True)


def test_environment_variable_sets_the_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EBPFPROXY_BPF_ROOT", str(tmp_path))
    assert str(tmp_path) in run("status")[1]


def test_cleanup_without_pins(tmp_path: Path) -> None:
    code, said = run("cleanup", "--bpf-root", str(tmp_path))
    assert (code, said) == (0, f"nothing is pinned below {tmp_path}/ebpfproxy\n")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--manifests", "x", "--master", "y"), "--manifests: excludes --kubeconfig"),
        (("--hostname-override", " ", "--manifests", "x"), "the node has no name"),
        (("--max-services", "0"), "0 is not in the range"),
        (("--healthz-bind-address",), "requires an argument"),
    ],
)
def test_invalid_options_are_a_one_line_error(arguments: tuple[str, ...], said: str) -> None:
    code, output = run("run", *arguments)
    assert code in (1, 2)
    assert said in output


@pytest.mark.root
def test_run_reports_invalid_roots(tmp_path: Path) -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "ebpfproxy",
            "run",
            "--manifests",
            str(tmp_path),
            "--cgroup-root",
            str(tmp_path),
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=20,
    )
    assert done.returncode == 1
    assert f"--cgroup-root {tmp_path}: not a cgroup v2 folder" in done.stderr


@pytest.mark.root
@pytest.mark.parametrize(
    ("names", "said"), [((), "mounted"), (("etc",), "neither on a bpffs nor empty")], ids=["empty", "used"]
)
def test_a_bpffs_hides_no_files(tmp_path: Path, names: tuple[str, ...], said: str) -> None:
    """`--bpf-root /proc` took the whole node with it. What is mounted here goes with its mount namespace."""
    for name in names:
        (tmp_path / name).mkdir()
    program = (
        "import os, pathlib, sys; from ebpfproxy.datapath.kernel.roots import *\n"
        "root = pathlib.Path(sys.argv[1])\n"
        "try: print('mounted' if ensure_bpffs(root) else 'there')\n"
        "except RootError as error: print(error)\n"
        "print(*os.listdir(root))"
    )
    alone = ["unshare", "--mount", "--propagation", "private"]
    done = subprocess.run(
        [*alone, sys.executable, "-c", program, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        timeout=20,
    )
    first, last = done.stdout.splitlines()
    assert said in first
    # A new bpffs has files of its own.
    assert set(names) <= set(last.split())


def test_configuration_that_cannot_be_written_is_one_line() -> None:
    code, said = run("run", "--write-config-to", "/nonexistent/config.yaml")
    assert (code, said) == (1, "Error: /nonexistent/config.yaml: No such file or directory\n")


def test_json_and_yaml_output_are_equal(capsys: pytest.CaptureFixture[str]) -> None:
    value = [BackendRef("10.0.0.1:80", "active")]
    emit(value, "json", print)
    emit(value, "yaml", print)
    said = capsys.readouterr().out
    as_json, as_yaml = said[: said.index("]") + 1], said[said.index("]") + 1 :]
    assert json.loads(as_json) == yaml.safe_load(as_yaml) == [{"address": "10.0.0.1:80", "state": "active"}]


@pytest.mark.parametrize(
    ("seconds", "shown"), [(-3600, "0s"), (0.2, "0s"), (90, "90s"), (300, "5m"), (7200, "2h"), (200000, "2d")]
)
def test_format_of_ages(seconds: float, shown: str) -> None:
    assert age(seconds) == shown


@pytest.mark.parametrize(
    ("part", "shown"), [(1.0, "100%"), (1 / 3, "33%"), (0.01, "1%"), (1 / 200, "0.50%"), (0.0, "0%")]
)
def test_format_of_shares(part: float, shown: str) -> None:
    assert share(part) == shown


@pytest.mark.parametrize("hostile", ["\x1b[2J", "a\nb", "\x9b31m", "\u202e", "\r", "\x07"])
def test_a_terminal_does_not_obey_what_is_printed(hostile: str) -> None:
    shown = plain(f"shop/{hostile} → ⇒ [1 of 3]")
    assert shown.isprintable() and shown.endswith(" → ⇒ [1 of 3]")
