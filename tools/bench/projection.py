"""Images per second on hardware that was not measured: a model fitted to rows of `bench_step.py`, and marked as such.

The model. A step of ours was measured on one GPU D: t seconds an image, f floating-point operations an image. Dense
products run at a share `GEMM_SHARE` of the data sheet's half-precision peak P_D, so they take c = f / (GEMM_SHARE P_D)
of t (at most all of it); the rest is taken to be bound by memory bandwidth W_D. On a GPU T of the same step:

    t_T = c P_D / P_T + (t - c) W_D / W_T

N GPUs average the gradients of n parameters once a step of B images each, 4 bytes a parameter, by a ring over links of
L bytes a second: a = 2 (N - 1) / N 4 n / L. DDP hides it behind the backward pass, half of the step; what is left over
adds to the step. So the rate is N B / (B t_T + max(0, a - B t_T / 2)). Not in the model: data loading (for which the
needed decoding rate is printed), thermal limits, a batch that does not fit, and kernels that differ between GPUs.
"""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass
from pathlib import Path

GEMM_SHARE = 0.7
"""Share of the peak that large products reach on these GPUs."""


@dataclass(frozen=True)
class Gpu:
    """Data-sheet figures: dense half-precision FLOP/s, memory bytes/s, bytes/s of all links to other GPUs, one way."""

    flops: float
    bandwidth: float
    links: float


GPUS = {
    "H200": Gpu(989e12, 4.8e12, 450e9),
    "H100": Gpu(989e12, 3.35e12, 450e9),
    "A100": Gpu(312e12, 1.555e12, 300e9),
    "V100": Gpu(125e12, 0.9e12, 150e9),
}
"""SXM versions; the A100 is the 40 GB one of the released RegionCL run."""


@dataclass(frozen=True)
class Measured:
    """What one run of `bench_step.py` says about ours.

    Attributes:
        gpu: key of `GPUS`.
        contender: whose figures these are.
        setting: method, architecture, size, batch, precision.
        images_per_s: measured on one GPU.
        flops_per_image: forward and backward.
        parameters: trainable ones, whose gradients travel.
        date: of the run.
    """

    gpu: str
    contender: str
    setting: str
    images_per_s: float
    flops_per_image: float
    parameters: float
    date: str

    @property
    def batch(self) -> int:
        """Images a step."""
        found = re.search(r"batch (\d+)", self.setting)
        assert found is not None
        return int(found.group(1))


def read_measured(path: Path, method: str, arch: str) -> Measured:
    """The newest run on a known GPU of this method and architecture in a CSV of `bench_step.py`.

    Raises:
        ValueError: there is none; rows of a CPU do not count.
    """
    runs: dict[tuple[str, str, str], dict[tuple[str, str], float]] = {}
    if path.exists():
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                # With both commas, so that resnet50 does not take the rows of resnet50-2x.
                if row["setting"].startswith(f"{method}, {arch},"):
                    key = (row["date"], row["device"], row["setting"])
                    runs.setdefault(key, {})[row["contender"], row["metric"]] = float(row["median"])
    for (date, device, setting), figures in sorted(runs.items(), reverse=True):
        gpu = next((name for name in GPUS if name in device), None)
        own = [name for name, metric in figures if metric == "throughput" and name.startswith("ours")]
        # The model counts the step alone; augmentation is another part.
        own = [name for name in own if name != "ours with augmentation"]
        if gpu is None or not own or ("step", "flops an image") not in figures:
            continue
        best = max(own, key=lambda name: figures[name, "throughput"])
        return Measured(
            gpu,
            best,
            setting,
            figures[best, "throughput"],
            figures["step", "flops an image"],
            figures["step", "parameters"],
            date,
        )
    raise ValueError(
        f"--project needs rows of {method} on {arch} measured on a GPU, and {path} has none; run "
        f"tools/bench_step.py --method {method} --arch {arch} on one of {', '.join(GPUS)} first"
    )


def project(measured: Measured, target: str) -> float:
    """Images per second of `target`, written as "8xA100".

    Raises:
        ValueError: a target that is not a number of known GPUs.
    """
    found = re.fullmatch(r"(\d+)x(\w+)", target)
    if found is None or found.group(2) not in GPUS or int(found.group(1)) < 1:
        raise ValueError(f"--project {target}: give a number and a GPU, as 8xA100; known are {', '.join(GPUS)}")
    count, wanted, source = int(found.group(1)), GPUS[found.group(2)], GPUS[measured.gpu]
    per_image = 1.0 / measured.images_per_s
    # At most all of the time: a step faster than the assumed share would leave a negative rest.
    compute = min(per_image, measured.flops_per_image / (GEMM_SHARE * source.flops))
    step = measured.batch * (
        compute * source.flops / wanted.flops + (per_image - compute) * source.bandwidth / wanted.bandwidth
    )
    # A ring sends each gradient nearly twice: once to be summed, once to be handed out.
    exchange = 2 * (count - 1) / count * 4 * measured.parameters / wanted.links
    return count * measured.batch / (step + max(0.0, exchange - step / 2))


def describe(measured: Measured, target: str) -> str:
    """Two lines: the projected rate, marked as a projection, and what it rests on."""
    rate = project(measured, target)
    return (
        f"projection, not measured: {target} {rate:.4g} images/s; its loaders must decode as many\n"
        f"from {measured.images_per_s:.4g} images/s of '{measured.contender}' on one {measured.gpu} "
        f"({measured.setting}; {measured.date}) by the model of tools/bench/projection.py"
    )
