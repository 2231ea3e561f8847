"""Numbers with their goals, as a table and as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table


class Result(NamedTuple):
    """``goal`` as text (``≥ 0.98``), ``met`` where there is one; ``detail`` says how it was come by."""

    what: str
    value: float
    unit: str
    goal: str = ""
    met: bool | None = None
    detail: str = ""


def at_least(what: str, value: float, goal: float, detail: str) -> Result:
    return Result(what, value, "ratio", f"≥ {goal}", value >= goal, detail)


def at_most(what: str, value: float, unit: str, goal: float, detail: str = "") -> Result:
    return Result(what, value, unit, f"≤ {goal:g}", value <= goal, detail)


def show(title: str, results: list[Result]) -> None:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in ("what", "value", "unit", "goal", "met", "detail"):
        table.add_column(column.upper(), justify="right" if column == "value" else "left", no_wrap=True)
    for r in results:
        met = "" if r.met is None else ("yes" if r.met else "NO")
        table.add_row(r.what, f"{r.value:.3f}", r.unit, r.goal, met, r.detail)
    Console(width=240, highlight=False).print(table)
    print(flush=True)


def save(path: Path, results: dict[str, list[Result]]) -> None:
    content = {part: [result._asdict() for result in found] for part, found in results.items()}
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
