"""Links and paths in the documents refer to existing files and headings."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.docs.pages import PAGES, anchors, blocks, links, spans
from tools.docs.made import ROOT

_PATH = re.compile(r"^(?:deploy|tests|docs|ebpfproxy|bpf)/[\w./*-]+$")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_link_targets_exist(page: Path) -> None:
    missing = []
    for link in links(page):
        if link.startswith(("https://", "http://")):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            missing.append(link)
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paths_in_documents_exist(page: Path) -> None:
    named = [word.split("::")[0] for span in spans(page) for word in span.split()]
    named += [word for block in blocks(page) for word in block.text.split()]
    missing = [name for name in named if _PATH.match(name) and not any(ROOT.glob(name.rstrip("/")))]
    assert missing == []


def test_every_document_is_reachable_from_the_readme() -> None:
    readme = ROOT / "README.md"
    linked = {(ROOT / link.partition("#")[0]).resolve() for link in links(readme)}
    assert {page for page in PAGES if page != readme} - linked == set()
