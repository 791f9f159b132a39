"""Run the quickstart with several seeds and keep what it showed: does it show learning, and in its time?

`python tools/bench_quickstart.py [FOLDER] [--seeds 0 1 2] [--half]`

A quickstart shows learning when the trained backbone is ahead of the untrained one by more than twice the standard
error, in 20-NN and in view retrieval. `--half` runs it beside a busy process for every core, which leaves it half of
the machine. Whatever else the machine did shows in the share of the cores that the quickstart had.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:
    # Python puts the script's folder on the path, not the checkout.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import resource
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass

from tools.bench.apart import output_of
from tools.bench.busy import busy
from tools.bench.rows import Report
from tools.quickstart import Gain, gains
from tools.support import cli
from train.record.comparison import images_per_second
from train.record.run import read_run
from train.versions import usable_cores


@dataclass(frozen=True)
class Outcome:
    """What one quickstart showed.

    Attributes:
        gains: figures of the untrained and the trained backbone.
        minutes: from its start to its end, without set-up.
        share: of the time of all cores that it had, 0 to 1.
        rate: images a second of its training.
    """

    gains: list[Gain]
    minutes: float
    share: float
    rate: float


def quickstart(folder: Path | None, seed: int, minutes: float, scratch: Path) -> Outcome:
    """Run it as a process of its own.

    Raises:
        RuntimeError: with the last line of what it said, when it failed.
    """
    run_dir = scratch / str(seed)
    flags = ["--seed", str(seed), "--minutes", str(minutes), "--run-dir", str(run_dir)]
    # It runs in the checkout, where a relative path would mean another place.
    images = [str(folder.resolve())] if folder else []
    before, begin = _child_seconds(), time.monotonic()
    output_of(["tools/quickstart.py", *images, *flags], "quickstart")
    seconds = time.monotonic() - begin
    run = read_run(run_dir)
    share = (_child_seconds() - before) / (seconds * usable_cores())
    return Outcome(gains(run), seconds / 60, share, images_per_second(run) or 0.0)


def _child_seconds() -> float:
    """Processor time of the processes that were waited for, and of theirs."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def add_rows(report: Report, contender: str, setting: str, outcomes: Sequence[Outcome]) -> None:
    """Rows of the figures, one value a seed."""
    for figures in zip(*(outcome.gains for outcome in outcomes), strict=True):
        label = figures[0].label
        report.add(contender, f"{label}, untrained", "%", [100 * figure.before for figure in figures], setting)
        report.add(contender, f"{label}, trained", "%", [100 * figure.after for figure in figures], setting)
        report.add(contender, f"{label}, standard error", "points", [100 * figure.error for figure in figures], setting)
    report.add(contender, "time", "min", [outcome.minutes for outcome in outcomes], setting)
    report.add(contender, "share of the cores", "%", [100 * outcome.share for outcome in outcomes], setting)
    report.add(contender, "rate", "images/s", [outcome.rate for outcome in outcomes], setting)


def conclusion(outcomes: Sequence[Outcome]) -> str:
    """One line: in how many of the seeds each figure rose clearly."""
    parts = []
    for figures in zip(*(outcome.gains for outcome in outcomes), strict=True):
        clear = sum(figure.clear for figure in figures)
        parts.append(f"{figures[0].label} in {clear} of {len(figures)} seeds")
    return f"ahead of the untrained backbone by more than twice the standard error: {', '.join(parts)}"


def main(argv: Sequence[str]) -> int:
    """Measure what the flags ask for."""
    parser = cli.make_parser("Run the quickstart with several seeds and keep what it showed.")
    parser.add_argument("folder", nargs="?", type=Path, help="images to train on; else photographs inside scikit-image")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="one quickstart each")
    parser.add_argument("--minutes", type=float, default=5.5, help="time of each, as of the quickstart")
    parser.add_argument("--half", action="store_true", help="beside a busy process for every core")
    parser.add_argument("--output", type=Path, default=None, help="CSV to append to; tools/results/quickstart.csv")
    parser.add_argument("--no-csv", action="store_true", help="print the table and keep no rows")
    options = cli.parse(parser, argv)
    others = usable_cores() if options.half else 0
    with tempfile.TemporaryDirectory(prefix="bench-quickstart-") as scratch, busy(others):
        outcomes = [quickstart(options.folder, seed, options.minutes, Path(scratch)) for seed in options.seeds]
    report = Report("quickstart")
    setting = f"{options.minutes:g} minutes, seeds {' '.join(map(str, options.seeds))}"
    if others:
        setting += f"; beside {others} busy processes"
    add_rows(report, options.folder.name if options.folder else "photographs of scikit-image", setting, outcomes)
    report.finish(conclusion(outcomes), options.output, write=not options.no_csv)
    return 0


if __name__ == "__main__":
    cli.run_main(main)
