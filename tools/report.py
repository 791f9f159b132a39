"""Write one offline page about a run, or several side by side: `python tools/report.py runs/regioncl-m [RUN ...]`."""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:
    # Python puts the script's folder on the path, not the checkout.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from collections.abc import Sequence

from tools.support.cli import call, make_parser, parse, run_main
from train.errors import UserMistake
from train.record.page import build_report


def write(argv: Sequence[str]) -> int:
    """Write the page and say where it is."""
    parser = make_parser("Write one offline page about a run, or several side by side.")
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="run folders")
    parser.add_argument("--out", type=Path, help="file to write; report.html in the first run's folder when not given")
    arguments = parse(parser, argv)
    if not arguments.runs:
        raise UserMistake("no run was named; give one or more run folders, for example runs/regioncl-m")
    out = arguments.out or arguments.runs[0] / "report.html"
    build_report(arguments.runs, out)
    print(out)
    return 0


def main(argv: Sequence[str]) -> int:
    """The exit code; mistakes become one line on standard error."""
    return call(write, argv)


if __name__ == "__main__":
    run_main(main)
