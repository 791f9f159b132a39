"""Append what runs learned to `tools/results/learning.csv`: k-NN and view retrieval by epoch, images per second,
and the results of `train/evaluate.py` in the run's folder.

`python tools/record_run.py runs/regioncl-m runs/moco-v2`
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:
    # Python puts the script's folder on the path, not the checkout.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import json
from collections.abc import Sequence
from typing import Any

from tools.bench.rows import Report, Summary, recorded_origin
from tools.support.cli import make_parser, parse, run_main
from train.record.evaluations import measurements
from train.record.run import read_run
from train.resolve import changed_fields, resolve


def _single(value: float) -> Summary:
    """A figure that was measured once."""
    return Summary(value, value, value, 1)


def _flags(config: dict[str, Any]) -> list[str]:
    """Settings in which a run differs from the recipe of its name, as `flag value`."""
    recipe = resolve(["--method", config["run"]["method"], "--recipe", config["run"]["recipe"]])
    made = json.loads(json.dumps(recipe.to_json()))
    changes = changed_fields({**made, "run": config["run"]}, config)
    return [change.split(": ", 1)[0] + " " + change.rpartition(" -> ")[2] for change in changes]


def record(run_dir: Path) -> Report:
    """The rows of one run, with the machine and the versions that it recorded.

    Raises:
        UserMistake: when the folder holds no run.
    """
    recorded = read_run(run_dir)
    config, rows = recorded.config, recorded.rows
    start = recorded.first("start") or {}
    report = Report("learning", origin=recorded_origin(config.get("versions", {}), start.get("machine", "")))
    recipe, run = config["recipe"], config["run"]
    setting = (
        f"{run['recipe']}, {recipe['arch']}, {recipe['image_size']} px, batch {recipe['global_batch']}, "
        f"{recipe['epochs']} epochs, {config['data_images']} images, {run['precision']}, seed {run['seed']}"
    )
    setting = ", ".join([setting, *_flags(config)])
    for row in rows:
        if row["kind"] == "knn":
            report.add(run["method"], f"20-NN top-1, epoch {row['epoch']}", "share", _single(row["top1"]), setting)
        elif row["kind"] == "health":
            report.add(
                run["method"], f"view retrieval, epoch {row['epoch']}", "share", _single(row["view_retrieval"]), setting
            )
    speeds = [row["images_per_s"] for row in rows if row["kind"] == "train"]
    if speeds:
        report.add(run["method"], "training rate", "images/s", speeds, setting)
    for file, facts in recorded.scores.items():
        if not file.startswith("eval-"):
            continue  # a result that was written to another place on purpose
        contender = "untrained" if facts["untrained"] else run["method"]
        for measured in measurements(file, facts):
            name = " ".join(part for part in (measured.protocol, facts.get("recipe", ""), measured.task) if part)
            if "top1" in measured.figures:
                report.add(contender, f"{name} top-1", "share", _single(measured.figures["top1"] / 100), setting)
    return report


def main(argv: Sequence[str]) -> int:
    """Record the runs that the command line names; returns the exit code."""
    parser = make_parser("Append what runs learned to tools/results/learning.csv.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders")
    parser.add_argument("--output", type=Path, default=None, help="CSV to append to; tools/results/learning.csv")
    arguments = parse(parser, argv)
    # All are read before the first is written: a folder that holds no run leaves no rows of the others.
    for run_dir, report in [(run_dir, record(run_dir)) for run_dir in arguments.runs]:
        report.finish(f"{run_dir} recorded", arguments.output)
    return 0


if __name__ == "__main__":
    run_main(main)
