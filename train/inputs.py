"""From a loader's batch to a method's inputs: regions, key shuffling, micro-batches, one step ahead on a GPU."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from models.collectives import all_gather_rows
from models.methods.base import Method, StepInputs
from models.ops.choice import AUGMENT
from models.ops.launcher import CudaModule
from pipeline import augment
from pipeline.cuts import Cuts
from pipeline.interface import Batch, Pipeline, PipelineConfig, PipelineStats, ViewSpec
from pipeline.profiles import Profile, get_profile, with_views
from pipeline.regions import RegionSampler, make_mixed
from pipeline.rng import SLOT_SHUFFLE, permutation

from .config import Config
from .errors import UserMistake
from .runtime import Runtime

VIEWS = ("view1", "view2")


def large_views(config: Config) -> tuple[ViewSpec, ...]:
    """The two random crops that the recipe's profile asks for, which every method has."""
    specs = augment.view_specs(config.recipe.augment.profile, config.recipe.image_size)
    if config.recipe.augment.min_scale:
        low = config.recipe.augment.min_scale
        specs = tuple(dataclasses.replace(spec, scale=(low, spec.scale[1])) for spec in specs)
    return specs


def train_views(config: Config) -> tuple[ViewSpec, ...]:
    """All that the method trains on: the two crops of `large_views`, and smaller ones where it asks for them."""
    large, model = large_views(config), config.model
    small = tuple(
        dataclasses.replace(
            large[0], name=f"view{number + 1}", size=model.small_size, scale=model.small_scale, draw_id=number
        )
        for number in range(len(large), len(large) + getattr(model, "small_crops", 0))
    )
    return large + small


def train_profile(config: Config) -> str | Profile:
    """The recipe's augmentation profile, for as many views as `train_views` has."""
    name, count = config.recipe.augment.profile, len(train_views(config))
    return name if count == len(VIEWS) else with_views(get_profile(name), count)


def finished_views(settings: PipelineConfig, config: Config, runtime: Runtime) -> PipelineConfig:
    """`settings` with the views that the run trains on: cut, augmented and normalised as its recipe says."""
    return dataclasses.replace(
        settings,
        views=train_views(config),
        augment=train_profile(config),
        # The kernel proved itself on this card, so what `auto` would take instead is slower.
        implementation="kernel" if AUGMENT.mode == "cuda" else config.recipe.augment.implementation,
        # Autocast casts what a convolution reads; handing it the final dtype saves that pass.
        dtype=runtime.dtype,
        # pipeline/ and models/ do not know each other; the launcher of the fused kernel comes from models/.
        load_kernels=CudaModule,
    )


def made_up_batch(views: dict[str, Tensor], config: Config) -> Batch:
    """A batch of views that no loader cut, as if they came from square images of the recipe's size."""
    # Made by NumPy: where memory is estimated from shapes, tensors have no values to draw boxes from.
    samples = np.arange(len(views["view1"]))
    sizes = np.full((len(samples), 2), config.recipe.image_size)
    settings = PipelineConfig("", train_views(config), len(samples), augment=train_profile(config))
    index = torch.from_numpy(samples)
    return Batch(views, index, index, torch.from_numpy(sizes), Cuts(settings, 0, samples, sizes))


def batch_per_device(config: Config, world_size: int) -> int:
    """Images of a global batch on one device."""
    return config.recipe.global_batch // world_size


def micro_batch(config: Config) -> int:
    """Images of a micro-batch; 0 for a device's whole part of the batch.

    Raises:
        UserMistake: `--micro-batch auto` where nobody settles it; `train.micro_batch` does so for training.
    """
    if config.run.micro_batch == "auto":
        raise UserMistake("--micro-batch auto is for train/main.py; give a number of images here")
    return config.run.micro_batch


def images_per_forward(config: Config, world_size: int) -> int:
    """Images of one forward pass on one device: its micro-batch, or its whole part of the batch."""
    return micro_batch(config) or batch_per_device(config, world_size)


def check_batch(config: Config, world_size: int) -> None:
    """Refuse sizes that do not divide, or a queue that cannot take a step's keys.

    Raises:
        UserMistake: when batch, ranks, micro-batches, BN groups and queue do not fit together.
    """
    total = config.recipe.global_batch
    if total % world_size:
        raise UserMistake(
            f"--global-batch {total} does not divide over {world_size} ranks; choose a multiple of {world_size}"
        )
    local, micro = batch_per_device(config, world_size), images_per_forward(config, world_size)
    if local % micro:
        raise UserMistake(f"--micro-batch {micro} does not divide the {local} images of a device; choose a divisor")
    _check_groups(config, micro)
    # A batch that does not fit would overwrite its own first keys.
    queue_size = getattr(config.model, "queue_size", None)
    if queue_size and queue_size < total and getattr(config.model, "global_loss", True):
        raise UserMistake(
            f"--queue-size {queue_size} is smaller than --global-batch {total}, whose keys enter it at every step; "
            "raise it"
        )


