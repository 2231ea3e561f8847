"""Sources in which a CPU is overtaken by another one: slowed down, or with what the other one does in its place.

There is one set of each kind for all tests, to be compiled once.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ebpfproxy.datapath.programs import loader


class Place(NamedTuple):
    """A part of a source that is there once, and what stands for it."""

    file: str
    part: str
    other: str


def _slow(file: str, part: str) -> Place:
    """Some microseconds before it."""
    loop = """\
#pragma clang loop unroll(disable)
for (int turn = 0; turn < 300; turn++)
bpf_ktime_get_ns();
"""
    return Place(file, part, loop + part)


#: These are places in packet programs.
OVERTAKEN = [
    # Between the look-up of an entry and its copy.
    _slow("lib/conntrack.h", "\t\t*copy = *nat;\n"),
    # Between the look-up of a flow's entry and the renewal of its slot, which each packet does: no slot is valid.
    _slow("lib/flow_cache.h", "\tslot->nat.marks = entry->marks;\n"),
    Place("lib/flow_cache.h", "return slot->sum == slot_sum", "return slot->sum + 1 == slot_sum"),
    # Before an entry is claimed for its port: its element has got that of an open flow.
    Place(
        "lib/masquerade.h",
        "\tif (conntrack_lookup(&s->key) == closed && is_closed(closed))\n",
        "\tclosed->seen = SEEN_REPLY | SEEN_CLAIMED;\n"
        "\tif (conntrack_lookup(&s->key) == closed && is_closed(closed))\n",
    ),
]
#: These are places in the sweep. A client's port, and entries with ``pad`` in their key, tell what overtakes it.
OVERTAKEN_SWEEP = [
    # After the entry of the reply direction has been claimed.
    Place(
        "sweep.c",
        "\tif (is_untouched(key, in_map, &s->nat) &&\n",
        """\
	switch (bpf_ntohs(is_reply ? key->dport : key->sport)) {
	case 1: /* a packet of one direction, or of the other */
		in_map->last = s->now;
		break;
	case 2:
		if (other)
			other->last = s->now;
		break;
	case 3: /* another element with an entry of the same flow */
		bpf_map_update_elem(MAP(conntrack), key, &s->nat, BPF_ANY);
		break;
	case 4:
		if (other)
			bpf_map_update_elem(MAP(conntrack), &s->partner_key, &s->partner, BPF_ANY);
		break;
	case 5: /* another entry in the same element */
		in_map->check++;
		break;
	case 6:
		if (other)
			other->check++;
		break;
	}
	if (is_untouched(key, in_map, &s->nat) &&
""",
    ),
    # After the masquerade of a Service's flow has ended: the client begins it once more.
    Place(
        "sweep.c",
        "\ts->partner_key = reverse_of(&s->other_key, STAGE_EGRESS);\n\tif (",
        """\
	s->partner_key = s->other_key;
	copy_from_aside(s);
	partner_key(&s->partner_key, &s->other_key, &s->nat);
	copy_from_aside(s);
	s->partner_key = reverse_of(&s->other_key, STAGE_EGRESS);
	copy_from_aside(s);
	if (""",
    ),
    Place(
        "sweep.c",
        "static __always_inline void end_unmasked(",
        """\
static __always_inline void copy_from_aside(struct sweep *s)
{
	const struct nat *aside;

	s->key = s->partner_key;
	s->key.pad = 1;
	aside = conntrack_lookup(&s->key);
	if (!aside)
		return;
	s->nat = *aside;
	bpf_map_update_elem(MAP(conntrack), &s->partner_key, &s->nat, BPF_ANY);
}

static __always_inline void end_unmasked(""",
    ),
]


def altered_sources(folder: Path, places: Sequence[Place] = OVERTAKEN) -> Path:
    """Writes them below ``folder``; returns what stands for ``bpf/``."""
    sources = folder / "bpf"
    shutil.copytree(loader.source_folder(), sources)
    for file, part, other in places:
        source = sources / file
        text = source.read_text()
        assert text.count(part) == 1, (file, part)
        source.write_text(text.replace(part, other))
    return sources
