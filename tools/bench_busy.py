"""Measure what share of its rate a command keeps while other processes hold half the cores of the machine.

`python tools/bench_busy.py [--rounds 3] [--steps 24] [--waiting sleeping]`

Training, one of the loaders in a loop of its own, and an evaluation each run with nothing beside them and beside one
busy process for every two cores, in turn within a round. Threads of OpenMP either sleep while they wait, which is
what the commands choose, or spin, which is what OpenMP does by itself: whoever spins takes time from the thread that
it waits for. CPU only, and the machine must have nothing else to do. The spinning contender is slow beside a busy core:
with the defaults two cores were not done in ten minutes; `--waiting sleeping` leaves it out.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:
    # Python puts the script's folder on the path, not the checkout.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from statistics import median

from tools.bench.apart import output_of
from tools.bench.busy import busy
from tools.bench.rows import Report
from tools.support import cli
from tools.support.sample_photos import cut_photos
from train.record.comparison import images_per_second
from train.record.run import read_run
from train.versions import usable_cores

WAITING = {"sleeping": "PASSIVE", "spinning": "ACTIVE"}
"""How OpenMP's threads wait, and the value of OMP_WAIT_POLICY that says so."""
LOOP = """
import sys, time
from tools.wheel.loader import Loader
loader = Loader(sys.argv[1], views=2, size=64, augment="mocov2", batch_size=64, device="cpu")
next(iter(loader))
begin, images = time.monotonic(), 0
for _ in range(int(sys.argv[2])):
    images += sum(len(batch.index) for batch in loader)
print(images / (time.monotonic() - begin))
"""
"""An own loop over a folder; the first batch is not timed, since it starts the threads."""


@dataclass(frozen=True)
class Bench:
    """What the contenders share.

    Attributes:
        train: class folders to train on.
        validation: class folders to classify.
        scratch: folder for runs and results.
        arch: the backbone that is trained and evaluated.
        steps: steps of a training.
        epochs: how often the own loop goes over the training images.
    """

    train: Path
    validation: Path
    scratch: Path
    arch: str
    steps: int
    epochs: int


def run(command: Sequence[str], policy: str) -> str:
    """Standard output of a Python command of the checkout.

    Raises:
        RuntimeError: with the last line of what it said, when it failed.
    """
    return output_of(command, " ".join(command[:2]), os.environ | {"OMP_WAIT_POLICY": policy})


def training(bench: Bench, policy: str) -> float:
    """Images per second of RegionCL-M, median over the rows of the run."""
    folder = bench.scratch / "run"
    shutil.rmtree(folder, ignore_errors=True)
    command = (
        f"train/main.py --method regioncl-m --recipe regioncl-m-small --arch {bench.arch} --device cpu --no-report "
        f"--log-every 4 --max-steps {bench.steps}"
    ).split()
    run([*command, "--data", str(bench.train), "--run-dir", str(folder)], policy)
    rate = images_per_second(read_run(folder))
    if rate is None:
        raise RuntimeError("the training left no row; give more --steps")
    return rate


def loop(bench: Bench, policy: str) -> float:
    """Images per second of `regatta.Loader` with nothing behind it."""
    return float(run(["-c", LOOP, str(bench.train), str(bench.epochs)], policy))


def evaluation(bench: Bench, policy: str) -> float:
    """Images per second of a k-NN evaluation of the run that `training` left, start included."""
    command = ["train/evaluate.py", "knn", "--checkpoint", str(bench.scratch / "run"), "--device", "cpu"]
    data = ["--data", str(bench.train), "--val-data", str(bench.validation)]
    begin = time.monotonic()
    run([*command, *data, "--output", str(bench.scratch / "knn.json")], policy)
    images = sum(1 for folder in (bench.train, bench.validation) for _ in folder.rglob("*.jpg"))
    return images / (time.monotonic() - begin)


COMMANDS: dict[str, Callable[[Bench, str], float]] = {"training": training, "loader": loop, "evaluation": evaluation}


