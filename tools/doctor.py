"""Say what is wrong, and what to do: with this machine, a packed file, a run, or a run that is to be started.

`python tools/doctor.py`, `python tools/doctor.py photos.beton`, `python tools/doctor.py runs/regioncl-m`,
`python tools/doctor.py --method regioncl-m --data photos.beton`.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:
    # Python puts the script's folder on the path, not the checkout.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import json
from collections.abc import Iterable, Sequence

from tools.preflight.examine import examine_run, plain
from tools.support.cli import call, make_parser, parse, run_main
from tools.support.machine import check_environment
from train.errors import EXIT_BAD_IMAGES, EXIT_USER_MISTAKE, UserMistake
from train.record.diagnosis import Finding, diagnose
from train.record.run import CONFIG, read_run

_MARKS = {"ok": "ok   ", "note": "note ", "fault": "FAULT"}
_INTENDED = ("--", "--method", "--data", "--recipe", "--config")
"""Words by which the arguments are those of a run that is to be started."""


def examine(target: str, decode: int) -> Iterable[Finding]:
    """The findings about one target: a run's folder or a packed file.

    Raises:
        UserMistake: it is neither.
    """
    path = Path(target)
    if (path / CONFIG).is_file():
        return diagnose(read_run(path))
    if path.is_file():
        # Only here: it compiles the checker of JPEG files, 1.6 s that `--help` and a run's folder need not cost.
        from tools.support.packed import check_packed

        return check_packed(path, decode)
    if path.is_dir():
        raise UserMistake(f"{path} has no {CONFIG}; give a run's folder or a packed file")
    raise UserMistake(f"{path} does not exist; give a run's folder or a packed file")


def show(findings: Iterable[Finding]) -> int:
    """Print each finding as it comes, with its remedy below it; the number of faults."""
    faults = 0
    for finding in findings:
        faults += finding.level == "fault"
        print(f"{_MARKS[finding.level]}  {finding.text}")
        if finding.remedy:
            print(f"{'':7}-> {finding.remedy}", flush=True)
    return faults


def show_in_lines(findings: Iterable[Finding], as_json: bool) -> int:
    """Print each finding and its remedy on one line as it comes, or all as JSON; the number of faults."""
    kept = []
    for finding in findings:
        kept.append(finding)
        if not as_json:
            remedy = f"; {finding.remedy}" if finding.remedy else ""
            print(f"{_MARKS[finding.level]}  {finding.text}{remedy}", flush=True)
    if as_json:
        print(json.dumps([plain(finding) for finding in kept], indent=1))
    return sum(finding.level == "fault" for finding in kept)


def is_intended_run(argv: Sequence[str]) -> bool:
    """Whether the arguments are those of `train/main.py`."""
    return any(argument.partition("=")[0] in _INTENDED for argument in argv)


def look_ahead(argv: Sequence[str]) -> int:
    """Examine the run that `train/main.py` would make of the arguments; 0 without a fault, 2 with one."""
    own = ("--", "--json")
    arguments = [argument for argument in argv if argument not in own]
    return EXIT_USER_MISTAKE if show_in_lines(examine_run(arguments), "--json" in argv) else 0


def run(argv: Sequence[str]) -> int:
    """Examine what the command line names; 0 without a fault, 2 with one, 3 for damaged records."""
    if is_intended_run(argv):
        return look_ahead(argv)
    parser = make_parser(
        "Say what is wrong with this machine, a packed file or a run, and what to do about it. With the arguments of "
        "train/main.py: with that run before it starts, within a minute; --json prints that for machines."
    )
    parser.add_argument(
        "targets", nargs="*", metavar="TARGET", help="packed files or run folders; this machine when none"
    )
    parser.add_argument("--decode", type=int, default=256, help="records of a packed file to decode; 0 for all of them")
    arguments = parse(parser, argv)
    if arguments.decode < 0:
        raise UserMistake(f"--decode {arguments.decode}: must not be negative")
    if not arguments.targets:
        return EXIT_USER_MISTAKE if show(check_environment()) else 0
    code = 0
    for target in arguments.targets:
        print(target)
        if show(examine(target, arguments.decode or sys.maxsize)):
            code = max(code, EXIT_USER_MISTAKE if Path(target).is_dir() else EXIT_BAD_IMAGES)
    return code


def main(argv: Sequence[str]) -> int:
    """The exit code; mistakes become one line on standard error."""
    return call(run, argv)


if __name__ == "__main__":
    run_main(main)
