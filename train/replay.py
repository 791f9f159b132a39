"""The first step of a run that was not finite, taken once more to see where the bad value comes from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.methods.base import StepInputs

from .build import build_job, build_method, build_state
from .checkpoint import run_checkpoints
from .config import Config
from .data import open_data
from .errors import EXIT_NON_FINITE
from .loop import Job, take_step
from .record.run import CONFIG
from .resolve import resolve
from .runtime import Runtime, start
from .skipped import FOLDER, Skipped, read
from .state import TrainState


def replay(run_dir: Path, data: str = "") -> int:
    """Take the kept step of a run again and print what was found.

    Sums of another device, precision or number of processes differ in their last bits, which seldom makes a value
    finite that was not.

    Args:
        run_dir: the run's folder.
        data: where the images are now; the run's own place when empty.

    Returns:
        4 where a step is bad again, 0 where all are finite.

    Raises:
        UserMistake: the run has no such step, or its data or settings cannot be used any more.
    """
    skipped = read(run_dir)
    moved = ["--data", data] if data else []
    config = resolve(
        ["--config", str(run_dir / CONFIG), "--run-dir", str(run_dir / FOLDER), "--processes", "1", *moved]
    )
    with start(config.run) as runtime:
        return _replay(config, runtime, skipped)


def _replay(config: Config, runtime: Runtime, skipped: Skipped) -> int:
    images = open_data(config, runtime)
    try:
        state = build_state(config, runtime, build_method(config, runtime))
        facts = {**config.to_json(), "data_hash": images.train.data_hash}
        checkpoints = run_checkpoints(config, facts, runtime)
        checkpoints.restore(state)
        job = build_job(config, runtime, state, images.train, checkpoints)
        state.method.train()
        return _take_steps(job, state, skipped)
    finally:
        images.close()


def _take_steps(job: Job, state: TrainState, skipped: Skipped) -> int:
    while state.step <= skipped.last:
        epoch, first = divmod(state.step, job.steps_per_epoch)
        for step, inputs in job.stream.epoch(epoch, first, state.step):
            if step > skipped.last:
                break
            with _watched(state.method, inputs) as found:
                take_step(job, state, step, inputs)
            state.step = step + 1
            if step >= skipped.first and state.non_finite.item():
                print(f"step {state.step} is not finite again: {found[0] if found else 'only the loss is not'}")
                return EXIT_NON_FINITE
    print(
        f"steps {skipped.first + 1} to {skipped.last + 1} are finite here; the run's device, precision or number of "
        "processes made the difference, or the data have been mended"
    )
    return 0


@contextmanager
def _watched(method: nn.Module, micro_batches: list[StepInputs]) -> Iterator[list[str]]:
    """Within the block, what is not finite is noted in the order in which it comes up: inputs, outputs, gradients."""
    found = [f"{name} of the input, image {row}" for each in micro_batches for name, row in _bad_inputs(each)]

    def after(name: str, inputs: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, Tensor) and not output.isfinite().all():
            clean = all(each.isfinite().all() for each in inputs if isinstance(each, Tensor))
            found.append(f"output of {name}{', from finite inputs' if clean else ''}")

    def behind(name: str, gradient: Tensor) -> None:
        if not gradient.isfinite().all():
            found.append(f"gradient of {name}, after a finite forward pass")

    handles = [
        module.register_forward_hook(lambda _, inputs, output, name=name: after(name, inputs, output))
        for name, module in method.named_modules()
        if name
    ]
    handles += [
        parameter.register_hook(lambda gradient, name=name: behind(name, gradient))
        for name, parameter in method.named_parameters()
        if parameter.requires_grad
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _bad_inputs(inputs: StepInputs) -> Iterator[tuple[str, int]]:
    for number, images in enumerate(inputs.views(), 1):
        bad = ~torch.isfinite(images.flatten(1)).all(dim=1)
        yield from ((f"view{number}", row) for row in bad.nonzero().flatten().tolist())