def measure(
    report: Report, bench: Bench, names: Sequence[str], ways: Sequence[str], rounds: int
) -> dict[tuple[str, str], float]:
    """Add the rows, and give the share that each command keeps, by (command, way of waiting)."""
    others = max(1, usable_cores() // 2)
    kept = {}
    for name in names:
        found: dict[tuple[str, bool], list[float]] = {key: [] for key in product(ways, (False, True))}
        for _ in range(rounds):
            # In turn, so that a slow minute of the machine meets them all.
            for waiting, disturbed in found:
                with busy(others if disturbed else 0):
                    found[waiting, disturbed].append(COMMANDS[name](bench, WAITING[waiting]))
        for (waiting, disturbed), rates in found.items():
            beside = f"beside {others} busy" if disturbed else "alone"
            report.add(f"{name}, {waiting}", "rate", "images/s", rates, f"{setting(bench, name)}; {beside}")
        for waiting in ways:
            kept[name, waiting] = median(found[waiting, True]) / median(found[waiting, False])
    return kept


def setting(bench: Bench, name: str) -> str:
    """What a command ran on, for its rows."""
    return {
        "training": f"regioncl-m, {bench.arch}, 64 px, batch 64, {bench.steps} steps",
        "loader": f"regatta.Loader, two views of 64 px, {bench.epochs} epochs",
        "evaluation": f"k-NN, {bench.arch}, 64 px, start included",
    }[name]


def conclusion(kept: dict[tuple[str, str], float]) -> str:
    """One line: the share that each command keeps."""
    parts = [f"{name} {share:.0%} {waiting}" for (name, waiting), share in kept.items()]
    return "rate kept with half the cores busy: " + ", ".join(parts)


def main(argv: Sequence[str]) -> int:
    """Measure what the flags ask for."""
    parser = cli.make_parser("Measure the rate that commands keep while other processes hold half the cores.")
    parser.add_argument("--commands", nargs="+", default=list(COMMANDS), choices=COMMANDS, help="what is measured")
    parser.add_argument("--waiting", nargs="+", default=list(WAITING), choices=WAITING, help="how OpenMP waits")
    parser.add_argument("--arch", default="resnet18", help="backbone that is trained and evaluated")
    parser.add_argument("--steps", type=cli.positive, default=24, help="steps of a training")
    parser.add_argument("--crops", type=cli.positive, default=200, help="training images of each photograph")
    parser.add_argument("--epochs", type=cli.positive, default=4, help="how often the own loop goes over the images")
    parser.add_argument("--rounds", type=cli.positive, default=3, help="how often everything is measured")
    parser.add_argument("--output", type=Path, default=None, help="CSV to append to; tools/results/busy.csv")
    parser.add_argument("--no-csv", action="store_true", help="print the table and keep no rows")
    options = cli.parse(parser, argv)
    report = Report("busy")
    with tempfile.TemporaryDirectory(prefix="bench-busy-") as folder:
        bench = prepared(Path(folder), options)
        kept = measure(report, bench, commands(options.commands), list(dict.fromkeys(options.waiting)), options.rounds)
    report.finish(conclusion(kept), options.output, write=not options.no_csv)
    return 0


def commands(chosen: Sequence[str]) -> list[str]:
    """The chosen commands in the order in which they need each other's results.

    Raises:
        ValueError: an evaluation without a training has no run to evaluate.
    """
    if "evaluation" in chosen and "training" not in chosen:
        raise ValueError("--commands evaluation evaluates the run that training leaves; add training")
    return [name for name in COMMANDS if name in chosen]


def prepared(folder: Path, options: argparse.Namespace) -> Bench:
    """Images to work on: crops of the photographs inside scikit-image."""
    train, validation = cut_photos(folder / "images", options.crops, max(1, options.crops // 5))
    return Bench(train, validation, folder, options.arch, options.steps, options.epochs)


if __name__ == "__main__":
    cli.run_main(main)
