"""Short training runs on the drawn data set (shapes.py): small backbones, settings of each method, and their rows.

The runs go through `train/main.py` itself, on one CPU thread. `tools/bench_learning.py` is the command.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from models.methods import METHODS
from models.resnet import BACKBONES, initialise_convolutions
from models.swin import SwinTrunk
from tools.bench.rows import RESULTS, Report
from tools.bench.shapes import CLASSES, write_pictures
from train.main import main as train_main
from train.record.run import read_run

TRAINING, HELD_OUT = 128, 32  # pictures of each class
PICTURE_SEED = 7
EPOCHS = 12
STEPS = 24 * EPOCHS
SWIN_METHODS = ("moby", "regioncl-moby")


class ShapesSwin(SwinTrunk):
    """Swin with one block a stage (two in the third), windows of 4 and patches of 2 px: 32 px -> (B, 192, 2, 2)."""

    stride = 16

    def __init__(self, conv_init: Any = "torch", zero_init_residual: bool = False) -> None:
        super().__init__(embed_dim=24, depths=(1, 1, 2, 1), num_heads=(2, 2, 4, 4), window_size=4)
        self.features[0][0] = nn.Conv2d(3, 24, kernel_size=2, stride=2)
        initialise_convolutions(self, conv_init)


@contextmanager
def shapes_backbone() -> Iterator[None]:
    """Within the block `--arch` takes "swin-shapes"."""
    BACKBONES["swin-shapes"] = ShapesSwin
    try:
        yield
    finally:
        del BACKBONES["swin-shapes"]


SETTINGS = (
    "--image-size 32 --global-batch 64 --augment.profile mocov1 --augment.min-scale 0.5 --optim.lr-reference-batch 0 "
    "--optim.exclude 1d --optim.clip-grad-norm 0 --schedule.decay cosine-step --schedule.warmup-epochs 2 "
    "--schedule.warmup-start 0 --schedule.final 0 --conv-init torch --no-zero-init-residual "
    "--workers 1 --knn-every 0 --device cpu --precision fp32 --no-report"
).split()
SGD = "--optim.kind sgd --optim.lr 0.1 --optim.weight-decay 5e-4".split()
ADAMW = "--optim.kind adamw --optim.lr 1e-3 --optim.weight-decay 1e-4".split()
QUICK_EMA = ["--ema.momentum=0.5", "--dim=32"]
FAST_ADAMW = "--optim.kind adamw --optim.lr 3e-3 --optim.weight-decay 1e-4".split()
# What learns within a few hundred steps: few negatives and a slow momentum network against a queue; a quick one and
# narrow embeddings without negatives, where the momentum network's first, random embeddings hold the learner back.
FAMILIES = {
    ("moco-v2", "densecl", "regioncl-m", "regioncl-d", "lewel-m", "unmix"): [
        *ADAMW,
        "--ema.momentum=0.99",
        "--temperature=0.1",
    ],
    ("moco-v3", "regioncl-m3"): [*SGD, "--ema.momentum=0.99", "--temperature=0.2"],
    ("moby", "regioncl-moby"): [*ADAMW, "--ema.momentum=0.99", "--temperature=0.1"],
    ("simsiam",): ADAMW,
    ("barlow-twins",): [*ADAMW, "--loss-scale=1"],
    ("simclr",): [*ADAMW, "--temperature=0.2"],
    ("swav",): [*ADAMW, "--sinkhorn-epsilon=0.03", "--freeze-prototypes-steps=288", "--small-scale=0.2,0.5"],
    ("regioncl-s",): [*ADAMW, "--region.head-batching=separate"],
    ("byol", "pixpro"): [*ADAMW, *QUICK_EMA],
    ("care",): [*FAST_ADAMW, *QUICK_EMA],
    ("lewel-b",): [*FAST_ADAMW, *QUICK_EMA, "--c=32", "--momentum-norm=own", "--bn.mode=sync", "--bn.group-size=0"],
}
# Heads and queues in proportion to a backbone of 128 channels and 1536 pictures.
MODEL = {
    "queue_size": 64,
    "hidden_dim": 256,
    "dim": 128,
    "predictor_hidden_dim": 64,
    "n_blocks": 2,
    "t_bn_group_size": 16,
    "prototypes": 64,
    "small_crops": 2,
    "small_size": 16,
}


def family(method: str) -> list[str]:
    """Flags that a method shares with its family."""
    return next(flags for names, flags in FAMILIES.items() if method in names)


def settings(method: str) -> list[str]:
    """Flags of a method's run, less data, folder, seed and length."""
    fields = METHODS[method].Config.__dataclass_fields__  # type: ignore[attr-defined]
    sizes = [f"--{name.replace('_', '-')}={value}" for name, value in MODEL.items() if name in fields]
    own = family(method)
    taken = {flag.partition("=")[0] for flag in own}  # a flag may be given once
    shared = [flag for flag in ("--bn.group-size=16", *sizes) if flag.partition("=")[0] not in taken]
    arch = "swin-shapes" if method in SWIN_METHODS else "resnet10-w16"
    return ["--method", method, "--arch", arch, *SETTINGS, *shared, *own]


