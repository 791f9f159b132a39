"""What a proof is about: one process's forward and backward pass, on one device."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from models.methods.base import Method, StepInputs
from models.ops.choice import CHOICES

from ..build import build_method, feature_grid
from ..config import Config
from ..inputs import InputBuilder, images_per_forward, made_up_batch, train_views
from ..runtime import Runtime

SHARED_FORWARD = "shared_forward"
CUDA_GRAPH = "cuda_graph"


@dataclass(frozen=True)
class Setting:
    """The passes of a run that are looked at.

    Attributes:
        config: of the run, with one forward pass of one device as its whole batch.
        device: "cuda:0", for example.
        dtype: that autocast computes in; float32 means no autocast.
        several: whether other processes train with this one.
    """

    config: Config
    device: str
    dtype: torch.dtype
    several: bool

    @property
    def runtime(self) -> Runtime:
        """This process alone."""
        return Runtime(0, 1, torch.device(self.device), self.dtype, compile=False)


def setting_of(config: Config, runtime: Runtime) -> Setting:
    """The setting of a run's process."""
    images = images_per_forward(config, runtime.world_size)
    recipe = replace(config.recipe, global_batch=images)
    alone = replace(config, recipe=recipe, run=replace(config.run, micro_batch=0, init=""))
    return Setting(
        alone, str(runtime.device), runtime.dtype, runtime.world_size > 1 or images < config.recipe.global_batch
    )


@contextlib.contextmanager
def chosen(operator: str, mode: str) -> Iterator[None]:
    """Within the block the `KernelChoice` of the operator has this mode."""
    before = CHOICES[operator].mode
    CHOICES[operator].set(mode)
    try:
        yield
    finally:
        CHOICES[operator].set(before)


def method_and_inputs(setting: Setting) -> tuple[Method, StepInputs]:
    """The method with the weights of the run's seed, in training mode, and inputs of noise."""
    config, runtime = setting.config, setting.runtime
    method = build_method(config, runtime)
    method.train()
    size, images = config.recipe.image_size, config.recipe.global_batch
    generator = torch.Generator(runtime.device).manual_seed(1)
    views = {
        spec.name: torch.randn(images, 3, spec.size, spec.size, generator=generator, device=runtime.device).to(
            setting.dtype, memory_format=torch.channels_last
        )
        for spec in train_views(config)
    }
    builder = InputBuilder(config, method, runtime, feature_grid(method, size))
    return method, builder.build(made_up_batch(views, config), 0)[0]
