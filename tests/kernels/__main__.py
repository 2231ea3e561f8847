"""``python -m tests.kernels [KERNEL...]``: boots kernels one after the other, and runs the tests on each.

The environment's EBPFPROXY_TESTED names the page for the results, and what other runs have found of other kernels and
groups of tests is kept there (:mod:`tests.tested`).
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

from tests import tested
from tests.kernels import machine, report
from tests.kernels.kernels import AGAIN, GROUPS, KERNELS, SETTINGS, Kernel
from tests.kernels.packages import install_tools
from tests.kernels.results import Run, folded
from tests.kernels.root import TOP, Root

#: Consoles of the last runs.
CONSOLES = TOP / ".kernels"
#: The name under which results are kept.
KEPT = "kernels"
_ALL = KERNELS | SETTINGS
_TOOLS = (("mmdebstrap", "mmdebstrap"), ("mkfs.ext4", "e2fsprogs"))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.kernels", description=__doc__)
    parser.add_argument("kernels", nargs="*", metavar="KERNEL", help=f"default: all of {', '.join(_ALL)}")
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
    names = options.kernels or list(_ALL)
    if unknown := [name for name in names if name not in _ALL]:
        parser.error(f"unknown: {', '.join(unknown)}; known: {', '.join(_ALL)}")
    groups = tuple(options.groups.split(",")) if options.groups else ()
    if strange := [name for name in groups if name not in GROUPS]:
        parser.error(f"unknown: {', '.join(strange)}; known: {', '.join(GROUPS)}")
    if options.page:
        write_page()
        return 0
    install_tools(_TOOLS)
    CONSOLES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="kernels-") as temporary:
        work = options.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        chosen = {name: _ALL[name] for name in names}
        if groups:
            chosen = {name: kernel._replace(groups=groups) for name, kernel in chosen.items()}
        good = (_run_again if options.again else _run)(chosen, work, options.minutes)
    return 0 if good else 1


def _run(kernels: dict[str, Kernel], work: Path, minutes: float) -> bool:
    root = Root(work)
    releases = {name: root.add_kernel(kernel.suite, kernel.package) for name, kernel in kernels.items()}
    disk = work / "disk"
    root.write_disk(disk)
    commit = tested.commit()
    all_good = True
    for name, kernel in kernels.items():
        began = time.monotonic()
        run = _boot(kernel, root, releases[name], disk, minutes)
        run.day, run.seconds = date.today().isoformat(), time.monotonic() - began
        run.commit = commit
        if not run.complete:
            run.stopped = report.stopped(kernel, run)
        good = report.good(kernel, run)
        print(f"\n{name}: {'good' if good else 'NOT GOOD'} in {run.seconds / 60:.0f} minutes", run.refusal)
        for each in run.results:
            if each.outcome == "failed":
                print(f"  {each.test}: {each.reason}")
        known = tested.kept(KEPT, Run)
        if name in known and kernel.groups != _ALL[name].groups:
            run = report.merged(known[name], run, kernel.groups)
        _keep(name, run)
        all_good = all_good and good
    return all_good


def _boot(kernel: Kernel, root: Root, release: str, disk: Path, minutes: float) -> Run:
    return machine.boot(
        machine.on_disk(kernel, root, release, disk), CONSOLES / f"{kernel.name}.console", minutes
    )


def _run_again(kernels: dict[str, Kernel], work: Path, minutes: float) -> bool:
    """Runs what failed alone: much depends on how slow the emulator is beside other load."""
    root = Root(work)
    before = {name: run for name, run in tested.kept(KEPT, Run).items() if name in kernels}
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
        run = _boot(kernel, root, release, disk, minutes)
        before[name] = report.repeated(before[name], run, time.monotonic() - began)
        _keep(name, before[name])
    return all(report.good(kernels[name], run) for name, run in before.items())


def _keep(name: str, run: Run) -> None:
    """A later kernel may not end."""
    tested.keep(KEPT, tested.kept(KEPT, Run) | {name: folded(run)})
    write_page()


def write_page() -> None:
    """Writes the section, of what is kept."""
    known = tested.kept(KEPT, Run)
    runs = {name: known[name] for name in _ALL if name in known}
    if not runs:
        return
    seconds = sum(run.seconds for run in runs.values())
    day = max(date.fromisoformat(run.day) for run in runs.values())
    page = Path(os.environ[tested.PAGE])
    tested.write(page, report.TITLE, report.COMMAND, day, seconds, report.lines(KERNELS, SETTINGS, runs))


if __name__ == "__main__":
    sys.exit(main())