def _check_groups(config: Config, micro: int) -> None:
    # CARE's attention stream has groups of its own.
    stream_group = getattr(config.model, "t_bn_group_size", 0)
    groups = max(bn_group_size(config), pairing_group_size(config))
    for flag, group in (("--bn.group-size", groups), ("--t-bn-group-size", stream_group)):
        if group and micro % group:
            raise UserMistake(
                f"{flag} {group} does not divide the {micro} images of one forward pass; choose a divisor of {micro}, "
                "or another --global-batch"
            )


def bn_group_size(config: Config) -> int:
    """Images that share BN statistics in mode `group`; 0 elsewhere and for a rank's whole batch."""
    return config.recipe.bn.group_size if config.recipe.bn.mode == "group" else 0


def pairing_group_size(config: Config) -> int:
    """Images among which regions are exchanged; 0 for a rank's whole forward pass, or where pairs span all ranks.

    With synchronised BN as well, so that there too a group size makes the pairs the same on any number of ranks.
    """
    region = getattr(config.model, "region", None)
    return config.recipe.bn.group_size if region is not None and region.pairing_scope == "group" else 0


def grid_cells(stride: int, image_size: int) -> int:
    """Cells a side of the last feature map of an encoder with `stride` pixels a cell."""
    return max(image_size // stride, 1)


def region_sampler(config: Config, grid: int) -> RegionSampler:
    """The sampler of a run's regions and pairs, on a feature map of `grid` cells a side.

    Only for a method that exchanges regions: the others have no such settings.

    Raises:
        ValueError: for region sides that do not fit the grid.
    """
    region = config.model.region
    return RegionSampler(
        grid=grid,
        stride=config.recipe.image_size // grid,
        seed=config.run.seed,
        sampling=region.sampling,
        lower=region.lower,
        upper=region.upper,
        per_rank=region.per_rank,
        pairing=region.pairing,
        scope=region.pairing_scope,
        group_size=pairing_group_size(config),
    )


@dataclass
class InputBuilder:
    """Builds the inputs of each step, one `StepInputs` for each micro-batch.

    Attributes:
        config: resolved configuration.
        method: tells which composites and permutations it needs.
        runtime: device, rank and world size.
        grid: cells a side of the feature map.
    """

    config: Config
    method: Method
    runtime: Runtime
    grid: int

    @cached_property
    def sampler(self) -> RegionSampler:
        """The sampler of regions and pairs; made on first use, because only some methods have its settings."""
        return region_sampler(self.config, self.grid)

    def build(self, batch: Batch, step: int, epoch: int = 0) -> list[StepInputs]:
        """Inputs of optimizer step `step`, from this rank's part of its global batch, whose views are finished."""
        local = batch.index.numel()
        micro = micro_batch(self.config) or local
        count = local // micro
        boxes = self._crop_boxes(batch)
        rows = [slice(first * micro, (first + 1) * micro) for first in range(count)]
        return [
            self.step_inputs(
                {name: view[part] for name, view in batch.views.items()},
                step,
                number,
                count,
                epoch,
                {name: box[part] for name, box in boxes.items()},
            )
            for number, part in enumerate(rows)
        ]

    def _crop_boxes(self, batch: Batch) -> dict[str, np.ndarray]:
        """The boxes (B, 6) of both views, for a method that reads them."""
        if not self.method.reads_crop_boxes:
            return {}
        if batch.cuts is None:
            raise UserMistake(
                f"--method {self.config.run.method} compares places of an image, and this batch does not say where its "
                "views were cut; take the batches from a loader of this package"
            )
        boxes = batch.cuts.boxes()
        return {name: boxes[name] for name in VIEWS}

    def step_inputs(
        self,
        views: dict[str, Tensor],
        step: int,
        micro: int,
        count: int,
        epoch: int = 0,
        crop_boxes: Mapping[str, np.ndarray] | None = None,
    ) -> StepInputs:
        """Each micro-batch of all ranks together is treated as a global batch of its own."""
        inputs = StepInputs(
            view1=views["view1"],
            view2=views["view2"],
            seed=self.config.run.seed,
            # Numbered over micro-batches, so that each has draws of its own.
            step=step * count + micro,
            rank=self.runtime.rank,
            world_size=self.runtime.world_size,
            micro_batches=count,
            epoch=epoch,
            small_views=tuple(view for name, view in views.items() if name not in VIEWS),
            crop_boxes={name: self._to_device(box) for name, box in (crop_boxes or {}).items()},
        )
        global_batch = views["view1"].shape[0] * self.runtime.world_size
        inputs.key_permutation = tuple(
            self._on_host(permutation(inputs.seed, global_batch, inputs.step, direction, SLOT_SHUFFLE))
            for direction in range(self.method.key_directions)
        )
        for direction, name in enumerate(VIEWS):
            if name in self.method.mixed_views:
                self._mix(inputs, name, views[name], direction, step)
        return inputs

    def _mix(self, inputs: StepInputs, name: str, view: Tensor, direction: int, step: int) -> None:
        """Add the mixed view of `view`, its boxes and its partners to the inputs."""
        drawn = self.sampler.draw(step, direction, view.shape[0], inputs.rank, inputs.world_size, inputs.step)
        index = self._to_device(drawn.partner)
        inputs.partner[name] = index
        inputs.mixed[name] = make_mixed(view, index, drawn.region, all_gather_rows if drawn.across_ranks else None)
        inputs.box_cells[name] = drawn.region.boxes(view.shape[0], view.device)

    def _to_device(self, values: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(values)
        if self.runtime.device.type == "cuda":
            # From ordinary memory the copy would make the host wait.
            return tensor.pin_memory().to(self.runtime.device, non_blocking=True)
        return tensor

    def _on_host(self, values: np.ndarray) -> Tensor:
        """Permutations stay on the host, which must know them to exchange images between ranks without waiting."""
        tensor = torch.from_numpy(values)
        return tensor.pin_memory() if self.runtime.device.type == "cuda" else tensor


@dataclass
class InputStream:
    """The steps of one epoch as (step, inputs), prepared one step ahead on a side stream where there is a GPU.

    Attributes:
        builder: makes the inputs.
        pipeline: delivers batches.
    """

    builder: InputBuilder
    pipeline: Pipeline
    _stream: torch.cuda.Stream | None = field(default=None, init=False)
    _told: PipelineStats = field(default_factory=PipelineStats, init=False)

    def __post_init__(self) -> None:
        if self.builder.runtime.device.type == "cuda":
            self._stream = torch.cuda.Stream()

    def epoch(self, epoch: int, first_step_in_epoch: int, first_step: int) -> Iterator[tuple[int, list[StepInputs]]]:
        """Inputs from `first_step_in_epoch` on; `first_step` is the optimizer step it has."""
        self.pipeline.set_epoch(epoch, first_step_in_epoch)
        source = iter(self.pipeline)
        pending = self._next(source, first_step, epoch)
        step = first_step
        while pending is not None:
            current, ready = pending, None
            if self._stream is not None:
                own = torch.cuda.current_stream()
                own.wait_stream(self._stream)
                _record(current, own)
                # What the side stream must wait for before it uses memory again: the steps queued up to here, not the
                # one that the caller queues now, beside which the next batch is copied and augmented.
                ready = torch.cuda.Event()
                ready.record(own)
            # First the step: while the host prepares the next batch the device is at work.
            yield step, current
            step += 1
            pending = self._next(source, step, epoch, ready)

    def stages(self, seconds: float) -> dict[str, float]:
        """What each stage before the step did since the last call, by the loader's own clock.

        Args:
            seconds: since the last call.

        Returns:
            `data_wait_share`, the share of the time in which the host waited for a batch (what the loader queues on a
            GPU after waiting for the decoder is no waiting); and where the loader tells them `loader_busy_share` (its
            thread read, decoded, cropped and mostly augmented), `augment_share` (batches were augmented on the host's
            own thread) and `batches_ready`, how many batches were waiting on average when one was asked for.
        """
        now, before = self.pipeline.stats(), self._told
        self._told = dataclasses.replace(now)
        found = {"data_wait_share": min((now.wait_s - before.wait_s) / seconds, 1.0)}
        asked = now.asked - before.asked
        # Loaders of another library have no clock of their own.
        if now.busy_s and asked:
            found["loader_busy_share"] = min((now.busy_s - before.busy_s) / seconds, 1.0)
        if now.augment_s:
            found["augment_share"] = min((now.augment_s - before.augment_s) / seconds, 1.0)
        if asked and (now.ready or now.busy_s):
            found["batches_ready"] = (now.ready - before.ready) / asked
        return found

    def _next(
        self, source: Iterator[Batch], step: int, epoch: int, ready: torch.cuda.Event | None = None
    ) -> list[StepInputs] | None:
        """Inputs of the next step, None behind the last; the side stream begins after the event `ready`."""
        if self._stream is None:
            return self._take(source, step, epoch)
        if ready is None:
            self._stream.wait_stream(torch.cuda.current_stream())
        else:
            self._stream.wait_event(ready)
        # The loader works on this stream as well, so that the views it augments here are part of what runs ahead.
        with torch.cuda.stream(self._stream):
            return self._take(source, step, epoch)

    def _take(self, source: Iterator[Batch], step: int, epoch: int) -> list[StepInputs] | None:
        batch = next(source, None)
        return None if batch is None else self.builder.build(batch, step, epoch)


def _record(inputs: list[StepInputs], stream: torch.cuda.Stream) -> None:
    """Tell the allocator that tensors made on the side stream are used on `stream`."""
    for each in inputs:
        for tensor in each.tensors():
            tensor.record_stream(stream)
