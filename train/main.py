"""Train a backbone without labels.

`torchrun --nproc_per_node=N train/main.py --method regioncl-m --data photos.beton`
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

import torch

from models.methods import METHODS
from models.methods.base import Method
from pipeline.atomic import write_atomically
from pipeline.augment import choose_implementation
from train import data as run_data
from train.checkpoint import recorded_config, run_checkpoints
from train.config import Config
from train.cuda_graph import GraphedForwardBackward
from train.errors import UserMistake, run_to_exit_code
from train.inputs import InputBuilder, InputStream, batch_per_device, bn_group_size, grid_cells, region_sampler
from train.loop import Job, train
from train.measure.online import health_figures, knn_figures
from train.optim import build_optimizer
from train.record.metrics import Metrics
from train.record.run import CONFIG
from train.resolve import changed_fields, continued, resolve
from train.retry import persistently
from train.runtime import Runtime, SignalWatch, start, wrap_distributed
from train.schedules import scaled_lr
from train.state import TrainState
from train.versions import versions


def build_method(config: Config, runtime: Runtime) -> Method:
    """The method with its weights drawn from the seed, on the device, channels-last.

    Raises:
        UserMistake: when method, architecture and sizes do not fit each other, or `--init` cannot be loaded.
    """
    torch.manual_seed(config.run.seed)
    try:
        method: Method = METHODS[config.run.method](
            config.model,
            arch=config.recipe.arch,
            image_size=config.recipe.image_size,
            bn_mode=config.recipe.bn.mode,
            bn_group_size=bn_group_size(config),
        )
        if config.run.init:
            from train.backbone_io import load_into

            load_into(method.encoder, config.run.init, config.recipe.arch)
            method.synchronise_momentum()
    except (ValueError, OSError) as reason:
        raise UserMistake(str(reason)) from None
    return method.to(runtime.device).to(memory_format=torch.channels_last)


def feature_grid(method: Method, image_size: int) -> int:
    """Cells a side of the encoder's last feature map."""
    stride: int = method.encoder.stride  # type: ignore[assignment]
    return grid_cells(stride, image_size)


def check_regions(config: Config, runtime: Runtime, method: Method) -> None:
    """Refuse region settings that no step could use.

    Raises:
        UserMistake: naming what does not fit.
    """
    if not method.mixed_views:
        return
    size, grid = config.recipe.image_size, feature_grid(method, config.recipe.image_size)
    stride: int = method.encoder.stride  # type: ignore[assignment]
    if size > stride and size != grid * stride:
        raise UserMistake(
            f"--image-size {size} is not a whole number of feature cells of {stride} px; choose {grid * stride} or "
            f"{(grid + 1) * stride}"
        )
    micro = config.run.micro_batch or batch_per_device(config, runtime.world_size)
    try:
        region_sampler(config, grid).draw(0, 0, micro, world_size=runtime.world_size)
    except ValueError as reason:
        raise UserMistake(str(reason)) from None


def check_augment(config: Config, runtime: Runtime) -> None:
    """Refuse an implementation of the augmentation that this device does not have.

    Raises:
        UserMistake: naming the one to choose.
    """
    try:
        choose_implementation(runtime.device, runtime.dtype, config.recipe.augment.implementation)
    except ValueError as reason:
        raise UserMistake(f"--augment.implementation: {reason}") from None


def describe(config: Config, runtime: Runtime, method: Method) -> str:
    """What follows from the flags: batch and learning rate of each device, BN groups, region bounds."""
    local = batch_per_device(config, runtime.world_size)
    recipe = config.recipe
    micro = config.run.micro_batch or local
    lines = [
        f"{config.run.method} on {recipe.arch}, {recipe.image_size} px, {recipe.epochs} epochs, recipe "
        f"{config.run.recipe}",
        f"global batch {recipe.global_batch} = {runtime.world_size} x {local // micro} x {micro} images (devices, "
        f"micro-batches, images), lr {scaled_lr(recipe.optim, recipe.global_batch):.6g}, {str(runtime.dtype)[6:]} on "
        f"{runtime.device.type}",
        f"batch norm: {recipe.bn.mode}"
        + (f" of {bn_group_size(config) or micro} images" if recipe.bn.mode == "group" else ""),
    ]
    if runtime.device.type == "cuda":
        lines.append(
            "heads and losses: compiled"
            if runtime.compile
            else "heads and losses: not compiled (by --no-compile, or for want of Triton or of a C compiler)"
        )
    if micro != local:
        lines.append(
            "micro-batches: BN statistics, key shuffling and in-batch negatives cover one micro-batch of all devices; "
            "the queue takes all keys after the step"
        )
    if method.mixed_views:
        lines.append(f"regions: {region_sampler(config, feature_grid(method, recipe.image_size))}")
    return "\n".join(lines)


def _prepare_run_dir(config: Config) -> Path:
    run_dir = Path(config.run.run_dir)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        probe = run_dir / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as reason:
        raise UserMistake(
            f"--run-dir {run_dir}: {reason.strerror or reason}; choose a folder that can be written"
        ) from None
    return run_dir


def _compile_heads(method: Method) -> None:
    for module in method.compile_targets():
        module.compile()


def _graphed(config: Config, runtime: Runtime, method: Method) -> GraphedForwardBackward | None:
    if not config.run.cuda_graph:
        return None
    if config.run.micro_batch:
        raise UserMistake("--cuda-graph takes each step as a whole; leave out --micro-batch or the graph")
    return GraphedForwardBackward(method, runtime)


