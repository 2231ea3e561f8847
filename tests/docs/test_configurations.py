"""Configurations in the documents are valid, except examples of invalid ones."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from ebpfproxy.config import load
from tests.docs.pages import PAGES, Block, blocks

_KINDS = ("KubeProxyConfiguration", "EbpfProxyConfiguration")


def _documents(block: Block) -> list[Any]:
    return [each for each in yaml.safe_load_all(block.text) if each is not None]


def _all() -> list[Block]:
    return [block for page in PAGES for block in blocks(page) if block.language in ("yaml", "json")]


def _configurations() -> Iterator[tuple[str, str]]:
    for number, block in enumerate(_all()):
        documents = _documents(block)
        name = f"{block.page.name}, block {number}"
        if any(isinstance(each, dict) and each.get("kind") in _KINDS for each in documents):
            yield name, block.text
        for each in documents:
            if isinstance(each, dict) and each.get("kind") == "ConfigMap" and "config.yaml" in each["data"]:
                yield name, each["data"]["config.yaml"]


def test_the_docs_contain_configurations() -> None:
    assert len(list(_configurations())) >= 2


@pytest.mark.parametrize("block", _all(), ids=lambda block: f"{block.page.name}: {block.text[:30]!r}")
def test_yaml_blocks_can_be_parsed(block: Block) -> None:
    assert _documents(block)


@pytest.mark.parametrize(("name", "text"), list(_configurations()))
def test_configurations_are_valid(name: str, text: str) -> None:
    load.effective(load.parse(text, name))
