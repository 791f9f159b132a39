"""What to do when a device's memory runs out: the flag and the value to try, in one line."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch

from .config import Config
from .errors import UserMistake
from .inputs import images_per_forward
from .memory_estimate import capacity_bytes, is_lack_of_memory
from .micro_batch import largest_that_fits, micro_batches
from .runtime import Runtime, choose_dtype


@contextlib.contextmanager
def naming_remedy(remedy: Callable[[], str]) -> Iterator[None]:
    """Within the block a lack of device memory becomes a mistake of the user that ends in what `remedy` gives.

    Raises:
        UserMistake: memory ran out; the allocator's own error is its cause.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_lack_of_memory(error):
            raise
        # The allocator's first sentences say how much was asked for; the rest is about its own settings.
        cause = ". ".join(str(error).partition("\n")[0].split(". ")[:2]).rstrip(".")
        raise UserMistake(f"{cause or 'out of memory'}; try {remedy()}") from error


def training_remedy(config: Config, runtime: Runtime) -> str:
    """The flag and value by which a training step takes less memory."""
    micro = _smaller_micro_batch(config, runtime)
    if micro:
        # A graph takes each step as a whole, so the two flags exclude each other.
        return f"--micro-batch {micro}" + (" without --cuda-graph" if config.run.cuda_graph else "")
    return _less_an_image(runtime, config.recipe.image_size)


def _smaller_micro_batch(config: Config, runtime: Runtime) -> int:
    """The largest micro-batch up to half of the present one that keeps BN groups whole and fits a GPU by the estimate.

    0 where there is none.
    """
    if config.run.micro_batch == "auto":
        return 0  # memory ran out before one was settled
    world_size = runtime.world_size
    # Up to half: the present one has failed, whatever the estimate says of it and its neighbours.
    sizes = list(micro_batches(config, world_size, images_per_forward(config, world_size) // 2))
    if not sizes or runtime.device.type != "cuda":
        return sizes[0] if sizes else 0
    try:
        capacity = capacity_bytes(runtime.device)
        return largest_that_fits(config, sizes, world_size, runtime.device, runtime.dtype, capacity)
    except Exception:  # of any kind: an estimate that fails must not take the place of the line about memory
        return sizes[0]


def evaluation_remedy(runtime: Runtime, batch: int, image_size: int) -> str:
    """The flag and value by which an evaluation takes less memory.

    Args:
        runtime: device and precision.
        batch: images of a training step over all ranks; 0 where none are trained on.
        image_size: side in pixels; 0 where `--image-size` is no flag of the protocol.
    """
    half = batch // 2 // runtime.world_size * runtime.world_size
    # Batch norm over each rank's part needs two images there.
    if half >= 2 * runtime.world_size:
        return f"--global-batch {half}, or more GPUs, which keep the protocol's batch"
    return _less_an_image(runtime, image_size)


def _less_an_image(runtime: Runtime, image_size: int) -> str:
    half_precision = choose_dtype("auto", runtime.device)
    if runtime.dtype is torch.float32 and half_precision is not torch.float32:
        return f"--precision {'bf16' if half_precision is torch.bfloat16 else 'fp16'}"
    # Multiples of 32, the stride of the trunks.
    smaller = image_size * 3 // 4 // 32 * 32
    return f"--image-size {smaller}" if smaller else "more GPUs, or one with more memory"
