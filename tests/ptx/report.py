"""All checks of the kernels without a GPU, as one report: random shapes on PTX and under sanitizers, planted faults.

`python -m tests.ptx.report [--shapes 240] [--parts ptx fibers threads faults] [--output FILE] [--minutes M]`. With
`--minutes` it ends with code 75 at the first end of a piece behind that time; the same command goes on from there, as
it does after an interruption: what is known stands in FILE.journal until the report is whole. Exit code 1 where a check
speaks that should not, or misses a planted fault.

Parts: "ptx" runs every shape on NVRTC's PTX; "fibers" runs the source of every shape with fibers that ThreadSanitizer
takes for threads; "threads" runs the smallest shape of each variant of a source with threads of the operating system,
which cost fifty times as much; "faults" plants every fault of `faults.py` on PTX, and on fibers those that a sanitizer
can see.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests import pooling_cases, test_batch_norm_act
from tools.bench.rows import commit

from .cases import Case
from .faults import FAULTS, Fault
from .journal import Journal, OtherRun
from .module import PtxModule, watched_tensors
from .test_faults import what_is_seen
from .test_ptx import on
from .test_random_shapes import cases, near
from .threaded import SANITIZERS, Recorder, Variant, complaints, record, repeated

FAMILIES = ("norm", "soft", "box", "augmentation")
PARTS = ("ptx", "fibers", "threads", "faults")
GO_ON = 75
WHAT = {"threads": "ThreadSanitizer", "addresses": "AddressSanitizer and UBSan"}


class TimeOver(Exception):
    """The minutes are over; what is known is in the journal."""


@contextmanager
def judged_by_few_values() -> Iterator[None]:
    """Within the block random shapes are held to the tolerance of `near`."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (test_batch_norm_act, pooling_cases):
            patch.setattr(module, "check_twice_eager", near)
        yield


def family(name: str) -> str:
    """The kind of kernels in the name of a random case: "3 norm (4, 7, 3, 3, 2) torch.float32" -> "norm"."""
    return name.split()[1]


class Findings:
    """Lines of the report, and how many of them are bad."""

    def __init__(self, journal: Journal, deadline: float) -> None:
        self.journal, self.deadline = journal, deadline
        self.lines: list[str] = []
        self.bad = 0

    def say(self, line: str, bad: bool = False) -> None:
        """Add a line and print it."""
        self.bad += bad
        self.lines.append(line)
        print(line, flush=True)

    def piece(self, name: str, work: Any, *arguments: Any) -> Any:
        """The result of a piece of work, from the journal or done now.

        Raises:
            TimeOver: it is not known and the time is over.
        """
        if name not in self.journal.known and time.monotonic() > self.deadline:
            raise TimeOver
        return self.journal.result(name, lambda: work(*arguments))


def on_ptx(case: Case) -> dict[str, Any]:
    """One shape on NVRTC's PTX of sm_80, threads and blocks in both orders."""
    modules: list[PtxModule] = []
    said = ""
    try:
        with watched_tensors(), judged_by_few_values():
            case(on((8, 0), modules))
    except AssertionError as wrong:
        said = str(wrong)[:500] or "an assertion fails"
    launches, blocks = sum(len(each.launched) for each in modules), sum(each.blocks for each in modules)
    return {"said": said, "launches": launches, "blocks": blocks}


def all_on_ptx(shapes: dict[str, Case], findings: Findings) -> None:
    """Every shape on PTX."""
    results = {name: findings.piece(f"ptx {name}", on_ptx, case) for name, case in shapes.items()}
    for name, result in results.items():
        if result["said"]:
            findings.say(f"PTX, {name}: {result['said']}", bad=True)
    silent = [family(name) for name, result in results.items() if not result["said"]]
    counted = ", ".join(f"{kind} {silent.count(kind)}" for kind in FAMILIES)
    findings.say(f"PTX of sm_80: {len(silent)} of {len(shapes)} random shapes without a report ({counted})")
    launches, blocks = (sum(result[key] for result in results.values()) for key in ("launches", "blocks"))
    findings.say(f"  {launches} launches, {blocks} blocks, both orders of threads and blocks")


def recorded(shapes: dict[str, Case]) -> dict[Variant, list[Recorder]]:
    """What each shape launches of each variant of a source."""
    found: dict[Variant, list[Recorder]] = {}
    with judged_by_few_values():
        for case in shapes.values():
            for variant, recorder in record(case).items():
                found.setdefault(variant, []).append(recorder)
    return found


def under_sanitizers(shapes: dict[str, Case], form: str) -> list[dict[str, Any]]:
    """Each variant of one kind of kernels under each sanitizer: all shapes on fibers, the smallest one on threads."""
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for variant, recorders in recorded(shapes).items():
            taken = recorders if form == "fibers" else [min(recorders, key=lambda each: each.threads)]
            launches = [launch for recorder in taken for launch in recorder.launches]
            said = {each: repeated(variant, launches, each, form, Path(folder), seconds=3600) for each in SANITIZERS}
            label = f"{variant[0].name} {' '.join(variant[1])}"
            results.append({"variant": label, "shapes": len(taken), "launches": len(launches), "said": said})
    return results


