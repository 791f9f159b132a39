"""Measure training end to end: the loader alone, the model alone, and both together.

`python tools/bench_train.py --data photos.beton [--method regioncl-m] [--loader auto]`; under torchrun on several GPUs.
`python tools/bench_train.py --project 8xA100` projects from measured rows instead of measuring.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:
    # Python puts the script's folder on the path, not the checkout.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import dataclasses
import time
from collections.abc import Iterator, Sequence

import torch

from models.methods import METHODS
from models.methods.base import StepInputs
from pipeline.interface import Pipeline, PipelineConfig
from pipeline.loaders import build_pipeline, choose_loader
from tools.bench.projection import describe, read_measured
from tools.bench.rows import RESULTS, Report, Row, Summary
from tools.bench.timing import add_common_flags, choose_device
from tools.bench_step import OurStep, configure
from tools.support import cli
from train.inputs import InputStream, finished_views
from train.loop import take_step
from train.runtime import Runtime, start, wrap_distributed
from train.versions import usable_cores


class LoaderAlone:
    """Batches of a loader, thrown away."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.pipeline, self.epoch = pipeline, 0
        self._batches = iter(())

    def run(self, steps: int) -> None:
        """Take `steps` batches."""
        for _ in range(steps):
            # The epoch has ended in the middle of a window: the next one begins, and its first batch counts.
            if next(self._batches, None) is None:
                self.pipeline.set_epoch(self.epoch)
                self.epoch += 1
                self._batches = iter(self.pipeline)  # type: ignore[arg-type]
                next(self._batches)


class ModelAlone:
    """Training steps on inputs that are ready."""

    def __init__(self, ours: OurStep) -> None:
        self.ours = ours
        ours.prepare()

    def run(self, steps: int) -> None:
        """Take `steps` steps."""
        for _ in range(steps):
            self.ours()


class EndToEnd:
    """Training steps as `train/main.py` takes them: loader, augmentation, step."""

    def __init__(self, ours: OurStep, pipeline: Pipeline) -> None:
        self.ours, self.stream = ours, InputStream(ours.builder, pipeline)
        self._epoch = 0
        self._steps: Iterator[tuple[int, list[StepInputs]]] = iter(())

    def run(self, steps: int) -> None:
        """Take `steps` steps."""
        for _ in range(steps):
            item = next(self._steps, None)
            if item is None:
                self._steps = self.stream.epoch(self._epoch, 0, self.ours.state.step)
                self._epoch += 1
                item = next(self._steps)
            take_step(self.ours.job, self.ours.state, self.ours.state.step, item[1])
            self.ours.state.step += 1
        # Training starts new sums at each row of metrics; nobody writes rows here.
        self.ours.state.sums, self.ours.state.sum_steps = {}, 0


Contender = LoaderAlone | ModelAlone | EndToEnd


def _pipeline(options: argparse.Namespace, ours: OurStep, loader: str, data: str) -> Pipeline:
    config, runtime = ours.config, ours.runtime
    settings = PipelineConfig(
        data=data,
        views=(),
        global_batch=options.batch,
        seed=config.run.seed,
        rank=runtime.rank,
        world_size=runtime.world_size,
        workers=options.workers,
        device=runtime.device,
    )
    return build_pipeline(loader, finished_views(settings, config, runtime), quiet=True)


def measure(options: argparse.Namespace, runtime: Runtime) -> None:
    """Time windows of steps of every contender in turn, and print."""
    config = configure(options, options.batch, None, options.precision)
    ours = OurStep(config, runtime, "heads" if runtime.compile else "")
    # One step for all contenders: with DDP where there are several processes, so that its exchange is measured too.
    ours.job = dataclasses.replace(ours.job, wrapped=wrap_distributed(ours.method, runtime, False))
    loader = options.loader if options.loader != "auto" else choose_loader(options.data)[0]
    # Two, because a loader prefetches: a shared one would work for one contender in the other's window.
    with_data = [_pipeline(options, ours, loader, options.data) for _ in range(2)]
    synthetic = _pipeline(options, ours, "synthetic", str(options.batch * (options.steps + options.settle) * 4))
    contenders: dict[str, Contender] = {
        f"loader alone ({loader})": LoaderAlone(with_data[0]),
        "model alone": ModelAlone(ours),
        "end to end (synthetic)": EndToEnd(ours, synthetic),
        f"end to end ({loader})": EndToEnd(ours, with_data[1]),
    }
    try:
        rates, waits = _windows(contenders, options, runtime)
    finally:
        for pipeline in (*with_data, synthetic):
            pipeline.close()
    if runtime.is_main:
        _report(options, ours, rates, waits)