@dataclass(frozen=True)
class Learned:
    """Top-1 of 20 nearest neighbours on held-out pictures, before and after training, and the curve of the loss."""

    before: float
    after: float
    losses: tuple[float, ...]

    @property
    def gain(self) -> float:
        """By how much training raised it."""
        return self.after - self.before


def draw_data(folder: Path) -> tuple[Path, Path]:
    """Training and held-out pictures in `folder`."""
    return (
        write_pictures(folder / "training", TRAINING, PICTURE_SEED),
        write_pictures(folder / "held-out", HELD_OUT, PICTURE_SEED + 1),
    )


def learn(method: str, data: tuple[Path, Path], run_dir: Path, seed: int = 0, more: Sequence[str] = ()) -> Learned:
    """One run on one thread."""
    training, held_out = (str(folder) for folder in data)
    argv = ["--data", training, "--val-data", held_out, "--run-dir", str(run_dir), "--seed", str(seed)]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with shapes_backbone():
            code = train_main([*argv, *settings(method), "--epochs", str(EPOCHS), *more])
    finally:
        torch.set_num_threads(threads)
    assert code == 0, f"train/main.py ended with {code}"
    recorded = read_run(run_dir)
    before, after = recorded.values("knn", "top1")[1]
    return Learned(before, after, tuple(row["loss"] for row in recorded.of_kind("train")))


GAIN = "gain of 20-NN top-1, least of the seeds"


def setting(method: str, fault: str = "") -> str:
    """What a row says about its runs; rows of other settings are not compared."""
    return (
        f"{len(CLASSES)} classes, {TRAINING} + {HELD_OUT} drawn pictures each, 32 px, batch 64, {STEPS} steps, "
        f"{' '.join(family(method)).replace('--', '')}" + (f"; {fault.replace('_', ' ')}" if fault else "")
    )


def record(report: Report, method: str, fault: str, found: Sequence[Learned]) -> None:
    """Rows of a method's runs with several seeds."""
    text = setting(method, fault)
    report.add(method, "20-NN top-1, untrained", "share", [each.before for each in found], text)
    report.add(method, "20-NN top-1, trained", "share", [each.after for each in found], text)
    report.add(method, GAIN, "share", [min(each.gain for each in found)], text)


def measured_gain(method: str, fault: str = "") -> float:
    """The least gain of the seeds in the newest row of a method.

    Raises:
        LookupError: there is no row at these settings.
    """
    with (RESULTS / "behaviour.csv").open(newline="") as stream:
        rows = [row for row in csv.DictReader(stream) if row["contender"] == method and row["metric"] == GAIN]
    gains = [float(row["median"]) for row in rows if row["setting"] == setting(method, fault)]
    if not gains:
        raise LookupError(f"no row of {method} {fault}; run python tools/bench_learning.py --methods {method}")
    return gains[-1]
