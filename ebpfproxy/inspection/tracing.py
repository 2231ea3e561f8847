"""A trace of this node, for whoever shows its rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from ebpfproxy.datapath.kernel.maps import MapSet
from ebpfproxy.datapath.kernel.roots import find_cgroup_root, is_locked
from ebpfproxy.inspection.agent import reasons_soon
from ebpfproxy.trace.session import Filter, Session, TraceError, always, session


@contextmanager
def traced(
    bpf_root: Path, maps: MapSet, wanted: Filter, goes_on: Callable[[], bool] = always
) -> Iterator[Session]:
    """Begins a trace, and ends it. Raises TraceError and TracingInUseError.

    It is waited for while ``goes_on`` says so; then EndedError is raised.
    """
    if not is_locked(bpf_root):
        raise TraceError("the agent is not running: it attaches the programs that trace needs")
    with session(maps, find_cgroup_root(), wanted, partial(reasons_soon, bpf_root), goes_on) as made:
        yield made


def said(*, is_reported: bool) -> str:
    """What there is to say when that has changed."""
    return "tracing" if is_reported else "not tracing: the agent has ended, or this was held up"