def all_under_sanitizers(shapes: dict[str, Case], form: str, findings: Findings) -> None:
    """Every kind of kernels under the sanitizers, one kind a piece."""
    results = []
    for kind in FAMILIES:
        of_kind = {name: case for name, case in shapes.items() if family(name) == kind}
        results += findings.piece(f"{form} {kind}", under_sanitizers, of_kind, form)
    for sanitizer, called in WHAT.items():
        for result in results:
            if result["said"][sanitizer]:
                findings.say(f"{called}, {form}, {result['variant']}: {result['said'][sanitizer][:500]}", bad=True)
        silent = sum(not result["said"][sanitizer] for result in results)
        findings.say(f"{called}, {form}: {silent} of {len(results)} variants without a report")
    which = f"all {len(shapes)} random shapes" if form == "fibers" else "the smallest shape of each variant"
    launches = sum(result["launches"] for result in results)
    orders = ", each in both orders of threads and blocks" if form == "fibers" else ""
    findings.say(f"  {which}, {launches} launches{orders}; results have the bits of the serial run")


def seen_on_fibers(fault: Fault) -> dict[str, str]:
    """What each sanitizer says of a planted fault, on fibers."""
    with tempfile.TemporaryDirectory() as folder:
        return {each: complaints(fault.case, each, "fibers", Path(folder), fault.plant)[:500] for each in SANITIZERS}


def planted(findings: Findings) -> None:
    """Every planted fault, on PTX and on fibers."""
    on_ptx = {name: findings.piece(f"fault on PTX {name}", what_is_seen, fault) for name, fault in FAULTS.items()}
    for name, seen in on_ptx.items():
        if not any(check in seen for check in FAULTS[name].seen):
            findings.say(f"planted fault not seen on PTX: {name}: {seen[:300]}", bad=True)
    caught = sum(any(check in seen for check in FAULTS[name].seen) for name, seen in on_ptx.items())
    findings.say(f"planted faults on PTX: {caught} of {len(FAULTS)} seen by the check that is meant to see them")
    visible = {name: fault for name, fault in FAULTS.items() if not fault.on_ptx_alone}
    said = {name: findings.piece(f"fault on fibers {name}", seen_on_fibers, fault) for name, fault in visible.items()}
    for name in visible:
        if not any(said[name].values()):
            findings.say(f"planted fault not seen on fibers: {name}", bad=True)
    for sanitizer, called in WHAT.items():
        findings.say(f"  {called}, fibers: {sum(bool(each[sanitizer]) for each in said.values())} of {len(visible)}")
    caught = sum(any(each.values()) for each in said.values())
    findings.say(f"planted faults on fibers: {caught} of {len(visible)} seen")
    for name, fault in FAULTS.items():
        if fault.on_ptx_alone:
            findings.say(f"  not tried there: {name}: {fault.on_ptx_alone}")


def arguments(argv: list[str]) -> argparse.Namespace:
    """The command's options."""
    parser = argparse.ArgumentParser(description="Check the kernels on PTX, under sanitizers and with planted faults.")
    parser.add_argument("--shapes", type=int, default=240, help="random shapes, a quarter for each kind of kernels")
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS, help="which checks; all when left out")
    parser.add_argument(
        "--output", type=Path, help="text file for the report; what is known stands beside it until then"
    )
    parser.add_argument("--minutes", type=float, default=float("inf"), help="end then, to be started again")
    return parser.parse_args(argv)


def run(options: argparse.Namespace, findings: Findings) -> None:
    """The parts that were asked for.

    Raises:
        TimeOver: the minutes are over.
    """
    shapes = dict(cases(options.shapes // len(FAMILIES)))
    if "ptx" in options.parts:
        all_on_ptx(shapes, findings)
    for form in ("fibers", "threads"):
        if form in options.parts:
            all_under_sanitizers(shapes, form, findings)
    if "faults" in options.parts:
        planted(findings)


def main(argv: list[str]) -> int:
    """Run everything; prints the report and writes it where `--output` says."""
    options, began = arguments(argv), time.monotonic()
    heading = [f"python -m tests.ptx.report --shapes {options.shapes} --parts {' '.join(options.parts)}"]
    heading.append(f"commit {commit()}")
    beside = options.output and options.output.with_name(options.output.name + ".journal")
    try:
        journal = Journal(beside, ", ".join(heading))
    except OtherRun as other:
        print(other, file=sys.stderr)
        return 2
    findings = Findings(journal, began + 60 * options.minutes)
    try:
        run(options, findings)
    except TimeOver:
        print(f"{len(journal.known)} pieces are known; the same command goes on", file=sys.stderr)
        return GO_ON
    print(f"{(time.monotonic() - began) / 60:.0f} minutes", file=sys.stderr)
    if options.output:
        options.output.write_text("\n".join(heading + findings.lines) + "\n")
    journal.remove()
    return 1 if findings.bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
