"""Run a plan of trainings and evaluations on one data set, and keep a row of each.

`python tools/run_results.py tools/plans/imagenette-small.toml --data train.beton --val-data val.beton --out runs/plan`

It is meant to run for hours. Started again, it goes on where it was stopped or killed; `--status` says at any time how
far it is. One plan runs at a time on a machine, and one training of it; `--at-once 2` trains two, each on half of the
cores, since narrow networks gain little from a second one. `--minutes 10` stops after ten minutes with exit code 75.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:
    # Python puts the script's folder on the path, not the checkout.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import csv
import datetime
import fcntl
import io
import os
import tempfile
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from pipeline.atomic import write_atomically
from tools.support.cli import make_parser, parse, positive, run_main
from tools.support.plans import COLUMNS, Planned, finished_row, progress, read_plan
from tools.support.stoppable import ROOT, Commands
from train.errors import UserMistake

ROWS = ROOT / "tools" / "results" / "imagenette.csv"
Row = dict[str, Any]


def read_rows(path: Path) -> list[Row]:
    """The rows that are there; none where the file is not."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def key_of(row: Row) -> tuple[str, ...]:
    """The columns that tell a run from the others, as `Planned.key`."""
    return tuple(str(row[name]) for name in ("plan", "method", "recipe", "flags", "seed"))


def add_row(path: Path, row: Row) -> None:
    """Add a row in one step, so that a kill leaves the old table or the new one."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows([*read_rows(path), row])
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text.getvalue().encode())


@contextmanager
def only_one() -> Iterator[None]:
    """Hold the machine's lock: trainings that know nothing of each other would falsify both rates.

    Raises:
        UserMistake: another plan runs on this machine.
    """
    # The system frees the lock of a killed process, so none is left behind.
    with open(Path(tempfile.gettempdir()) / "regatta-run-results.lock", "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserMistake("another plan runs on this machine; wait for it, or see --status") from None
        yield


def commands_of(planned: Planned, folder: Path, data: Sequence[str], device: str) -> list[list[str]]:
    """Training, then the linear protocol on the backbone that it leaves."""
    train = ["train/main.py", "--method", planned.method, "--recipe", planned.recipe, *planned.flags]
    train += [*data, "--seed", str(planned.seed), "--device", device, "--run-dir", str(folder), "--no-report"]
    linear = ["train/evaluate.py", "linear", "--checkpoint", str(folder), *data, "--device", device]
    return [train, [*linear, *planned.linear, "--output", str(folder / "eval-linear.json")]]


def common_columns(device: str) -> dict[str, str]:
    """When, with what and on what a run ended that the calling thread has started."""
    # Rows need PyTorch, which `--status` does not.
    import torch

    from tools.bench.rows import commit, device_name
    from train.versions import cpu_name, usable_cores

    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "commit": commit(),
        "device": device_name(torch.device(device)),
        "cpu": cpu_name(),
        "cores": str(usable_cores()),
    }


class Work:
    """Does what is left of a plan.

    Args:
        out: folder of the runs.
        data: flags of both commands.
        device: of the trainings.
        rows: table to write.
        minutes: time for all; 0 for any.
    """

    def __init__(self, out: Path, data: Sequence[str], device: str, rows: Path, minutes: float) -> None:
        self.out, self.data, self.device, self.rows = out, data, device, rows
        self.commands = Commands(minutes)
        self._table = threading.Lock()
        self._code = 0

    def do(self, runs: Sequence[Planned], shares: Sequence[set[int]]) -> int:
        """Do the runs that have no row yet, one on each share of the cores; returns 0 when all are done."""
        done = {key_of(row) for row in read_rows(self.rows)}
        left = [planned for planned in runs if planned.key not in done]
        free = list(shares)
        # Whatever a thread starts has the cores of the thread.
        with ThreadPoolExecutor(len(shares), initializer=lambda: bind_to(free.pop())) as threads:
            list(threads.map(self._one, left))
        return self._code

    def _one(self, planned: Planned) -> None:
        folder = self.out / planned.name
        for argv in commands_of(planned, folder, self.data, self.device):
            # After a failure those that run go on to their end, and no other begins.
            if self._code:
                return
            code = self.commands.call([sys.executable, *argv])
            if code:
                print(f"{planned.name} ended with exit code {code}; the same command goes on from here", flush=True)
                self._code = self._code or code
                return
        with self._table:
            add_row(self.rows, finished_row(planned, folder, common_columns(self.device)))


def bind_to(cores: set[int]) -> None:
    """Keep the calling thread, and what it starts, to these cores, where the system can."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)


