"""Generated parts of documents are current."""

from __future__ import annotations

import json
import re

import pytest

from ebpfproxy.config.datapath import Capacity
from ebpfproxy.config.flags import OWN_OPTIONS
from ebpfproxy.datapath.abi.node_layout import ACTIONS
from ebpfproxy.datapath.abi.schema import map_specs
from tools.docs import configuration, datapath
from tools.docs.made import PARTS, named, wanted


@pytest.mark.root
def test_files_are_current() -> None:
    stale = [path.name for path, text in wanted().items() if not path.exists() or path.read_text() != text]
    assert stale == [], "run python -m tools.docs to update them"


def test_every_generated_part_is_in_a_document() -> None:
    assert named() == set(PARTS)


def test_every_map_and_reason_is_described() -> None:
    assert datapath._HOLDS.keys() == {each.name for each in map_specs(Capacity())}
    assert datapath._REASONS.keys() == {str(each) for each in frozenset().union(*ACTIONS.values())}


def test_generated_parts_are_not_empty() -> None:
    for name, make in PARTS.items():
        assert len(make().splitlines()) > 2 or name == "metrics-process", name


def test_schema_of_the_chart_matches_the_template() -> None:
    """It has the fields of EbpfProxyConfiguration except those that the template writes."""
    schema = json.loads(configuration.chart_schema())
    own = schema["properties"]["config"]["properties"]["own"]
    assert list(own["properties"]) == [option.path for option in OWN_OPTIONS]
    assert own["additionalProperties"] is False
    references = set(re.findall(r"#/\$defs/(\w+)", configuration.chart_schema()))
    assert references == schema["$defs"].keys()
