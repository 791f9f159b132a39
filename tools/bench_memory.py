"""Measure the memory that contrasting a step's rows with the queue takes: by blocks, and with the matrix of all logits.

`python tools/bench_memory.py [--batch 256] [--queue 65536]`

The rows are those of a method's losses against one queue: query, canvas and paste for RegionCL-M, every position of the
feature map and the pooled query for DenseCL, all of them for RegionCL-D. Each figure comes from a process of its own:
the largest resident memory during forward and backward, less what was resident before. CPU only; `bench_ops.py
--ops queue_contrast` measures a GPU's memory and the speed.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:
    # Python puts the script's folder on the path, not the checkout.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import json
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from models.ops import queue_contrast
from tools.bench.apart import output_of
from tools.bench.rows import Report
from tools.support import cli

METHODS = ("regioncl-m", "densecl", "regioncl-d")
COPIES = 3.2
"""Matrices of logits that the materialised loss holds at its peak, rounded up."""
KIB = 1024


def materialised(rows: Tensor, queue: Tensor, positives: Tensor, temperature: float) -> Tensor:
    """Cross entropy over the joined matrix of positive and negatives, as the methods' released code computes it."""
    negatives = rows @ queue.T
    logits = torch.cat([positives[:, None], negatives], dim=1)
    logits /= temperature
    return F.cross_entropy(logits, torch.zeros(len(rows), dtype=torch.int64), reduction="none")


CONTENDERS: dict[str, Callable[..., Tensor]] = {"by blocks": queue_contrast, "materialised": materialised}


def rows_of(method: str, batch: int, positions: int) -> int:
    """Rows of one forward pass that meet a queue."""
    return {
        "regioncl-m": 3 * batch,
        "densecl": batch * (1 + positions),
        "regioncl-d": batch * (3 + positions),
    }[method]


def proc_kib(field: str, file: str = "/proc/self/status") -> int:
    """A line of a table of the kernel's, in KiB.

    Raises:
        ValueError: on a system without it.
    """
    try:
        lines = Path(file).read_text().splitlines()
    except OSError:
        raise ValueError(f"{file} cannot be read: resident memory is measured on Linux only") from None
    return int(next(line for line in lines if line.startswith(f"{field}:")).split()[1])


def measure(contender: str, rows: int, queue: int) -> dict[str, float]:
    """In a process of its own: MiB resident at the peak beyond those before, and what was computed."""
    # Where memory runs out after all, this process is the one to end.
    Path("/proc/self/oom_score_adj").write_text("1000")
    generator = torch.Generator().manual_seed(0)
    features = F.normalize(torch.randn(rows, 128, generator=generator), dim=1).requires_grad_()
    keys = F.normalize(torch.randn(queue, 128, generator=generator), dim=1)
    positives = torch.rand(rows, generator=generator)
    function = CONTENDERS[contender]
    # Libraries and thread pools come into memory with the first call.
    function(features[:8], keys[:512], positives[:8], 0.2).sum().backward()
    features.grad = None
    # Sets the kernel's high-water mark back to what is resident now.
    Path("/proc/self/clear_refs").write_text("5")
    before = proc_kib("VmRSS")
    loss = function(features, keys, positives, 0.2).mean()
    loss.backward()
    peak = proc_kib("VmHWM")
    assert features.grad is not None
    return {"mib": (peak - before) / KIB, "loss": float(loss.detach()), "gradient": float(features.grad.norm())}


def in_a_process(contender: str, rows: int, queue: int) -> dict[str, float]:
    """`measure` in a fresh interpreter.

    Raises:
        RuntimeError: with the last line of what it said, when it failed.
    """
    code = (
        "import json, sys; from tools.bench_memory import measure; "
        "print(json.dumps(measure(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))))"
    )
    command = ["-c", code, contender, str(rows), str(queue)]
    found: dict[str, float] = json.loads(output_of(command, f"{contender}, {rows} rows"))
    return found


def compare(report: Report, method: str, options: argparse.Namespace) -> None:
    """Rows of one method, for each contender that fits into memory.

    Raises:
        RuntimeError: the contenders computed different things.
    """
    count = rows_of(method, options.batch, options.positions)
    setting = f"{method}, batch {options.batch}, {count} rows, queue {options.queue} x 128, fp32"
    needed, there = COPIES * count * options.queue * 4 / 2**20, proc_kib("MemAvailable", "/proc/meminfo") / KIB
    found: dict[str, dict[str, float]] = {}
    for contender in CONTENDERS:
        if contender == "materialised" and needed > there:
            print(f"{method}, {contender}: left out, it needs about {needed:.0f} MiB and {there:.0f} are free")
            continue
        runs = [in_a_process(contender, count, options.queue) for _ in range(options.rounds)]
        report.add(contender, "peak memory", "MiB", [run["mib"] for run in runs], setting)
        found[contender] = runs[0]
    ours = found["by blocks"]
    for other in found.values():
        for name in ("loss", "gradient"):
            if abs(ours[name] - other[name]) > 1e-4 * abs(other[name]):
                raise RuntimeError(f"{method}: {name} {ours[name]} by blocks, {other[name]} materialised")


def conclusion(report: Report) -> str:
    """One line: what is saved, method by method."""
    medians = {(row.setting, row.contender): row.value.median for row in report.rows}
    parts = [
        f"{setting.partition(',')[0]} {medians[setting, 'materialised'] / value:.0f} x less"
        for (setting, contender), value in medians.items()
        if contender == "by blocks" and (setting, "materialised") in medians
    ]
    return "bottleneck: memory of logits, by blocks against the whole matrix: " + (", ".join(parts) or "not compared")


def main(argv: Sequence[str]) -> int:
    """Measure what the flags ask for."""
    parser = cli.make_parser("Measure the memory of the queue's logits by blocks and with the whole matrix.")
    parser.add_argument("--methods", nargs="+", default=["regioncl-m", "densecl"], choices=METHODS, help="whose rows")
    parser.add_argument("--batch", type=int, default=256, help="images")
    parser.add_argument("--positions", type=int, default=49, help="cells of the feature map")
    parser.add_argument("--queue", type=int, default=65536, help="keys in the queue")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each contender")
    parser.add_argument("--output", type=Path, default=None, help="CSV to append to; tools/results/memory.csv")
    parser.add_argument("--no-csv", action="store_true", help="print the table and keep no rows")
    options = cli.parse(parser, argv)
    if min(options.batch, options.positions, options.queue, options.rounds) < 1:
        raise ValueError("--batch, --positions, --queue and --rounds must be at least 1")
    report = Report("memory")
    for method in options.methods:
        compare(report, method, options)
    report.finish(conclusion(report), options.output, write=not options.no_csv)
    return 0


if __name__ == "__main__":
    cli.run_main(main)