def shares_of_cores(number: int) -> list[set[int]]:
    """The cores in equal shares; those that are left over stay idle.

    Raises:
        UserMistake: there are fewer cores than shares.
    """
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    size = len(cores) // number
    if not size:
        raise UserMistake(f"--at-once {number}: this machine has {len(cores)} cores; give at most that many")
    return [set(cores[size * share : size * (share + 1)]) for share in range(number)]


def status(runs: Sequence[Planned], out: Path, rows: Path) -> str:
    """A line for each run, and when all of them will be done at the rate of those that have begun."""
    done = {key_of(row): row for row in read_rows(rows)}
    lines, left, unknown = [], 0.0, 0
    for planned in runs:
        row = done.get(planned.key)
        if row is not None:
            lines.append(f"{planned.name:<28} done: 20-NN {row['untrained']} -> {row['last']}, linear {row['linear']}")
            continue
        far = progress(out / planned.name)
        share = f"{100 * far.step / far.last_step:.0f}%" if far.last_step else "not begun"
        unknown += far.seconds_left is None
        left += far.seconds_left or 0.0
        lines.append(
            f"{planned.name:<28} {share}" + ("" if far.seconds_left is None else f", {_clock(far.seconds_left)}")
        )
    more = f", and {unknown} runs that have not begun" if unknown else ""
    return "\n".join(
        [*lines, f"{len(done.keys() & {each.key for each in runs})} of {len(runs)} done; {_clock(left)}{more}"]
    )


def _clock(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h left" if seconds >= 3600 else f"{seconds / 60:.0f} min left"


def chosen(runs: Sequence[Planned], methods: Sequence[str], seeds: Sequence[int]) -> list[Planned]:
    """The runs of these methods and seeds, in the plan's order; of all where none are given.

    Raises:
        UserMistake: the plan has no run of one of them.
    """
    kept = [run for run in runs if run.method in (methods or [run.method]) and run.seed in (seeds or [run.seed])]
    left = [
        *sorted(set(methods) - {run.method for run in kept}),
        *(f"seed {seed}" for seed in sorted(set(seeds) - {run.seed for run in kept})),
    ]
    if left:
        known = ", ".join(dict.fromkeys(run.method for run in runs))
        raise UserMistake(
            f"the plan has no such run of {', '.join(left)}; its methods are {known}, its seeds "
            f"{', '.join(map(str, sorted({run.seed for run in runs})))}"
        )
    return kept


def main(argv: Sequence[str]) -> int:
    """Run a plan, or say how far it is; returns the exit code."""
    parser = make_parser("Run a plan of trainings and keep a row of each.")
    parser.add_argument("plan", type=Path, help="TOML file, such as those of tools/plans")
    parser.add_argument("--data", required=True, help="training images")
    parser.add_argument("--val-data", required=True, help="validation images with the same classes")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--rows", type=Path, default=ROWS, help="table to write")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="where to train")
    parser.add_argument("--minutes", type=float, default=0.0, help="stop after these; 0 goes on to the end")
    parser.add_argument("--at-once", type=positive, default=1, help="trainings at a time, on equal shares of the cores")
    parser.add_argument("--methods", nargs="+", default=[], help="only these of the plan")
    parser.add_argument("--seeds", nargs="+", type=int, default=[], help="only these of the plan")
    parser.add_argument("--status", action="store_true", help="say how far it is, and stop")
    options = parse(parser, argv)
    runs = chosen(read_plan(options.plan), options.methods, options.seeds)
    if options.status:
        print(status(runs, options.out, options.rows))
        return 0
    data = ["--data", options.data, "--val-data", options.val_data]
    if options.at_once > 1 and options.device == "cuda":
        raise UserMistake("--at-once is for the cores of a CPU; leave it out on a GPU")
    shares = shares_of_cores(options.at_once)
    with only_one():
        return Work(options.out, data, options.device, options.rows, options.minutes).do(runs, shares)


if __name__ == "__main__":
    run_main(main)
