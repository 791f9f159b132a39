"""`--micro-batch auto`: the largest micro-batch that a device has memory for, by the estimate and then by a trial."""

from __future__ import annotations

import socket
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch

from .build import build_state
from .config import Config
from .errors import UserMistake
from .inputs import batch_per_device, check_batch
from .memory_estimate import estimate, free_bytes, is_lack_of_memory, shown
from .proving.setting import method_and_inputs, setting_of
from .runtime import Runtime

TRIED = {"cuda"}
"""Kinds of devices on which a step is tried. The host's own memory is not: where it runs out, the system ends the
process, or another one."""

_NEAR = 1.03


def micro_batches(config: Config, world_size: int, most: int) -> Iterator[int]:
    """Micro-batches of at most `most` images that keep BN groups and pairs whole, the largest first."""
    local = batch_per_device(config, world_size)
    # From two images on: batch norm has no statistics of a single one.
    for size in range(min(most, local), 1, -1):
        # Asked before the check, whose refusals name the flag as if the user had given it.
        if local % size == 0 and _fits_together(with_micro_batch(config, size), world_size):
            yield size


def with_micro_batch(config: Config, size: int) -> Config:
    """The configuration with this `--micro-batch`."""
    return replace(config, run=replace(config.run, micro_batch=size))


def _fits_together(config: Config, world_size: int) -> bool:
    try:
        check_batch(config, world_size)
    except UserMistake:
        return False
    return True


def bytes_of(config: Config, world_size: int, size: int, device: torch.device, dtype: torch.dtype) -> int:
    """Estimated bytes on the device with micro-batches of this size."""
    return estimate(with_micro_batch(config, size), world_size, device, dtype).total(device)


def largest_that_fits(
    config: Config, sizes: list[int], world_size: int, device: torch.device, dtype: torch.dtype, free: int
) -> int:
    """The largest of `sizes`, which are in descending order, whose estimate stays within `free` bytes; 0 for none.

    An estimate takes seconds and there may be dozens of divisors. So the largest is looked at, and then what the two
    smallest take tells where to look: between micro-batches memory grows by the same amount with every image.
    """

    def needs(size: int) -> int:
        # A second time at no cost: `estimate` keeps what it has found.
        return bytes_of(config, world_size, size, device, dtype)

    if not sizes:
        return 0
    if needs(sizes[0]) <= free:
        return sizes[0]
    likely = sizes[1:]
    if len(likely) > 1:
        more, least = likely[-2:]
        start, slope = needs(least), (needs(more) - needs(least)) / (more - least)
        # Near the limit the line is too coarse: there each one is looked at.
        likely = [each for each in likely if start + slope * (each - least) <= free * _NEAR]
    return next((each for each in likely if needs(each) <= free), 0)


def settle_micro_batch(config: Config, runtime: Runtime, recorded: Mapping[str, Any] | None) -> tuple[Config, str]:
    """The configuration with a number for `--micro-batch auto`, and a line about it; every process must call it.

    What is computed is what the same number by hand computes. A run that goes on keeps the recorded number.

    Args:
        config: of the run.
        runtime: this process.
        recorded: configuration in the checkpoint that the run goes on from; None for a new run.

    Returns:
        `config` itself and empty text where the number was given.

    Raises:
        UserMistake: batch, ranks, BN groups and queue do not fit together, or no micro-batch fits the memory.
    """
    if config.run.micro_batch != "auto":
        return config, ""
    # Rank 0's folder decides: the others may not see it.
    recorded = runtime.gather_objects(recorded)[0]
    if recorded is not None:
        size = recorded["run"]["micro_batch"]
        return with_micro_batch(config, size), f"micro-batch {size or 'whole'}: as recorded"
    whole = with_micro_batch(config, 0)
    # First as a whole: what no micro-batch can mend is refused by the name of its own flag.
    check_batch(whole, runtime.world_size)
    return _largest(whole, runtime)


def _largest(config: Config, runtime: Runtime) -> tuple[Config, str]:
    local = batch_per_device(config, runtime.world_size)
    free = free_bytes(runtime.device, _sharing(runtime))
    sizes = list(micro_batches(config, runtime.world_size, local))
    largest = largest_that_fits(config, sizes, runtime.world_size, runtime.device, runtime.dtype, free)
    # All ranks take the same: the smallest that any of them has room for.
    agreed = min(runtime.gather_objects(largest))
    for size in (each for each in sizes if each <= agreed):
        if runtime.agree(not _step_fits(with_micro_batch(config, size), runtime)):
            continue
        settled = with_micro_batch(config, 0 if size == local else size)
        needed = bytes_of(config, runtime.world_size, size, runtime.device, runtime.dtype)
        how = "tried" if runtime.device.type in TRIED else "estimated"
        return settled, (
            f"micro-batch {size} of {local} images a device: about {shown(needed)}, {how}; {shown(free)} were free"
        )
    least = f"the least, {sizes[-1]} images," if sizes else "none that keeps BN groups whole"
    raise UserMistake(
        f"--micro-batch auto: of a forward pass of {local} images {least} needs more than the {shown(free)} that are "
        f"free on {runtime.device.type}; choose a smaller --image-size or --bn.group-size, or a device with more memory"
    )


def _sharing(runtime: Runtime) -> int:
    """Processes that take their memory from this process's device."""
    if runtime.device.type == "cuda":
        return 1
    return runtime.gather_objects(socket.gethostname()).count(socket.gethostname())


def _step_fits(config: Config, runtime: Runtime) -> bool:
    """Whether a step with micro-batches of this size has the memory it needs, found by taking one on noise."""
    if runtime.device.type not in TRIED:
        return True
    try:
        _take_step(config, runtime)
    except RuntimeError as error:
        if not is_lack_of_memory(error):
            raise
        return False
    finally:
        # The run's own tensors must find the memory that those of the trial have left.
        torch.cuda.empty_cache()
    return True


def _take_step(config: Config, runtime: Runtime) -> None:
    """Two passes and an optimizer step of a method that is thrown away, the views of a whole step beside them."""
    setting = setting_of(config, runtime)
    with torch.random.fork_rng(devices=[runtime.device] if runtime.device.type == "cuda" else []):
        method, inputs = method_and_inputs(setting)
        rounds = batch_per_device(config, runtime.world_size) // len(inputs.view1)
        # This step's other micro-batches and the whole next step, which is made while this one runs.
        views = [*inputs.views(), *inputs.mixed.values()]
        held = [torch.empty_like(view) for _ in range(2 * rounds - 1) for view in views]
        state = build_state(setting.config, setting.runtime, method)
        # The second pass adds to gradients that are there, and so takes the most.
        for _ in range(2):
            with setting.runtime.autocast():
                loss = method(inputs).loss
            loss.backward()
        state.optimizer.step()
    del held