def _windows(
    contenders: dict[str, Contender], options: argparse.Namespace, runtime: Runtime
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Images per second, and share of the time waited for the loader, of each window."""
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    waits: dict[str, list[float]] = {name: [] for name in contenders}
    for contender in contenders.values():
        contender.run(3 if runtime.device.type == "cuda" else 1)  # chooses convolutions, compiles, starts workers
    started = time.perf_counter()
    for done in range(options.rounds):
        # Asked together: a rank that stopped alone would leave the others in an exchange.
        if runtime.agree(done >= 3 and time.perf_counter() - started > options.max_seconds):
            break
        for name, contender in contenders.items():
            # What the loader prefetched while others ran would flatter the window.
            contender.run(options.settle)
            _wait(runtime)
            stream = contender.stream if isinstance(contender, EndToEnd) else None
            waited = stream.pipeline.stats().wait_s if stream else 0.0
            begin = time.perf_counter()
            contender.run(options.steps)
            _wait(runtime)
            # The slowest rank: the others wait for it in any case.
            seconds = max(runtime.gather_objects(time.perf_counter() - begin))
            rates[name].append(options.batch * options.steps / seconds)
            if stream:
                waits[name].append((stream.pipeline.stats().wait_s - waited) / seconds)
    return rates, {name: values for name, values in waits.items() if values}


def _wait(runtime: Runtime) -> None:
    if runtime.device.type == "cuda":
        torch.cuda.synchronize(runtime.device)


def _report(
    options: argparse.Namespace, ours: OurStep, rates: dict[str, list[float]], waits: dict[str, list[float]]
) -> None:
    recipe = ours.config.recipe
    setting = (
        f"{options.method}, {recipe.arch}, {recipe.image_size} px, batch {options.batch}, "
        f"{ours.runtime.world_size} processes, {str(ours.runtime.dtype)[6:]}, warm cache"
    )
    report = Report("bench_train", ours.runtime.device)
    for name, values in rates.items():
        report.add(name, "throughput", "images/s", values, setting)
    real = list(rates)[-1]
    shares = [100 * a / b for a, b in zip(rates[real], rates["end to end (synthetic)"], strict=True)]
    report.add(real, "share of synthetic rate", "%", shares, setting)
    for name, values in waits.items():
        report.add(name, "data wait", "%", [100 * value for value in values], setting)
    report.finish(conclusion(report.rows), options.output, write=not options.no_csv)


def conclusion(rows: Sequence[Row]) -> str:
    """One line: which of loader, augmentation and model limits, by how much, and the flag to change."""
    rates: dict[str, Summary] = {row.contender: row.value for row in rows if row.metric == "throughput"}
    loader, model, synthetic, real = (rates[name].median for name in rates)
    if loader < model:
        return (
            f"bottleneck: the loader, {loader:.4g} images/s where the model takes {model:.4g}; end to end {real:.4g}; "
            f"more --workers (of {usable_cores()} cores), a smaller --max-resolution when packing, or --loader dali"
        )
    if real < 0.97 * synthetic:
        return (
            f"bottleneck: loader and model beside each other, {real:.4g} images/s of {synthetic:.4g} with synthetic "
            f"images; fewer --workers leave the step a core, a larger --batch fewer waits"
        )
    return (
        f"bottleneck: the model, {model:.4g} images/s alone, {real:.4g} end to end; --precision bf16, --compile, "
        f"bench_step.py --profile for its parts"
    )


def main(argv: Sequence[str]) -> int:
    """Measure or project, as the flags ask for."""
    parser = cli.make_parser("Measure training end to end, or project it to other hardware from measured rows.")
    parser.add_argument("--data", default="", help="packed file, folder, list or shard pattern to train on")
    parser.add_argument("--method", default="regioncl-m", choices=tuple(METHODS), help="method to train")
    parser.add_argument("--arch", default="", help="backbone; the recipe's when empty")
    parser.add_argument("--image-size", type=int, default=0, help="side of a view; 0 is the recipe's")
    parser.add_argument("--batch", type=int, default=256, help="images a step over all processes")
    parser.add_argument("--queue", type=int, default=0, help="keys in the queue; 0 is the method's own")
    parser.add_argument("--precision", default="auto", choices=("auto", "fp32", "bf16", "fp16"), help="as in training")
    parser.add_argument(
        "--loader",
        default="auto",
        choices=("auto", "ffcv", "dali", "webdataset", "folder"),
        help="where images come from",
    )
    parser.add_argument("--workers", type=int, default=0, help="decoding threads; 0 follows from the cores")
    parser.add_argument("--steps", type=int, default=20, help="steps of a window")
    parser.add_argument("--settle", type=int, default=8, help="steps before each window, not timed")
    parser.add_argument("--project", default="", metavar="8xA100", help="project to this hardware instead of measuring")
    parser.add_argument("--rows", type=Path, default=RESULTS / "bench_step.csv", help="measured rows for --project")
    add_common_flags(parser)
    options = cli.parse(parser, argv)
    if options.project:
        print(describe(read_measured(options.rows, options.method, options.arch or "resnet50"), options.project))
        return 0
    if not options.data:
        raise ValueError("--data is needed: pack photographs with tools/make_ffcv_dataset.py FOLDER photos.beton")
    if min(options.steps, options.rounds) < 1 or options.settle < 0:
        raise ValueError("--steps and --rounds must be at least 1, --settle at least 0")
    choose_device(options.device)
    with start(configure(options, options.batch, None, options.precision).run) as runtime:
        measure(options, runtime)
    return 0


if __name__ == "__main__":
    cli.run_main(main)