def run(config: Config, taken_over: Sequence[str] = ()) -> int:
    """One run from resolved configuration to exit code.

    Args:
        config: resolved configuration.
        taken_over: values that the run's folder has recorded and that the recipe would have otherwise, to be told.
    """
    if not config.run.data and config.run.loader != "synthetic":
        raise UserMistake(
            "--data is needed: pack a folder of images with `python tools/make_ffcv_dataset.py FOLDER photos.beton`, "
            "then give --data photos.beton"
        )
    with start(config.run) as runtime:
        batch_per_device(config, runtime.world_size)
        method = build_method(config, runtime)
        check_regions(config, runtime, method)
        check_augment(config, runtime)
        if runtime.is_main:
            print(describe(config, runtime, method), flush=True)
            if taken_over:
                print(f"goes on as recorded, not as asked for by the recipe: {'; '.join(taken_over)}", flush=True)
        if config.run.dry_run:
            if runtime.is_main:
                print(json.dumps(config.to_json(), indent=1))
            return 0
        return _train_on(config, runtime, method)


def _optimizer(config: Config, method: Method) -> torch.optim.Optimizer:
    try:
        return build_optimizer(method, config.recipe.optim, config.recipe.global_batch)
    except ValueError as reason:
        raise UserMistake(f"--optim: {reason}; give another value") from None


def _train_on(config: Config, runtime: Runtime, method: Method) -> int:
    watch = SignalWatch()
    run_dir = _prepare_run_dir(config) if runtime.is_main else None
    data = run_data.open_data(config, runtime)
    try:
        state = TrainState(
            method=method,
            optimizer=_optimizer(config, method),
            scaler=torch.amp.GradScaler("cuda") if runtime.dtype is torch.float16 else None,
            step=0,
            sums={},
            sum_steps=0,
            non_finite=torch.zeros(1, dtype=torch.int64, device=runtime.device),
        )
        config_json = {
            **config.to_json(),
            "data_hash": data.train.data_hash,
            "data_images": data.train.num_samples,
            "versions": versions(),
            "world_size": runtime.world_size,
        }
        checkpoints = run_checkpoints(config, config_json, runtime)
        resumed = checkpoints.restore(state)
        steps_per_epoch = len(data.train)
        total = steps_per_epoch * config.recipe.epochs
        last = min(total, config.run.max_steps or total)
        if resumed and state.step >= last:
            if runtime.is_main:
                print(
                    f"{config.run.run_dir} is complete at step {state.step}; to train longer raise --epochs in a new "
                    "--run-dir"
                )
            return 0
        checkpoints.check_space(state)
        if run_dir is not None:
            document = json.dumps(config_json, indent=1).encode()
            persistently(CONFIG, lambda: write_atomically(run_dir / CONFIG, document))
        if runtime.compile:
            _compile_heads(method)
        metrics = Metrics(run_dir, last, state.metrics_bytes, state.step)
        builder = InputBuilder(config, method, runtime, feature_grid(method, config.recipe.image_size))
        job = Job(
            config=config,
            runtime=runtime,
            stream=InputStream(builder, data.train),
            metrics=metrics,
            run_dir=run_dir,
            wrapped=wrap_distributed(method, runtime, config.run.deterministic),
            total_steps=total,
            last_step=last,
            steps_per_epoch=steps_per_epoch,
            checkpoints=checkpoints,
            graphed=_graphed(config, runtime, method),
            evaluate=_evaluator(config, runtime, method, data, metrics),
        )
        return _run_job(job, state, watch, resumed)
    finally:
        data.close()


def _evaluator(config: Config, runtime: Runtime, method: Method, data: run_data.RunData, metrics: Metrics) -> Any:
    def evaluate(step: int, epoch: int) -> float | None:
        if runtime.is_main:
            metrics.row("health", step, epoch, **health_figures(method, data, runtime))
        if data.queries is None:
            return None
        figures = knn_figures(method, data, runtime)
        metrics.row("knn", step, epoch, **figures)
        return figures["top1"]

    return evaluate


def _run_job(job: Job, state: TrainState, watch: SignalWatch, resumed: bool) -> int:
    epoch = state.step // job.steps_per_epoch
    job.metrics.row(
        "resume" if resumed else "start",
        state.step,
        epoch,
        world_size=job.runtime.world_size,
        steps_per_epoch=job.steps_per_epoch,
        last_step=job.last_step,
    )
    try:
        train(job, state, watch)
        bad = job.stream.pipeline.stats().bad_records
        job.metrics.row("end", state.step, state.step // job.steps_per_epoch, bad_records=len(bad))
    finally:
        job.metrics.close()
    if job.runtime.is_main:
        print(
            f"done: {job.run_dir}, backbone in {job.run_dir}/backbone.safetensors"
            + (f"; {len(bad)} damaged records were replaced, for example {next(iter(bad.items()))}" if bad else "")
        )
        _write_report(job)
    return 0


def _write_report(job: Job) -> None:
    """The page about the run; a run that ended well does not fail for want of its page."""
    if not job.config.run.report or job.run_dir is None:
        return
    from train.record.page import build_report

    try:
        build_report([job.run_dir], job.run_dir / "report.html")
    except Exception as reason:  # whatever a chart or picture stumbles over
        print(f"report.html could not be written: {reason}; run python tools/report.py {job.run_dir}", file=sys.stderr)


def _run_or_go_on(arguments: Sequence[str]) -> int:
    """Run what the command line asks for; a run that goes on keeps its recorded values where no flag says otherwise."""
    config = resolve(arguments)
    recorded = recorded_config(Path(config.run.run_dir) / "checkpoints") if config.run.resume == "auto" else None
    kept = config if recorded is None else continued(arguments, config, recorded)
    return run(kept, taken_over=changed_fields(config.to_json(), kept.to_json()))


def main(argv: Sequence[str] | None = None) -> int:
    """Train as the command line says; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    return run_to_exit_code(lambda: _run_or_go_on(arguments))


if __name__ == "__main__":
    sys.exit(main())
