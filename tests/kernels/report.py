"""The section of docs/tested.md: features and tests by kernel."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

import msgspec

from tests.kernels.kernels import DEVICES, GROUPS, LEFT_OUT, Kernel, group_of, network_of
from tests.kernels.results import Result, Run, folded
from tests.tested import table

TITLE = "Kernels"
COMMAND = "make test-kernels"
_ABOUT = (
    "Kernels of Debian's suites, each booted in an emulator (qemu without KVM, two processors) with Debian 12's root "
    "file system. The agent's own probe says if it runs there, and which of the optional features it uses. A cell has "
    "the tests that passed, of those that ran; what is empty was not run. Tests with "
    f"{LEFT_OUT.replace(' or ', ', ')} in their names were left out: they take too long in an emulator, or do without "
    "tcx what kernels before 6.6 do anyway."
)


def lines(
    kernels: Mapping[str, Kernel], settings: Mapping[str, Kernel], runs: Mapping[str, Run]
) -> list[str]:
    """Returns the section's Markdown, below its heading.

    ``kernels`` run all groups of tests; ``settings`` are built or booted otherwise, have tables of their own.
    """
    ran = {name: runs[name] for name in kernels if name in runs and runs[name].machine}
    others = {name: runs[name] for name in settings if name in runs and runs[name].machine}
    left = [name for name in (*kernels, *settings) if name not in runs]
    return [
        _ABOUT,
        *(["", f"Not run: {', '.join(left)}."] if left else []),
        "",
        *_tables(kernels, ran),
        *(["### Other builds and settings", "", *_tables(settings, others)] if others else []),
    ]


def _tables(kernels: Mapping[str, Kernel], ran: Mapping[str, Run]) -> list[str]:
    """Returns tables with a column for each kernel."""
    head = ["", *ran]
    properties = []
    if any(kernels[name].arguments for name in ran):
        properties.append(["arguments of the kernel", *(_code(kernels[name].arguments) for name in ran)])
    for each in _names(run.machine for run in ran.values()):
        if each != "version":
            properties.append([each, *(_escaped(run.machine.get(each, "")) for run in ran.values())])
    properties.append(["last run", *(run.day for run in ran.values())])
    properties.append(["last run of commit", *(run.commit for run in ran.values())])
    features = [["the agent's probe", *("refuses" if run.refusal else "accepts" for run in ran.values())]]
    for each in _names(run.features for run in ran.values()):
        features.append([_code(each), *(_yes_no(run.features.get(each)) for run in ran.values())])
    refusals = [[name, _escaped(run.refusal)] for name, run in ran.items() if run.refusal]
    return [
        *table(head, properties),
        *table(head, features),
        *(table(["", "refused with"], refusals) if refusals else []),
        *table(
            ["tests", *ran],
            [[group, *(_cell(run, group) for run in ran.values())] for group in _groups(ran.values())],
        ),
        *_networks(ran),
        *_reasons("failed", "tests that failed", ran),
        *_repetitions(ran),
        *_reasons("skipped", "why tests were skipped", ran),
    ]


def good(kernel: Kernel, run: Run) -> bool:
    """True if a run ended as it should: all tests passed or skip themselves, or the agent refused as expected."""
    if kernel.refused or run.refusal:
        return bool(kernel.refused) and kernel.refused in run.refusal
    has_failed = any(each.outcome == "failed" for each in run.results)
    return run.complete and bool(run.results or run.passed) and not has_failed


def stopped(kernel: Kernel, run: Run) -> list[str]:
    """Returns the groups that had not ended when a kernel was stopped: pytest runs them folder by folder."""
    ran = Counter(group_of(each.test) for each in run.results)
    return [each for each in kernel.groups if each not in run.planned or ran[each] < run.planned[each]]


def merged(before: Run, run: Run, groups: Iterable[str]) -> Run:
    """Returns a run of some groups of tests with what an earlier run found in the others."""
    others = [each for each in before.results if group_of(each.test) not in groups]
    unfinished = [each for each in before.stopped if each not in groups]
    run = folded(run)
    return msgspec.structs.replace(
        run,
        results=[*others, *run.results],
        passed=run.passed | {group: of for group, of in before.passed.items() if group not in groups},
        repeated=[each for each in before.repeated if group_of(each) not in groups],
        stopped=[*unfinished, *run.stopped],
        seconds=before.seconds + run.seconds,
    )


def repeated(before: Run, run: Run, seconds: float) -> Run:
    """Returns a run with the outcomes of the tests that failed and were run again; some no longer exist."""
    again = {each.test: each for each in run.results}
    after = msgspec.structs.replace(
        before,
        results=[
            again.get(each.test, each)
            for each in before.results
            if each.test in again or each.outcome != "failed" or not run.complete
        ],
        repeated=sorted({*before.repeated, *again}),
        seconds=before.seconds + seconds,
    )
    return folded(after)


def _names(found: Iterable[Mapping[str, object]]) -> list[str]:
    """Returns the keys of all, in the order in which they first come."""
    return list(dict.fromkeys(name for each in found for name in each))


def _tests(run: Run) -> list[str]:
    return [each.test for each in run.results]


def _yes_no(value: bool | None) -> str:
    return "" if value is None else "yes" if value else "no"


def _code(text: str) -> str:
    return f"`{text}`" if text else ""


def _groups(runs: Iterable[Run]) -> list[str]:
    found = {group for run in runs for group in (*run.passed, *map(group_of, _tests(run)))}
    found |= {group for run in runs for group in run.stopped}
    return [name for name in (*GROUPS, "other") if name in found]


def _cell(run: Run, group: str) -> str:
    counts = Counter(each.outcome for each in run.results if group_of(each.test) == group)
    counts["passed"] += sum(run.passed.get(group, {}).values())
    if not counts.total():
        return "not run" if group in run.stopped else ""
    tried = counts["passed"] + counts["failed"]
    skipped = f", {counts['skipped']} skipped" if counts["skipped"] else ""
    rest = ", stopped" if group in run.stopped else ""
    return f"{counts['passed']} of {tried}{skipped}{rest}"


def _networks(ran: Mapping[str, Run]) -> list[str]:
    """Returns a row for each network of the tests of kinds of devices."""
    counts: dict[str, dict[str, Counter[str]]] = {}
    for kernel, run in ran.items():
        for title, count in run.passed.get(DEVICES, {}).items():
            counts.setdefault(title, {}).setdefault(kernel, Counter())["passed"] += count
        for each in run.results:
            if title := network_of(each.test):
                counts.setdefault(title, {}).setdefault(kernel, Counter())[each.outcome] += 1
    counts.pop("", None)
    rows = [
        [title, *(_tried(of.get(kernel, Counter())) for kernel in ran)]
        for title, of in sorted(counts.items())
    ]
    return table([DEVICES, *ran], rows) if rows else []


def _tried(outcomes: Counter[str]) -> str:
    tried = outcomes["passed"] + outcomes["failed"]
    return f"{outcomes['passed']} of {tried}" if tried else ""


def _reasons(outcome: str, head: str, ran: Mapping[str, Run]) -> list[str]:
    """Returns a row for each reason, or each failed test, with its number of tests by kernel."""
    counts = {
        name: Counter(_label(each) for each in run.results if each.outcome == outcome)
        for name, run in ran.items()
    }
    labels = sorted({label for count in counts.values() for label in count})
    rows = [[_escaped(label), *(str(count[label] or "") for count in counts.values())] for label in labels]
    return table([head, *ran], rows) if rows else []


def _repetitions(ran: Mapping[str, Run]) -> list[str]:
    """Returns a row for each test that failed beside others and passed alone."""
    passed = {
        name: {*run.repeated} - {each.test for each in run.results if each.outcome != "passed"}
        for name, run in ran.items()
    }
    rows = [
        [_escaped(test), *("passed" if test in tests else "" for tests in passed.values())]
        for test in sorted({test for tests in passed.values() for test in tests})
    ]
    return table(["tests that failed, and were run again, alone", *ran], rows) if rows else []


def _label(result: Result) -> str:
    return result.reason if result.outcome == "skipped" else result.test


def _escaped(text: str) -> str:
    return text.replace("|", r"\|").replace("[", r"\[")
