"""A sample of ``make fuzz``: mutated packets through all packet programs, each result checked by ``packets/check.c``."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import tested
from tests.fuzz import __main__ as command
from tests.fuzz.packet_world import WORLDS, Options, miscounted, packet_world, uncounted

pytestmark = pytest.mark.root


#: A sample: make fuzz has all of them.
_SAMPLE = ("--bypass-netfilter", "dsr --xdp generic")


@pytest.mark.parametrize("name", _SAMPLE)
def test_mutated_packets_are_translated_rightly_rejected_rightly_or_left_alone(
    name: str, tmp_path: Path
) -> None:
    """What no Service has passes unchanged; nothing behind the IP packet is read or written; counters add up.

    Replies are the reverse of what was done before, and what a hook sends on itself is what the options say. ICMP
    errors keep to their limit, which they reach on a machine that is fast enough.
    """
    with packet_world(tmp_path, name) as world:
        before = world.events()
        outcome, report = world.send(100_000, seed=1)
        after, traffic = world.events(), world.traffic()
    assert not outcome.violations, report.read_text()[:4000]
    assert uncounted(before, after, outcome) == 0
    if "--measure-traffic" in name:
        assert miscounted(traffic, outcome) == ""
    for each in outcome.programs:
        assert each.translated
        assert each.runs - each.refused > 5000
    _, options = WORLDS[name]
    assert bool(outcome.total("option_sent")) == bool(options & Options.DSR)
    assert bool(outcome.total("option_taken")) == bool(options & Options.ACCEPTS_DSR)
    if options & Options.XDP:
        assert outcome.total("translated", pin="forward@") > outcome.total("runs", pin="forward@") / 10


def test_parts_that_were_run_alone_are_kept_for_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The page names those that are missing."""
    page = tmp_path / "tested.md"
    monkeypatch.setenv(tested.PAGE, str(page))
    command.write({"packets": command.Part(["### Packets"], 60, "2026-11-28", "abc")})
    kept = tested.kept(command.KEPT, command.Part)
    command.write({**kept, "floods": command.Part(["### Floods"], 60, "2026-11-29")})
    text = page.read_text()
    assert "on 2026-11-29, in 2 minutes" in text
    assert "Of commits: `packets` abc." in text
    assert "Not run yet: `decoders`, `machine`, `objects`." in text
    assert text.index("### Packets") < text.index("### Floods")
