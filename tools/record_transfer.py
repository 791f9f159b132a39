"""Append what transfer reached to `tools/results/transfer.csv`: the figures of result files of `train/evaluate.py`.

`python tools/record_transfer.py runs/regioncl-m/eval-detect-mask-rcnn-fpn-1x.json`
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:
    # Python puts the script's folder on the path, not the checkout.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from collections.abc import Sequence
from typing import Any

from tools.bench.rows import Report, Summary, recorded_origin
from tools.support.cli import make_parser, parse, run_main
from train.record.evaluations import NAMES, measurements
from train.record.run import read_results


def setting_of(facts: dict[str, Any]) -> str:
    """The trained backbone and the data it was evaluated on, in the words of a row."""
    settings = facts["settings"]
    val = "the same" if facts["data_hash"] == facts["val_data_hash"] else f"{facts['val_images']} others"
    parts = [
        facts["arch"],
        "random weights" if facts["untrained"] or not facts.get("method") else facts["method"],
        f"{facts['train_images']} images, measured on {val}",
        f"steps of {facts['global_batch']}",
        f"lr {facts['lr']:g}" if "lr" in facts else "",
        f"short side {'/'.join(map(str, facts['sizes']['train']))} px" if "sizes" in facts else "",
        f"{facts['dtype']}, {facts['world_size']} rank(s), seed {settings['seed']}",
    ]
    return ", ".join(part for part in parts if part)


def record(path: Path) -> Report:
    """The rows of one result file, with the machine and the versions that it recorded.

    Raises:
        ValueError: when it is no result of a transfer protocol.
    """
    found = read_results([path])
    if path.name not in found or found[path.name]["protocol"] not in ("detect", "segment"):
        raise ValueError(f"{path} is no result of detect or segment; give a file that train/evaluate.py wrote")
    facts = found[path.name]
    report = Report("transfer", origin=recorded_origin(facts["versions"], facts.get("machine", "")))
    for measured in measurements(path.name, facts):
        for name, percent in measured.figures.items():
            value = Summary(percent / 100, percent / 100, percent / 100, 1)
            report.add(measured.task, NAMES[name], "share", value, setting_of(facts))
    return report


def main(argv: Sequence[str]) -> int:
    """Record the result files that the command line names; returns the exit code."""
    parser = make_parser("Append figures of transfer to tools/results/transfer.csv.")
    parser.add_argument("results", nargs="+", type=Path, metavar="RESULT", help="result files of detect or segment")
    parser.add_argument("--output", type=Path, default=None, help="CSV to append to; tools/results/transfer.csv")
    arguments = parse(parser, argv)
    # All are read before the first is written: a file that is no result leaves no rows of the others.
    for path, report in [(path, record(path)) for path in arguments.results]:
        report.finish(f"{path} recorded", arguments.output)
    return 0


if __name__ == "__main__":
    run_main(main)
