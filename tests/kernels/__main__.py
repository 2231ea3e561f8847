"""``python -m tests.kernels [KERNEL...]``: boots kernels one after the other, and runs the tests on each.

The environment's EBPFPROXY_TESTED names the page for the results. What runs of single kernels found is kept in
``.kernels``, and the page is written as soon as there is something of every kernel.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import msgspec

from tests import tested
from tests.kernels import machine, report
from tests.kernels.kernels import AGAIN, GROUPS, KERNELS, Kernel
from tests.kernels.results import Run
from tests.kernels.root import TOP, Root, install_tools

#: Results, as JSON, and consoles of the last runs.
KEPT = TOP / ".kernels"
_TOOLS = (("mmdebstrap", "mmdebstrap"), ("qemu-system-x86_64", "qemu-system-x86"), ("mkfs.ext4", "e2fsprogs"))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.kernels", description=__doc__)
    parser.add_argument("kernels", nargs="*", metavar="KERNEL", help=f"default: all of {', '.join(KERNELS)}")
    parser.add_argument("--work", type=Path, help="a folder for the root file system, which is used again")
    parser.add_argument("--groups", help="of tests, separated by commas; what is known of others is kept")
    parser.add_argument(
        "--minutes", type=float, default=60, help="the limit for a kernel; default: %(default)s"
    )
    parser.add_argument(
        "--again", action="store_true", help="only tests that failed; what is known of others is kept"
    )
    parser.add_argument(
        "--page", action="store_true", help="only write the page, of the results that are kept"
    )
    options = parser.parse_args()
    names = options.kernels or list(KERNELS)
    if unknown := [name for name in names if name not in KERNELS]:
        parser.error(f"unknown: {', '.join(unknown)}; known: {', '.join(KERNELS)}")
    groups = tuple(options.groups.split(",")) if options.groups else ()
    if strange := [name for name in groups if name not in GROUPS]:
        parser.error(f"unknown: {', '.join(strange)}; known: {', '.join(GROUPS)}")
    if options.page:
        _write_page(of_all=False)
        return 0
    install_tools(_TOOLS)
    KEPT.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="kernels-") as temporary:
        work = options.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        chosen = {name: KERNELS[name] for name in names}
        if groups:
            chosen = {name: kernel._replace(groups=groups) for name, kernel in chosen.items()}
        good = (_run_again if options.again else _run)(chosen, work, options.minutes)
    _write_page(of_all=True)
    return 0 if good else 1


def _run(kernels: dict[str, Kernel], work: Path, minutes: float) -> bool:
    root = Root(work)
    releases = {name: root.add_kernel(kernel.suite, kernel.package) for name, kernel in kernels.items()}
    disk = work / "disk"
    root.write_disk(disk)
    all_good = True
    for name, kernel in kernels.items():
        began = time.monotonic()
        run = machine.boot(kernel, root, releases[name], disk, KEPT / f"{name}.console", minutes)
        run.day, run.seconds = date.today().isoformat(), time.monotonic() - began
        if not run.complete:
            run.stopped = report.stopped(kernel, run)
        good = report.good(kernel, run)
        print(f"\n{name}: {'good' if good else 'NOT GOOD'} in {run.seconds / 60:.0f} minutes", run.refusal)
        for each in run.results:
            if each.outcome == "failed":
                print(f"  {each.test}: {each.reason}")
        kept = KEPT / f"{name}.json"
        if kept.exists() and kernel.groups != KERNELS[name].groups:
            run = report.merged(msgspec.json.decode(kept.read_bytes(), type=Run), run, kernel.groups)
        kept.write_bytes(msgspec.json.format(msgspec.json.encode(run)))
        all_good = all_good and good
    return all_good


def _run_again(kernels: dict[str, Kernel], work: Path, minutes: float) -> bool:
    """Runs what failed alone: much depends on how slow the emulator is beside other load."""
    root = Root(work)
    kept = {name: KEPT / f"{name}.json" for name in kernels}
    before = {
        name: msgspec.json.decode(file.read_bytes(), type=Run) for name, file in kept.items() if file.exists()
    }
    releases = {}
    for name, run in before.items():
        if failed := [each.test for each in run.results if each.outcome == "failed"]:
            releases[name] = root.add_kernel(kernels[name].suite, kernels[name].package)
            root.write_tests(releases[name], failed)
    disk = work / "disk"
    root.write_disk(disk)
    for name, release in releases.items():
        kernel = kernels[name]._replace(groups=(AGAIN,))
        began = time.monotonic()
        run = machine.boot(kernel, root, release, disk, KEPT / f"{name}.console", minutes)
        both = report.repeated(before[name], run, time.monotonic() - began)
        kept[name].write_bytes(msgspec.json.format(msgspec.json.encode(both)))
        before[name] = both
    return all(report.good(kernels[name], run) for name, run in before.items())


def _write_page(*, of_all: bool) -> None:
    """``of_all``: nothing is written as long as a kernel was not run."""
    files = {name: KEPT / f"{name}.json" for name in KERNELS if (KEPT / f"{name}.json").exists()}
    if tested.PAGE not in os.environ or not files or (of_all and files.keys() != KERNELS.keys()):
        return
    runs = {name: msgspec.json.decode(file.read_bytes(), type=Run) for name, file in files.items()}
    seconds = sum(run.seconds for run in runs.values())
    day = max(date.fromisoformat(run.day) for run in runs.values())
    page = Path(os.environ[tested.PAGE])
    tested.write(page, report.TITLE, report.COMMAND, day, seconds, report.lines(KERNELS, runs))


if __name__ == "__main__":
    sys.exit(main())
