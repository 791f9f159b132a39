"""What every method takes, gives and promises: all that `train/` may know of a method."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, Self

import torch
from torch import Tensor, nn

from ..freezing import freeze_stages
from ..heads import global_pool


@dataclass
class StepInputs:
    """One rank's inputs of one step. B is the batch per device, G the global batch.

    Attributes:
        view1: (B, 3, S, S) normalised, channels-last.
        view2: (B, 3, S, S), the other view of the same images.
        seed: run seed, for draws made inside a method.
        step: number of this pass, 0-based, for the same: optimizer step * micro_batches + micro-batch.
        mixed: "view1" / "view2" -> (B, 3, S, S): canvas of image i with the region of its partner pasted in.
        box_cells: "view1" / "view2" -> (B, 4) int64 top, left, height, width of the pasted region in feature cells.
        partner: "view1" / "view2" -> (B,) int64: composite i holds the region of image partner[i]; an index into this
            rank's batch when pairs stay within BN groups, into the gathered global batch otherwise.
        key_permutation: one (G,) int64 permutation per key direction for ShuffleBN: the key pass processes global
            image `permutation[j]` at position j. Empty where the method does not shuffle.
        rank: this process; positions rank * B .. of the global batch are its own.
        world_size: number of processes.
        micro_batches: passes of one optimizer step.
        epoch: number of the epoch, 0-based, that the step belongs to.
        small_views: further views of the same images, each (B, 3, s, s) of one smaller size, for methods that train on
            more than two.
        crop_boxes: "view1" / "view2" -> (B, 6) float32, where in its image each view was cut: left, top, right and
            bottom edge, then width and height of the image, in pixels; left and right change places where the view is
            flipped. Empty where the method does not ask for it.
    """

    view1: Tensor
    view2: Tensor
    seed: int = 0
    step: int = 0
    mixed: dict[str, Tensor] = field(default_factory=dict)
    box_cells: dict[str, Tensor] = field(default_factory=dict)
    partner: dict[str, Tensor] = field(default_factory=dict)
    key_permutation: tuple[Tensor, ...] = ()
    rank: int = 0
    world_size: int = 1
    micro_batches: int = 1
    epoch: int = 0
    small_views: tuple[Tensor, ...] = ()
    crop_boxes: dict[str, Tensor] = field(default_factory=dict)

    def views(self) -> list[Tensor]:
        """The views of the images, the two large ones first."""
        return [self.view1, self.view2, *self.small_views]

    def tensors(self) -> list[Tensor]:
        """All that lies on the device, the views first, in a fixed order; permutations stay on the host."""
        named = [self.mixed, self.box_cells, self.partner, self.crop_boxes]
        return [*self.views(), *(group[name] for group in named for name in sorted(group))]


@dataclass
class StepOutput:
    """What a forward pass gives.

    Attributes:
        loss: scalar with a graph: this rank's mean, so that averaging gradients over ranks gives the global one.
        metrics: name -> detached scalar tensor on the device ("ins", "region/paste", ...); logged as `loss/<name>`.
        keys: tensors that `after_step` needs, detached; for a queue, this rank's (B, D) keys by queue name.
    """

    loss: Tensor
    metrics: dict[str, Tensor]
    keys: dict[str, Tensor] = field(default_factory=dict)


class CompileTarget(Protocol):
    """A module, or a part of one, that compiles in place."""

    def compile(self) -> None:
        """Compile for the shapes of the run."""


class Method(nn.Module, ABC):
    """A self-supervised method: encoders, heads, memory, and the order of events in a step.

    A subclass is constructed as `Cls(config, arch=..., image_size=..., bn_mode=..., bn_group_size=...)` with its own
    frozen dataclass `Config`, and sets `encoder`, the trunk that is exported: images -> feature map (B, C, H, W).
    `bn_mode` is "group", "sync" or "plain" (`models/norm.py`), the recipe's choice for all networks of the method.
    """

    Config: ClassVar[type]
    """Frozen dataclass of the method's hyper-parameters; every field becomes a flag."""

    ema_index_offset: ClassVar[int] = 0
    """The EMA after optimizer step t uses coefficient number t + offset: 1 where the paper's code updates at the start
    of the next step (MoCo, DenseCL, MoBY, MoCo v3, CARE), 0 where it updates after the optimizer step (BYOL, LEWEL)."""

    reads_positions: ClassVar[bool] = False
    """Whether the method reads single cells of the feature map, and not only its mean."""

    reads_crop_boxes: ClassVar[bool] = False
    """Whether a step needs to know where in its image each view was cut."""

    encoder: nn.Module
    frozen_stages: tuple[str, ...] = ()
    """Parts of the backbone that are not trained, by name; see `freeze`."""

    def freeze(self, stages: Sequence[str]) -> None:
        """Keep parts of the backbone as they are: no gradient, and norms in eval mode, in the momentum network too.

        Called before the optimizer is built, which takes the parameters with a gradient.

        Args:
            stages: names of modules or parameters of the backbone, such as "layer1" or "cls_token".

        Raises:
            ValueError: a name that the backbone does not have, or nothing left to train.
        """
        self.frozen_stages = tuple(stages)
        freeze_stages(self.encoder, stages)
        self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        """Set training mode, but leave the norms of frozen stages in eval mode."""
        super().train(mode)
        # The momentum network's as well: with statistics of a batch it would be another network than the online one.
        for name, part in self.named_modules():
            network, _, stage = name.partition(".")
            if network in ("encoder", "momentum_encoder") and stage in self.frozen_stages:
                part.eval()
        return self

    @property
    def mixed_views(self) -> tuple[str, ...]:
        """The views that the method wants region-swapped composites of."""
        return ()

    @property
    def key_directions(self) -> int:
        """How many ShuffleBN permutations a step needs."""
        return 0

    @abstractmethod
    def forward(self, inputs: StepInputs) -> StepOutput:
        """Loss and detached metrics; changes no state but BN running statistics."""

    def before_update(self, step: int) -> None:
        """Change the gradients of optimizer step `step` before it is taken; called once, after its last backward pass.

        A gradient of None leaves a parameter as it is.
        """

    @torch.no_grad()
    def after_step(self, output: StepOutput, ema_momentum: float) -> None:
        """EMA of the momentum network and enqueueing of keys; called once after each optimizer step."""

    def momentum_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        """(online, momentum) modules whose parameters are averaged: each child `momentum_<name>` follows `<name>`."""
        prefix = "momentum_"
        momentum = {name: child for name, child in self.named_children() if name.startswith(prefix)}
        return [(self.get_submodule(name.removeprefix(prefix)), child) for name, child in momentum.items()]

    def fixed_lr_modules(self) -> list[nn.Module]:
        """Modules whose learning rate stays constant (SimSiam's predictor)."""
        return []

    def host_state(self) -> dict[str, Any]:
        """State outside `state_dict` that a checkpoint must hold (queue pointers), JSON-serialisable."""
        return {}

    def load_host_state(self, state: dict[str, Any]) -> None:
        """Inverse of `host_state`."""

    def synchronise_momentum(self) -> None:
        """Copy the online weights into the momentum network, after the online ones were loaded from a file."""
        for online, momentum in self.momentum_pairs():
            momentum.load_state_dict(online.state_dict())

    def compile_targets(self) -> list[CompileTarget]:
        """What `--compile` compiles in place: heads, whose shapes never change within a run."""
        return [module for name, module in self.named_children() if "project" in name or "predict" in name]

    def features(self, images: Tensor) -> Tensor:
        """Globally average-pooled features (B, C) of the exported trunk, fp32."""
        feature_map: Tensor = self.encoder(images)
        return global_pool(feature_map.float())
