"""All checks of the kernels without a GPU, as one report: random shapes on PTX and on real threads, and planted faults.

`python -m tests.ptx.report [--shapes 240] [--parts ptx threads faults] [--output FILE]`, at night: hundreds of threads
wait for each other at every barrier. Exit code 1 where a check speaks that should not, or misses a planted fault.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests import pooling_cases, test_batch_norm_act

from .cases import Case
from .faults import FAULTS
from .module import PtxModule, watched_tensors
from .test_faults import what_is_seen
from .test_ptx import on
from .test_random_shapes import cases, near
from .threaded import SANITIZERS, Variants, record, repeated

FAMILIES = 4
PARTS = ("ptx", "threads", "faults")
WHAT = {"threads": "ThreadSanitizer", "addresses": "AddressSanitizer and UBSan"}


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

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.bad = 0

    def say(self, line: str, bad: bool = False) -> None:
        """Add a line and print it."""
        self.bad += bad
        self.lines.append(line)
        print(line, flush=True)


def on_ptx(shapes: dict[str, Case], findings: Findings) -> None:
    """Every shape on NVRTC's PTX of sm_80, threads and blocks in both orders."""
    tally: Counter[str] = Counter()
    modules: list[PtxModule] = []
    for name, case in shapes.items():
        try:
            with watched_tensors(), judged_by_few_values():
                case(on((8, 0), modules))
        except AssertionError as wrong:
            findings.say(f"PTX, {name}: {str(wrong)[:500]}", bad=True)
        else:
            tally[family(name)] += 1
    launches, blocks = sum(len(each.launched) for each in modules), sum(each.blocks for each in modules)
    said = ", ".join(f"{kind} {count}" for kind, count in tally.items())
    findings.say(f"PTX of sm_80: {tally.total()} of {len(shapes)} random shapes without a report ({said})")
    findings.say(f"  {launches} launches, {blocks} blocks, both orders of threads and blocks")


def on_threads(shapes: dict[str, Case], folder: Path, findings: Findings) -> None:
    """The launches of every shape with a thread of the operating system for each CUDA thread."""
    variants: Variants = {}
    with judged_by_few_values():
        for case in shapes.values():
            record(case, folder, variants)
    launches = sum(len(recorder.launches) for recorder in variants.values())
    for sanitizer in SANITIZERS:
        silent = 0
        for (source, options), recorder in variants.items():
            said = repeated(source, options, recorder, sanitizer, folder, seconds=7200)
            silent += not said
            if said:
                findings.say(f"{WHAT[sanitizer]}, {source.name} {' '.join(options)}: {said[:500]}", bad=True)
        findings.say(f"{WHAT[sanitizer]}: {silent} of {len(variants)} variants without a report")
    findings.say(f"  {len(shapes)} random shapes, {launches} launches, results with the bits of the serial run")


def planted(findings: Findings) -> None:
    """Every planted fault on PTX."""
    caught = 0
    for name, fault in FAULTS.items():
        seen = what_is_seen(fault)
        good = any(check in seen for check in fault.seen)
        caught += good
        if not good:
            findings.say(f"planted fault not seen: {name}: {seen[:300]}", bad=True)
    findings.say(f"planted faults: {caught} of {len(FAULTS)} seen")


def main(argv: list[str]) -> int:
    """Run everything; prints the report and writes it where `--output` says."""
    parser = argparse.ArgumentParser(description="Check the kernels on PTX, on real threads and with planted faults.")
    parser.add_argument("--shapes", type=int, default=240, help="random shapes, a quarter for each kind of kernels")
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS, help="which checks; all when left out")
    parser.add_argument("--output", type=Path, help="text file to add the report to")
    options = parser.parse_args(argv)
    shapes, findings, began = dict(cases(options.shapes // FAMILIES)), Findings(), time.monotonic()
    findings.say(f"python -m tests.ptx.report --shapes {options.shapes} --parts {' '.join(options.parts)}")
    if "ptx" in options.parts:
        on_ptx(shapes, findings)
    if "threads" in options.parts:
        with tempfile.TemporaryDirectory() as folder:
            on_threads(shapes, Path(folder), findings)
    if "faults" in options.parts:
        planted(findings)
    print(f"{(time.monotonic() - began) / 60:.0f} minutes", file=sys.stderr)
    if options.output:
        with options.output.open("a") as file:
            file.write("\n".join(findings.lines) + "\n")
    return 1 if findings.bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
