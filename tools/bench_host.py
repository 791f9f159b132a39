"""Measure what a training step costs the host, without a GPU: real CUDA code of PyTorch, kernels that do nothing.

`python tools/bench_host.py [--methods regioncl-m ...] [--arch resnet50] [--rounds 10]`. All methods take some minutes;
the rows of each are written as soon as it is measured.

Contenders of each method take turns: a bare step of the same networks with `torch.nn.BatchNorm2d` in place of ours
(forward, backward, optimizer, EMA, queue), and ours as `train/main.py` takes it: without our CUDA kernels, with them,
and with them and forward and backward as one CUDA graph. Launches and bytes are exact, and the same on every machine.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:
    # Python puts the script's folder on the path, not the checkout.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

import torch

from models.methods import METHODS
from models.ops import launcher
from models.ops.host_library import batch_norm_library
from tools.bench.idle_device import is_idle_device, launches, run_on_idle_device
from tools.bench.rows import Report
from tools.bench.traffic import counted
from tools.bench_step import OurStep, choose_kernels, configure, synthetic_crops
from tools.support import cli
from tools.support.cli import positive
from train.config import BnConfig
from train.errors import UserMistake
from train.runtime import Runtime

BAR = 1.25
"""Most host time of our step relative to the plain one."""


class PlainStep:
    """What any trainer does in a step of this method: forward, backward, optimizer, EMA and queue."""

    def __init__(self, step: OurStep) -> None:
        self.step = step

    def __call__(self) -> None:
        """Take the next step."""
        own = self.step
        inputs = own.inputs[own.state.step % len(own.inputs)]
        own.state.step += 1
        with own.runtime.autocast():
            output = own.method(inputs)
        output.loss.backward()
        own.state.optimizer.step()
        own.state.optimizer.zero_grad(set_to_none=True)
        own.method.after_step(output, 0.999)


def build_step(
    options: argparse.Namespace,
    method: str,
    bn_mode: Literal["", "plain"] = "",
    kernels: str = "definition",
    graph: bool = False,
    like: OurStep | None = None,
) -> OurStep:
    """The training step of a method on the idle device.

    Args:
        options: parsed flags.
        method: key of `METHODS`.
        bn_mode: batch norm in place of the recipe's.
        kernels: as for `KernelChoice.set`; "auto" is PyTorch's batch norm.
        graph: forward and backward as one CUDA graph.
        like: another step of the method, whose inputs serve this one, too.
    """
    flags = argparse.Namespace(method=method, device="cuda", arch=options.arch, image_size=0, queue=0)
    config = configure(flags, options.batch, None, "bf16")
    if bn_mode:
        config = replace(config, recipe=replace(config.recipe, bn=BnConfig(bn_mode)))
    runtime = Runtime(0, 1, torch.device("cuda", 0), torch.bfloat16, False)
    fused = frozenset({"batch_norm_act", "box_pool", "masked_pool", "window_attention"} if kernels == "cuda" else ())
    step = OurStep(config, runtime, graph=graph, kernels=fused)
    if like is None:
        step.prepare()
    else:
        step.inputs = like.inputs
    return step


def graphed_step(options: argparse.Namespace, method: str, like: OurStep) -> OurStep | None:
    """Our step with kernels as a CUDA graph; None, and a line that says why, for a method that no graph can serve."""
    step = build_step(options, method, kernels="cuda", graph=True, like=like)
    try:
        step()  # captures
    except UserMistake as reason:
        print(f"{method}: {reason}")
        return None
    return step


def time_host(contenders: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Seconds of processor time per call, all threads together; the contenders take turns in each round."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    # What the contenders hold stays as long as they do. To look through it before each call took most of the time.
    gc.collect()
    gc.freeze()
    for round_ in range(rounds + 2):  # the first two fill caches of PyTorch and of the processor
        for name, call in contenders.items():
            # Left to its own times the collector would charge one contender for the others' garbage.
            gc.collect()
            # Processor time: on a busy machine the wall clock also counts what other processes take.
            started = time.process_time()
            call()
            if round_ >= 2:
                seconds[name].append(time.process_time() - started)
    gc.unfreeze()
    return seconds


def launches_of(call: Callable[[], None]) -> int:
    """What one call launches."""
    before = launches()
    call()
    return launches() - before


def bytes_of_step(call: Callable[[], None]) -> int:
    """What one call moves to and from memory if nothing stays in a cache."""
    with counted() as traffic:
        call()
    return traffic.moved


def augmented(step: OurStep, kernel: bool) -> Callable[[], None]:
    """The augmentation of one batch of the step's views, by the kernel or by PyTorch's operations."""
    choose_kernels(frozenset({"augmentation"} if kernel else ()))
    augment, crops = synthetic_crops(step.config, step.runtime, 1)
    batch = next(crops)

    def call() -> None:
        augment(batch, 0)

    return call


def measure(options: argparse.Namespace, method: str, report: Report) -> float:
    """Add the rows of one method; returns the ratio of our step with kernels to the plain one."""
    ours = build_step(options, method, kernels="auto")
    contenders: dict[str, Callable[[], None]] = {
        "plain": PlainStep(build_step(options, method, "plain", "auto", like=ours)),
        "ours": ours,
        "ours + kernels": build_step(options, method, kernels="cuda", like=ours),
    }
    graphed = graphed_step(options, method, ours)
    if graphed is not None:
        contenders["ours + kernels + graph"] = graphed
    recipe = ours.config.recipe
    setting = f"{method}, {recipe.arch}, batch {options.batch}, bn {recipe.bn.mode} {recipe.bn.group_size}, bfloat16"
    times = time_host(contenders, options.rounds)
    for name, seconds in times.items():
        report.add(name, "host time of a step", "ms", [1000 * value for value in seconds], setting)
        # Pairs of the same round: what slows the machine down for a while slows both.
        pairs = zip(seconds, times["plain"], strict=True)
        ratio = report.add(name, "host time over plain", "ratio", [own / plain for own, plain in pairs], setting)
        if name == "ours + kernels":
            kernels_ratio = ratio.median
    counts = {
        **{f"augmentation{' + kernel' if kernel else ''}": augmented(ours, kernel) for kernel in (False, True)},
        **contenders,
    }
    for name, call in counts.items():
        report.add(name, "launches of a step", "count", [launches_of(call)], setting)
        if not name.endswith("graph"):  # a replay goes past PyTorch's dispatcher; it moves what was recorded
            report.add(name, "bytes of a step", "GB", [bytes_of_step(call) / 1e9], setting)
    return kernels_ratio


def main(argv: Sequence[str]) -> int:
    """Run the benchmark that the flags ask for."""
    parser = cli.make_parser("Measure the host's time of a training step, with CUDA kernels that do nothing.")
    parser.add_argument("--methods", nargs="*", default=[], choices=tuple(METHODS), help="all when empty")
    parser.add_argument("--arch", default="", help="backbone; the recipe's when empty")
    parser.add_argument("--batch", type=positive, default=256, help="images a step")
    parser.add_argument("--rounds", type=positive, default=10, help="figures of each contender")
    parser.add_argument("--output", type=Path, default=None, help="CSV to append to; tools/results/bench_host.csv")
    parser.add_argument("--no-csv", action="store_true", help="print the table and keep no rows")
    options = cli.parse(parser, argv)
    if not is_idle_device():
        return run_on_idle_device([str(Path(__file__).resolve()), *argv])
    # The kernels never run, and NVRTC does not work beside a driver that is none.
    launcher.find_nvrtc = lambda *_: None  # type: ignore[assignment]
    launcher.cached_binary = lambda *_, **__: b"no code"  # type: ignore[assignment]
    # cuDNN's attention asks cuDNN which plans it has, and here there is none to ask.
    torch.backends.cuda.enable_cudnn_sdp(False)
    # A run has the library from its set-up on; here the finished state is measured.
    if batch_norm_library().wait() is None:
        print(f"batch norm is launched from Python: {batch_norm_library().why_not()}", file=sys.stderr)
    report, ratios = Report("bench_host"), {}
    try:
        for method in options.methods or METHODS:
            own = Report("bench_host")
            ratios[method] = measure(options, method, own)
            # At once: whoever stops this after some of the methods has their rows.
            if not options.no_csv:
                own.append_csv(options.output)
            report.rows += own.rows
            print(f"{method}: {ratios[method]:.3f} x plain", flush=True)
    finally:
        choose_kernels(frozenset())
    worst = max(ratios, key=ratios.__getitem__)
    verdict = "within" if ratios[worst] <= BAR else "above"
    conclusion = f"host time of our step with kernels: at most {ratios[worst]:.2f} x plain ({worst}), {verdict} {BAR}"
    report.finish(conclusion, write=False)
    return 0


if __name__ == "__main__":
    cli.run_main(main)
