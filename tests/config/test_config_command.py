"""``ebpfproxy config``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from ebpfproxy.cli import main
from ebpfproxy.config.load import Configuration, effective, parse
from ebpfproxy.config.write import configz
from ebpfproxy.health.http import json_answer, text_answer
from ebpfproxy.health.server import HttpServer
from tests.config.files import KUBE_PROXY, OWN, text_of, used


def run(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(main, ["config", *arguments])
    return result.exit_code, result.stdout, result.stderr


@pytest.mark.parametrize("command", [(), ("validate",), ("defaults",), ("effective",)])
def test_every_command_has_help(command: tuple[str, ...]) -> None:
    code, output, _ = run(*command, "--help")
    assert code == 0
    assert output.startswith("Usage: main config")


def test_a_valid_file_is_reported_as_valid(tmp_path: Path) -> None:
    file = tmp_path / "kube-proxy.yaml"
    file.write_text(text_of(KUBE_PROXY, OWN))
    assert run("validate", str(file)) == (0, f"{file}: valid\n", "")
    file.write_text(text_of({**KUBE_PROXY, "portRange": "1-2", "winkernel": {"enableDSR": True}}))
    assert run("validate", str(file)) == (
        0,
        f"{file}: valid\nunsupported, ignored: winkernel.enableDSR, portRange\n",
        "",
    )


def test_every_error_in_a_file_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "kube-proxy.yaml"
    file.write_text(text_of({**KUBE_PROXY, "conntrack": {"maxPerCore": -1, "x": 1}, "mode": "x"}))
    code, out, output = run("validate", str(file))
    assert (code, out) == (1, "")
    assert output.splitlines() == [
        f"{file}: conntrack.x: unknown field",
        f"{file}: mode: 'x' is none of iptables, ipvs, nftables, nor empty",
        f"{file}: conntrack.maxPerCore: -1 is below 0",
    ]
    assert run("validate", str(tmp_path / "none"))[0] == 1


def test_defaults_are_printed_as_a_file() -> None:
    code, output, _ = run("defaults")
    assert code == 0
    assert parse(output, "f") == effective(Configuration())


@pytest.fixture
def agent() -> Iterator[str]:
    pages = {"/configz": lambda: json_answer(configz(used({"mode": "ipvs"})))}
    server = HttpServer("metrics", "127.0.0.1:0", pages)
    server.start()
    yield f"127.0.0.1:{server.port}"
    server.stop()


def test_configuration_of_the_agent_is_printed_as_a_file(agent: str) -> None:
    code, output, _ = run("effective", "--address", agent)
    assert code == 0
    assert parse(output, "f") == used({"mode": "ipvs"})
    assert run("effective", "--address", f"0.0.0.0:{agent.rpartition(':')[2]}")[1] == output


def test_configuration_of_the_agent_is_printed_as_json(agent: str) -> None:
    assert json.loads(run("effective", "--address", agent, "-o", "json")[1]) == configz(
        used({"mode": "ipvs"})
    )


def test_unreachable_agent_is_an_error() -> None:
    code, _, output = run("effective", "--address", "127.0.0.1:1")
    assert code == 1
    assert output.startswith("Error: no agent answers at 127.0.0.1:1: ")
    assert "--address: 'x' is not IP:port" in run("effective", "--address", "x")[2]


def test_responses_of_other_servers_are_errors() -> None:
    server = HttpServer("other", "127.0.0.1:0", {"/configz": lambda: text_answer("hello")})
    other = HttpServer("nothing", "127.0.0.1:0", {})
    server.start()
    other.start()
    try:
        assert "not an agent's answer" in run("effective", "--address", f"127.0.0.1:{server.port}")[2]
        assert "HTTP 404" in run("effective", "--address", f"127.0.0.1:{other.port}")[2]
    finally:
        server.stop()
        other.stop()


@pytest.mark.parametrize(
    ("text", "whose"),
    [
        ('{"kubeproxy.config.k8s.io": {"mode": "iptables"}}', "kube-proxy, which has the agent's port"),
        ('{"a": {}}', "no agent"),
    ],
)
def test_another_programs_configuration_is_not_the_agents(text: str, whose: str) -> None:
    """Until a migration ends, kube-proxy has the port; its answer has the same form."""
    server = HttpServer("other", "127.0.0.1:0", {"/configz": lambda: text_answer(text)})
    server.start()
    try:
        code, _, output = run("effective", "--address", f"127.0.0.1:{server.port}")
    finally:
        server.stop()
    assert (code, output.endswith(f"/configz: the answer is that of {whose}\n")) == (1, True)
