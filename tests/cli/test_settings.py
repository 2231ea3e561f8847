"""Options of ``run`` that are generated from the fields of the configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from ebpfproxy.cli import main
from ebpfproxy.cli.run import command
from ebpfproxy.config.flags import KUBE_PROXY_FLAGS, OWN_FLAGS, OWN_OPTIONS
from ebpfproxy.config.load import load
from ebpfproxy.config.write import configz
from tests.config.test_flags import as_text
from tests.config.test_kube_proxy import FIELDS, at
from tests.config.test_own import FIELDS as OWN_FIELDS


def written(tmp_path: Path, *arguments: str) -> dict[str, Any]:
    """Returns the configuration that ``run`` writes with these arguments, in the form of ``/configz``."""
    file = tmp_path / "used.yaml"
    result = CliRunner().invoke(main, ["run", *arguments, "--write-config-to", str(file)])
    assert result.exit_code == 0, result.output
    return configz(load(file))


def arguments_of(flag: str, value: Any) -> list[str]:
    option = next(each for each in command.params if f"--{flag}" in each.opts or f"-{flag}" in each.opts)
    assert isinstance(option, click.Option)
    if option.secondary_opts:
        return [f"--{flag}" if value else f"--no-{flag}"]
    if option.multiple:
        return [part for each in value for part in (f"--{flag}", each)]
    return ["-v", as_text(value)] if flag == "v" else [f"--{flag}={as_text(value)}"]


@pytest.mark.parametrize("flag", OWN_FLAGS)
def test_every_flag_of_our_document_sets_its_field(flag: str, tmp_path: Path) -> None:
    path = OWN_FLAGS[flag]
    found = written(tmp_path, *arguments_of(flag, OWN_FIELDS[path]))
    assert found["ebpfproxy.io"][path] == OWN_FIELDS[path]


@pytest.mark.parametrize("flag", KUBE_PROXY_FLAGS)
def test_every_flag_of_kube_proxy_sets_its_field(flag: str, tmp_path: Path) -> None:
    path = KUBE_PROXY_FLAGS[flag]
    gates = ["--feature-gates", "LoggingAlphaOptions=true"] if path.startswith("logging.options") else []
    found = written(tmp_path, *gates, *arguments_of(flag, FIELDS[path]))
    assert at(found["kubeproxy.config.k8s.io"], path) == FIELDS[path]


def test_the_environment_sets_a_field(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EBPFPROXY_STALE_TCP", "never")
    monkeypatch.setenv("EBPFPROXY_BYPASS_NETFILTER", "true")
    found = written(tmp_path)["ebpfproxy.io"]
    assert (found["staleTCP"], found["bypassNetfilter"]) == ("never", True)


def test_a_variable_of_opentelemetry_sets_its_field(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def endpoint(*arguments: str) -> str:
        found: str = written(tmp_path, *arguments)["ebpfproxy.io"]["otlpEndpoint"]
        return found

    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://a")
    assert endpoint() == "http://a"
    monkeypatch.setenv("EBPFPROXY_OTLP_ENDPOINT", "http://b")
    assert endpoint() == "http://b"
    assert endpoint("--otlp-endpoint", "http://c") == "http://c"


def test_boolean_flag_overrides_the_file(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(
        "apiVersion: ebpfproxy.io/v1alpha1\nkind: EbpfProxyConfiguration\nbypassNetfilter: true\n"
    )
    assert written(tmp_path, "--config", str(file))["ebpfproxy.io"]["bypassNetfilter"]
    found = written(tmp_path, "--config", str(file), "--no-bypass-netfilter")
    assert not found["ebpfproxy.io"]["bypassNetfilter"]


def test_every_field_of_our_document_has_a_help_text() -> None:
    assert [each.path for each in OWN_OPTIONS if not each.text.endswith(".")] == []
