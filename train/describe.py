"""What a run says of itself before it starts."""

from __future__ import annotations

from models.foreign import ForeignTrunk
from models.methods.base import Method
from models.vit import VitTrunk

from .build import feature_grid
from .config import Config
from .inputs import batch_per_device, bn_group_size, images_per_forward, region_sampler
from .runtime import Runtime
from .schedules import scaled_lr


def describe(config: Config, runtime: Runtime, method: Method) -> str:
    """What follows from the flags: batch and learning rate of each device, BN groups, region bounds."""
    local, micro = batch_per_device(config, runtime.world_size), images_per_forward(config, runtime.world_size)
    recipe = config.recipe
    lines = [
        f"{config.run.method} on {recipe.arch}, {recipe.image_size} px, {recipe.epochs} epochs, recipe "
        f"{config.run.recipe}",
        f"global batch {recipe.global_batch} = {runtime.world_size} x {local // micro} x {micro} images (devices, "
        f"micro-batches, images), lr {scaled_lr(recipe.optim, recipe.global_batch):.6g}, {str(runtime.dtype)[6:]} on "
        f"{runtime.device.type}",
        f"batch norm: {recipe.bn.mode}"
        + (f" of {bn_group_size(config) or micro} images" if recipe.bn.mode == "group" else ""),
    ]
    if isinstance(method.encoder, ForeignTrunk):
        lines.append(
            f"backbone {recipe.arch}: stride {method.encoder.stride}, {method.encoder.feature_dim} channels; starts as "
            "its library draws it, without dropout and drop-path (--conv-init and --zero-init-residual are for the "
            "built-in ones)"
        )
    if isinstance(method.encoder, VitTrunk):
        lines.append(
            f"backbone {recipe.arch}: its feature is the class token; it starts as MoCo v3's, and its patch projection "
            "stays so (--conv-init and --zero-init-residual are for ResNets)"
        )
    if method.frozen_stages:
        kept = sum(p.numel() for p in method.encoder.parameters() if not p.requires_grad)
        lines.append(f"frozen: {', '.join(method.frozen_stages)} ({kept:,} parameters of the backbone)")
    if runtime.device.type == "cuda":
        lines.append(
            "heads and losses: compiled"
            if runtime.compile
            else "heads and losses: not compiled (by --no-compile, or for want of Triton or of a C compiler)"
        )
    if small := getattr(config.model, "small_crops", 0):
        lines.append(f"crops: 2 of {recipe.image_size} px and {small} of {config.model.small_size} px")
    if micro != local:
        lines.append(
            "micro-batches: BN statistics, key shuffling, in-batch negatives and SwAV's assignments cover one "
            "micro-batch of all devices; "
            "the queue takes all keys after the step"
        )
    if method.mixed_views:
        lines.append(f"regions: {region_sampler(config, feature_grid(method, recipe.image_size))}")
    return "\n".join(lines)
