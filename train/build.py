"""From a resolved configuration and a started process to what training works with: method, state and job.

Benchmarks, analyses and tests make theirs here too, so that what they measure is what `train/main.py` runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from models.foreign import check_image_size
from models.methods import METHODS
from models.methods.base import Method
from models.vit import PATCH, VitTrunk
from pipeline.augment import choose_implementation
from pipeline.interface import Pipeline

from .backbone_io import load_into
from .callbacks import Callback
from .checkpoint import Checkpoints
from .config import Config
from .cuda_graph import GraphedForwardBackward
from .errors import UserMistake
from .inputs import (
    InputBuilder,
    InputStream,
    bn_group_size,
    check_batch,
    grid_cells,
    images_per_forward,
    region_sampler,
    train_views,
)
from .loop import Job
from .optim import build_optimizer
from .record.metrics import Metrics
from .runtime import Runtime, wrap_distributed
from .state import TrainState


def build_method(config: Config, runtime: Runtime) -> Method:
    """The method with its weights drawn from the seed, on the device, channels-last.

    Raises:
        ValueError: when method, architecture and sizes do not fit each other, or `--init` cannot be loaded.
    """
    torch.manual_seed(config.run.seed)
    method: Method = METHODS[config.run.method](
        config.model,
        arch=config.recipe.arch,
        image_size=config.recipe.image_size,
        bn_mode=config.recipe.bn.mode,
        bn_group_size=bn_group_size(config),
    )
    for size in sorted({spec.size for spec in train_views(config)}):
        check_image_size(method.encoder, config.recipe.arch, size)
    if config.run.init:
        load_into(method.encoder, config.run.init, config.recipe.arch)
        method.synchronise_momentum()
    _check_vit(config, method)
    method.freeze([stage.strip() for stage in config.run.freeze.split(",") if stage.strip()])
    return method.to(runtime.device).to(memory_format=torch.channels_last)


def _check_vit(config: Config, method: Method) -> None:
    """Refuse what a ViT whose map is its class token cannot serve."""
    if not isinstance(method.encoder, VitTrunk):
        return
    recipe = config.recipe
    if method.reads_positions:
        raise UserMistake(
            f"--arch {recipe.arch} gives the class token alone, and --method {config.run.method} compares places of an "
            "image; choose a ResNet, swin-t or timm:vit_small_patch16_224"
        )
    for size in sorted({spec.size for spec in train_views(config)}):
        if size % PATCH:
            raise UserMistake(f"--arch {recipe.arch} takes whole patches of {PATCH} px, and {size} px are none")


def feature_grid(method: Method, image_size: int) -> int:
    """Cells a side of the encoder's last feature map."""
    stride: int = method.encoder.stride  # type: ignore[assignment]
    return grid_cells(stride, image_size)


def check_fit(config: Config, runtime: Runtime, method: Method) -> None:
    """Refuse what no step could use on these devices, before data are opened.

    Raises:
        ValueError: batch, ranks, micro-batches, BN groups, queue, regions or augmentation do not fit together.
    """
    check_batch(config, runtime.world_size)
    if config.run.probe and not config.run.val_data:
        raise UserMistake("--probe needs --val-data, labelled images; without them there is nothing to classify")
    try:
        choose_implementation(runtime.device, runtime.dtype, config.recipe.augment.implementation)
    except ValueError as reason:  # it knows no flags
        raise UserMistake(f"--augment.implementation: {reason}") from None
    if not method.mixed_views:
        return
    size, grid = config.recipe.image_size, feature_grid(method, config.recipe.image_size)
    stride: int = method.encoder.stride  # type: ignore[assignment]
    if size > stride and size != grid * stride:
        raise UserMistake(
            f"--image-size {size} is not a whole number of feature cells of {stride} px; choose {grid * stride} or "
            f"{(grid + 1) * stride}"
        )
    # The first step's regions and pairs: what cannot be drawn then cannot be drawn at any step.
    micro = images_per_forward(config, runtime.world_size)
    region_sampler(config, grid).draw(0, 0, micro, world_size=runtime.world_size)


def build_state(config: Config, runtime: Runtime, method: Method) -> TrainState:
    """The state of a run before its first step.

    Raises:
        UserMistake: a setting that PyTorch's optimizer refuses.
    """
    try:
        optimizer = build_optimizer(method, config.recipe.optim, config.recipe.global_batch)
    except ValueError as reason:
        # PyTorch checks what our bounds do not, in words without the flag.
        raise UserMistake(f"--optim: {reason}; give another value") from None
    return TrainState(
        method=method,
        optimizer=optimizer,
        scaler=torch.amp.GradScaler("cuda") if runtime.dtype is torch.float16 else None,
        step=0,
        sums={},
        sum_steps=0,
        non_finite=torch.zeros(1, dtype=torch.int64, device=runtime.device),
    )


def last_step(config: Config, steps_per_epoch: int) -> int:
    """The optimizer step at which the run ends: that of the schedule, or an earlier `--max-steps`."""
    total = steps_per_epoch * config.recipe.epochs
    return min(total, config.run.max_steps or total)


def compile_heads(method: Method) -> None:
    """Compile in place what `--compile` compiles: heads and losses."""
    for module in method.compile_targets():
        module.compile()


def build_job(
    config: Config,
    runtime: Runtime,
    state: TrainState,
    pipeline: Pipeline,
    checkpoints: Checkpoints,
    run_dir: Path | None = None,
    callbacks: Sequence[Callback] = (),
) -> Job:
    """What the steps of a run need beside its state; without a folder a job that writes and evaluates nothing.

    Args:
        config: resolved configuration.
        runtime: this process.
        state: filled from the checkpoint where the run goes on from one.
        pipeline: delivers the batches of the training images.
        checkpoints: where the state is kept.
        run_dir: folder that rows are written to; None on ranks that write nothing.
        callbacks: told every row.

    Raises:
        UserMistake: `--cuda-graph` where a graph cannot serve.
    """
    method, steps = state.method, len(pipeline)
    end = last_step(config, steps)
    graphed = _graphed(config, runtime, method)
    builder = InputBuilder(config, method, runtime, feature_grid(method, config.recipe.image_size))
    return Job(
        config=config,
        runtime=runtime,
        # A graph averages gradients itself, and DDP's hooks on the parameters would do it a second time.
        wrapped=method if graphed else wrap_distributed(method, runtime, config.run.deterministic),
        stream=InputStream(builder, pipeline),
        metrics=Metrics(run_dir, end, state.metrics_bytes, state.step, steps, config.recipe.global_batch, callbacks),
        run_dir=run_dir,
        total_steps=steps * config.recipe.epochs,
        last_step=end,
        steps_per_epoch=steps,
        graphed=graphed,
        checkpoints=checkpoints,
    )


def _graphed(config: Config, runtime: Runtime, method: Method) -> GraphedForwardBackward | None:
    if not config.run.cuda_graph:
        return None
    if config.run.micro_batch:
        raise UserMistake("--cuda-graph takes each step as a whole; leave out --micro-batch or the graph")
    return GraphedForwardBackward(method, runtime)
