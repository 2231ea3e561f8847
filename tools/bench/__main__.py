"""``python -m tools.bench``: what ``make bench`` runs."""

from __future__ import annotations

import argparse
from pathlib import Path

from tools.bench import agent, choice, events, hooks, measures, outside, real, sockets
from tools.bench.results import Result, save, show

PARTS = ("agent", "hooks", "choice", "sockets", "outside", "events", "measures")


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Ratios measured in one run; goals are shown, never asserted."
    )
    parser.add_argument("--seconds", type=float, default=0.2, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=30, help="of measurements, in random order")
    parser.add_argument("--only", default=",".join(PARTS), help="parts, separated by commas")
    parser.add_argument(
        "--base",
        type=Path,
        metavar="CHECKOUT",
        help="another version, whose programs the part hooks runs in the same rounds",
    )
    parser.add_argument("--json", type=Path, help="write the results here")
    options = parser.parse_args()
    results: dict[str, list[Result]] = {}
    if "agent" in options.only:
        results["agent"] = agent.run() + real.run()
        show("The agent", results["agent"])
    if "hooks" in options.only:
        results["hooks"] = hooks.run(options.rounds, options.base)
        show("Run time of all programs, for each operation", results["hooks"])
    if "choice" in options.only:
        results["choice"] = choice.run(options.rounds * 3)
        show("Choosing a backend, against choosing it at random", results["choice"])
    if "sockets" in options.only:
        results["sockets"] = sockets.run(options.seconds, options.rounds)
        show("Through a ClusterIP, against the pod itself", results["sockets"])
    if "outside" in options.only:
        results["outside"] = outside.run(options.seconds, max(1, options.rounds // 2))
        show("From outside through a NodePort, against the pod reached by route", results["outside"])
    if "events" in options.only:
        results["events"] = events.run(options.seconds, options.rounds)
        show("Reporting decisions (ebpfproxy trace)", results["events"])
    if "measures" in options.only:
        results["measures"] = measures.run(options.seconds, options.rounds)
        show("Measuring connections (measureConnections)", results["measures"])
    if options.json:
        save(options.json, results)
        print(f"written to {options.json}")


if __name__ == "__main__":
    main()
