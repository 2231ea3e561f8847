"""Names in documents exist in the code."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import yaml

from ebpfproxy.config.datapath import Feature
from tests.docs.pages import PAGES
from tools.docs.made import ROOT
from tools.docs.metrics import RULES, series

_METRIC = re.compile(r"\b(?:ebpfproxy|kubeproxy|rest_client)_[a-z][a-z_]*\*?")
_PARTS = re.compile(r"_(?:bucket|count|sum)$")


def _found(pattern: str, page: Path) -> set[str]:
    return set(re.findall(pattern, page.read_text()))


def _sources() -> str:
    """Returns all text that defines names."""
    listed = subprocess.run(
        [
            "git",
            "ls-files",
            "-co",
            "--exclude-standard",
            "ebpfproxy",
            "deploy",
            "bpf",
            "tests/lab",
            "Makefile",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    return "\n".join((ROOT / name).read_text(errors="replace") for name in listed if (ROOT / name).is_file())


@pytest.fixture(scope="module")
def sources() -> str:
    return _sources()


@pytest.mark.root
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_metrics_exist(page: Path) -> None:
    known = series()
    roots = {_PARTS.sub("", name) for name in known}
    missing = [
        name
        for name in set(_METRIC.findall(page.read_text()))
        if name not in known | roots
        and not (name.endswith("_*") and any(each.startswith(name[:-1]) for each in known))
    ]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_annotations_labels_and_variables_exist(page: Path, sources: str) -> None:
    names = _found(r"\bebpfproxy\.io/[\w-]+", page) | _found(r"\bEBPFPROXY_[A-Z_]+[A-Z]\b", page)
    by_flag = {f"EBPFPROXY_{flag}" for flag in re.findall(r"[A-Z_]+", " ".join(map(_variable, _flags())))}
    assert {name for name in names if name not in sources} - by_flag == set()


def test_reasons_of_events_are_those_of_the_code(sources: str) -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text().partition("## Events")[2].partition("\n## ")[0]
    reasons = set(re.findall(r"`([A-Z]\w+)`", page))
    assert len(reasons) > 5
    assert {reason for reason in reasons if f'"{reason}"' not in sources} == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_alerts_exist(page: Path) -> None:
    rules = [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]
    assert _found(r"\bEbpfproxy[A-Z]\w+", page) - {rule.get("alert") for rule in rules} == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_features_and_targets_exist(page: Path) -> None:
    assert _found(r"--without ([a-z-]+)", page) <= {str(feature) for feature in Feature}
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert _found(r"`make ([a-z-]+)", page) <= targets


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_flags_in_code_spans_exist(page: Path) -> None:
    """A code span of one flag names one of ours, of kube-proxy's, or of a tool that the page is about."""
    others = _OTHER_TOOLS | {"--help"}
    named = _found(r"`(--[a-z][a-z0-9-]*)[ =`]", page)
    assert named - set(_flags()) - others == set()


#: Flags that kubeadm, k3s, kube-router and the API server have, and our benchmarks.
_OTHER_TOOLS = {
    "--base",
    "--skip-phases",
    "--control-plane-endpoint",
    "--disable-kube-proxy",
    "--lb-server-port",
    "--run-service-proxy",
    "--service-node-port-range",
    "--only",  # make bench
}


def _flags() -> set[str]:
    from tools.docs.commands import walk  # noqa: PLC0415

    return {
        name
        for ctx in walk()
        for param in ctx.command.params
        for name in (*param.opts, *param.secondary_opts)
    }


def _variable(flag: str) -> str:
    return flag.lstrip("-").replace("-", "_").upper()


def test_example_of_selecting_tests_matches_some() -> None:
    """The word after ``-k`` occurs in a test name or an id of the file that CONTRIBUTING names."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    ((file, word),) = re.findall(r"pytest -q (\S+) -k (\w+)", text)
    code = (ROOT / file).read_text()
    assert re.search(rf"def test_\w*{word}|[\"']{word}[\"']", code)
