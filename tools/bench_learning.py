"""Measure what every method learns within a few hundred CPU steps on drawn pictures, with several seeds.

`python tools/bench_learning.py --methods moco-v2 simsiam --seeds 0 1 2` prints 20-NN top-1 before and after training;
`--fault no_predictor` plants a fault first. Rows go to `tools/results/behaviour.csv`, unless `--no-csv` is given.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:
    # Python puts the script's folder on the path, not the checkout.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import tempfile
from collections.abc import Sequence

from models.methods import METHODS
from tools.bench.faults import FAULTS, Replacements
from tools.bench.learning import draw_data, learn, record
from tools.bench.rows import Report
from tools.support.cli import make_parser, parse, run_main


def main(argv: Sequence[str]) -> int:
    """Measure the methods and seeds that the command line names; returns the exit code."""
    parser = make_parser("Measure what methods learn on the drawn data set, with several seeds.")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS), help="which")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="one run each")
    parser.add_argument("--fault", default="", choices=["", *FAULTS], help="fault to plant first; none by default")
    parser.add_argument("--no-csv", action="store_true", help="print the table and keep no rows")
    options = parse(parser, argv)
    report = Report("behaviour")
    with tempfile.TemporaryDirectory() as folder, Replacements() as patch:
        data = draw_data(Path(folder))
        if options.fault:
            FAULTS[options.fault](patch)
        for method in options.methods:
            found = []
            for seed in options.seeds:
                found.append(learn(method, data, Path(folder) / f"{method}-{seed}", seed))
                # A method takes minutes, so each seed's result is shown as soon as it is there.
                print(f"{method} {options.fault} seed {seed}: {found[-1]}", flush=True)
            record(report, method, options.fault, found)
    least = min(row.value.median for row in report.rows if row.metric.startswith("gain"))
    report.finish(f"least gain of all: {least:.3f}", write=not options.no_csv)
    return 0


if __name__ == "__main__":
    run_main(main)
