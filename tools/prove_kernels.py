"""Compare and time every kernel, the CUDA graph and the shared forward pass on this card, as a run does at its start.

`python tools/prove_kernels.py [--method regioncl-m] [--batch 256]`
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:
    # Python puts the script's folder on the path, not the checkout.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from collections.abc import Sequence

import torch

from models.methods import METHODS
from tools.bench.rows import Report
from tools.bench.timing import choose_device
from tools.support import cli
from train.proving.apart import prove_apart
from train.proving.choose import PLAN, Choice, device_text, told
from train.proving.prover import Verdict
from train.proving.setting import setting_of
from train.resolve import resolve
from train.runtime import Runtime, choose_dtype


def settings(method: str, batch: int, arch: str, image_size: int, device: torch.device) -> list[str]:
    """The flags of a run that is never trained."""
    flags = ["--method", method, "--loader", "synthetic", "--device", device.type, "--global-batch", str(batch)]
    for name, value in (("--arch", arch), ("--image-size", image_size)):
        flags += [name, str(value)] if value else []
    size = resolve(flags).recipe.bn.group_size
    return [*flags, "--bn.group-size", str(size if size and batch % size == 0 else 0)]


def add_rows(report: Report, verdicts: Sequence[Verdict], setting: str) -> None:
    """Whether each is right, and what it and the usual form take in a step."""
    for verdict in verdicts:
        report.add(verdict.name, "agrees with its definition", "1: yes", [float(verdict.right)], setting)
        report.add(verdict.name, "shapes compared", "count", [verdict.checked], setting)
        if verdict.seconds:
            report.add(verdict.name, "time a step", "ms", [1e3 * verdict.seconds], setting)
            report.add(f"{verdict.name}: PyTorch", "time a step", "ms", [1e3 * verdict.usual_seconds], setting)


def main(argv: Sequence[str]) -> int:
    """Prove what the flags name; 2 where something is wrong or raises."""
    parser = cli.make_parser("Compare and time every kernel on this card, as a run does before its first step.")
    parser.add_argument("--method", default="regioncl-m", choices=tuple(METHODS), help="method whose calls are made")
    parser.add_argument("--arch", default="", help="backbone; the recipe's when empty")
    parser.add_argument("--image-size", type=int, default=0, help="side of a view; 0 is the recipe's")
    parser.add_argument("--batch", type=cli.positive, default=256, help="images of a forward pass")
    parser.add_argument("--precision", default="auto", choices=("auto", "fp32", "bf16", "fp16"), help="as in training")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="where to measure")
    parser.add_argument("--plan", default=PLAN, help="module:function that makes the candidates")
    parser.add_argument("--seconds", type=float, default=120.0, help="time limit")
    parser.add_argument("--output", type=Path, default=None, help="CSV to append to")
    options = cli.parse(parser, argv)
    device = choose_device(options.device)
    if device.type == "cpu" and options.plan == PLAN:
        raise ValueError("this machine has no GPU, and the kernels run on no CPU; run this where there is one")
    device = torch.device("cuda", 0) if device.type == "cuda" else device
    config = resolve(settings(options.method, options.batch, options.arch, options.image_size, device))
    runtime = Runtime(0, 1, device, choose_dtype(options.precision, device), compile=False)
    verdicts = prove_apart(setting_of(config, runtime), options.plan, options.seconds)
    report = Report("prove_kernels", device)
    text = f"{options.method}, {config.recipe.arch}, {config.recipe.image_size} px, batch {options.batch}"
    add_rows(report, verdicts, f"{text}, {str(runtime.dtype)[6:]}")
    line = told(Choice("auto", "proved now", device_text(device), tuple(verdicts)))
    report.finish(line, options.output, write=options.output is not None)
    return 0 if all(verdict.right for verdict in verdicts) else 2


if __name__ == "__main__":
    cli.run_main(main)
