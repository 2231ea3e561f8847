"""From answers to rows of a table, a sentence for each failure, and JUnit's XML."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from xml.etree import ElementTree

import msgspec

PASSED, FAILED, SKIPPED = "passed", "failed", "skipped"


class Failure(msgspec.Struct, frozen=True, kw_only=True):
    """One sentence, and the command that tells more."""

    sentence: str
    explain: str
    client: str = ""
    address: str = ""


def failure(client: str, service: str, where: str, expected: str, came: str, *, explain: str) -> Failure:
    """``where``: address, port and protocol as they were asked; ``came``: what came instead."""
    sentence = f"{client} asked {service} at {where} and expected {expected}, but: {came}."
    return Failure(sentence=sentence, explain=explain, client=client, address=where)


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """One question's. ``asked``: how many times."""

    check: str
    protocol: str = ""
    family: str = ""
    asked: int = 0
    skipped: str = ""
    failure: Failure | None = None


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """The results of one check, with a protocol, over a family. ``why`` it is skipped."""

    check: str
    protocol: str
    family: str
    result: str
    asked: int
    why: str
    failures: tuple[Failure, ...]


class Report(msgspec.Struct, frozen=True, kw_only=True):
    good: bool
    where: str
    rows: tuple[Row, ...]
    remarks: tuple[str, ...]


def report(results: Iterable[Result], where: str, remarks: Sequence[str]) -> Report:
    """Rows are in the order in which checks came first. A check that was skipped somewhere else counts."""
    groups: dict[tuple[str, str, str], list[Result]] = {}
    for each in results:
        groups.setdefault((each.check, each.protocol, each.family), []).append(each)
    rows = tuple(_row(*key, found) for key, found in groups.items())
    good = all(row.result != FAILED for row in rows) and any(row.result == PASSED for row in rows)
    return Report(good=good, where=where, rows=rows, remarks=tuple(remarks))


def _row(check: str, protocol: str, family: str, found: list[Result]) -> Row:
    failures = tuple(each.failure for each in found if each.failure is not None)
    asked = sum(each.asked for each in found)
    why = next((each.skipped for each in found if each.skipped), "")
    result = FAILED if failures else PASSED if asked else SKIPPED
    return Row(
        check=check,
        protocol=protocol,
        family=family,
        result=result,
        asked=asked,
        why=why,
        failures=failures,
    )


def junit(found: Report) -> str:
    """A suite with a case for each row, as CI systems read it."""
    counts = {FAILED: 0, SKIPPED: 0}
    suite = ElementTree.Element("testsuite", name=f"ebpfproxy test: {found.where}")
    for row in found.rows:
        name = " ".join(filter(None, (row.check, row.protocol, row.family)))
        case = ElementTree.SubElement(suite, "testcase", classname="ebpfproxy.test", name=name)
        if row.result in counts:
            counts[row.result] += 1
        if row.result == SKIPPED:
            ElementTree.SubElement(case, "skipped", message=row.why)
        elif row.failures:
            made = ElementTree.SubElement(case, "failure", message=row.failures[0].sentence)
            made.text = "\n".join(f"{each.sentence}\n  {each.explain}" for each in row.failures)
    suite.set("tests", str(len(found.rows)))
    suite.set("failures", str(counts[FAILED]))
    suite.set("skipped", str(counts[SKIPPED]))
    ElementTree.indent(suite)
    return ElementTree.tostring(suite, encoding="unicode", xml_declaration=True)
