"""The training loop: one function, read top to bottom."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor, nn

from models.collectives import average_buffers
from models.methods.base import StepInputs, StepOutput
from models.norm import running_buffers
from models.running import moved_together
from pipeline.copies import is_streamed
from pipeline.refusal import SourceBusy, SourceClosed

from .backbone_io import BACKBONE_FILE, save_backbone
from .checkpoint import Checkpoints, stopped
from .config import Config
from .cuda_graph import GraphedForwardBackward
from .errors import NonFinite
from .inputs import InputStream
from .measure.collapse import is_due, signs
from .optim import clip_or_measure, set_learning_rate
from .record.collapse import KIND, collapse
from .record.collapse import row as collapse_row
from .record.metrics import Metrics
from .retry import persistently
from .runtime import Runtime
from .schedules import ema_at, lr_at
from .skipped import Skipped, keep
from .state import TrainState
from .stop import SignalWatch

_TAKEN = "steps_taken"
PATIENCE = 25
"""Non-finite steps in a row after which the run gives up."""


@dataclass
class Job:
    """What one run needs beside its state.

    Attributes:
        config: resolved configuration.
        runtime: this process.
        wrapped: the method as DDP (or itself); entered by `forward` alone.
        stream: inputs of each step.
        metrics: where rows go.
        run_dir: folder of the run; None on ranks that write nothing.
        total_steps: optimizer steps of the recipe's schedule.
        last_step: where this run ends, `total_steps` or an earlier `--max-steps`.
        steps_per_epoch: optimizer steps of an epoch.
        checkpoints: where the state is kept.
        evaluate: called as `evaluate(step, epoch)` at the start, every `knn_every` epochs and at the end; gives the
            online k-NN accuracy where there is one. By default it does nothing.
        graphed: forward and backward as a CUDA graph, with `--cuda-graph`.
    """

    config: Config
    runtime: Runtime
    wrapped: nn.Module
    stream: InputStream
    metrics: Metrics
    run_dir: Path | None
    total_steps: int
    last_step: int
    steps_per_epoch: int
    checkpoints: Checkpoints
    evaluate: Callable[[int, int], float | None] = lambda step, epoch: None
    graphed: GraphedForwardBackward | None = None


def train(job: Job, state: TrainState, watch: SignalWatch) -> None:
    """Take optimizer steps to the end of the run; `--on-non-finite rollback` goes back and on instead of giving up.

    Raises:
        see `_train`.
    """
    rolled_back_at: int | None = None
    while True:
        try:
            _train(job, state, watch)
            return
        except NonFinite as reason:
            if job.config.run.on_non_finite == "stop":
                raise
            rolled_back_at = _roll_back(job, state, reason, rolled_back_at)


def _roll_back(job: Job, state: TrainState, reason: NonFinite, rolled_back_at: int | None) -> int:
    """Take the newest checkpoint from before the bad steps, and go on behind them; returns the step of that.

    Going on at the checkpoint's own step would meet the same batches, and so the same end.

    Raises:
        NonFinite: `reason`, where there is no such checkpoint or this run has gone back to it already.
    """
    stuck = state.step
    if not job.checkpoints.restore(state, before=stuck - PATIENCE + 1) or state.step == rolled_back_at:
        raise reason
    good, epoch = state.step, stuck // job.steps_per_epoch
    state.step, state.sums, state.sum_steps = stuck, {}, 0
    state.non_finite.zero_()
    job.metrics.row("rollback", stuck, epoch, weights_of_step=good)
    # Saved at once: a run that is stopped and started again must not go back a second time.
    save(job, state, epoch)
    return stuck


def _train(job: Job, state: TrainState, watch: SignalWatch) -> None:
    """Take optimizer steps from `state.step` to the end of the run.

    Raises:
        SourceBusy, SourceClosed: after saving, when data behind an address cease to come.
        NonFinite: when the loss stays non-finite for `PATIENCE` steps.
        Stopped: after saving, when a signal asked for it.
        CheckpointFailed: when a checkpoint cannot be written.
    """
    run, runtime = job.config.run, job.runtime
    state.method.train()
    saved_at = state.step
    clock = _Clock(job.config.recipe.global_batch)
    if state.step == 0:
        job.evaluate(0, 0)
        clock.restart()
    while state.step < job.last_step:
        epoch, first = divmod(state.step, job.steps_per_epoch)
        for step, inputs in _fed(job, state, epoch, first):
            if isinstance(inputs, Exception):
                _save_and_raise(job, state, epoch, inputs, saved_at)
            # Counted before it is taken: where the run gives up in it, this batch has been met.
            state.step = step + 1
            take_step(job, state, step, inputs)
            clock.steps += 1
            job.metrics.at_step(state.step)
            if state.step % run.log_every == 0 or state.step == job.last_step:
                loss = _write_row(job, state, epoch, clock)
                if is_due(state.step, run.log_every):
                    _look_for_collapse(job, state, epoch, inputs[-1], loss)
                    clock.restart()
            ends_epoch = state.step % job.steps_per_epoch == 0
            if ends_epoch and run.knn_every and (epoch + 1) % run.knn_every == 0 and state.step < job.last_step:
                if _evaluate(job, state, epoch + 1, saved_at):
                    # The best is kept for good, so it must be written now, wherever the regular steps fall.
                    save(job, state, epoch)
                    saved_at = state.step
                clock.restart()
            # Asking the other ranks costs the host a wait, which a CPU run does not notice.
            # After the last step there is nothing left to stop.
            asks = runtime.device.type == "cpu" or state.step % run.log_every == 0
            if asks and state.step < job.last_step and runtime.agree(bool(watch.asked)):
                if saved_at != state.step:
                    save(job, state, epoch)
                raise stopped(state.step, watch)
            if state.step % run.checkpoint_every == 0 and saved_at != state.step < job.last_step:
                save(job, state, epoch)
                saved_at = state.step
                clock.restart()
            if state.step == job.last_step:
                break
    last_epoch = state.step // job.steps_per_epoch
    if saved_at != state.step:
        _evaluate(job, state, last_epoch, saved_at)
        save(job, state, last_epoch)


def _fed(job: Job, state: TrainState, epoch: int, first: int) -> Iterator[tuple[int, list[StepInputs] | Exception]]:
    """Steps of an epoch with their inputs; on every rank an exception at the end where data ceased to come on one."""
    source = job.stream.epoch(epoch, first, state.step)
    while True:
        problem, fed = None, None
        job.runtime.at(f"waits for the data of step {state.step}")
        try:
            fed = next(source, None)
        except (SourceBusy, SourceClosed) as reason:
            problem = reason
        # A rank that has no batch must not leave the others in the step's exchanges. Other data cannot go away so.
        told = job.runtime.gather_objects(problem) if is_streamed(job.config.run.data) else [problem]
        problem = next((each for each in told if each is not None), None)
        if problem is not None:
            yield state.step, problem
        if fed is None or problem is not None:
            return
        job.runtime.at(f"takes step {state.step}")
        yield fed


def _save_and_raise(job: Job, state: TrainState, epoch: int, problem: Exception, saved_at: int) -> NoReturn:
    """Raise on every rank what keeps the run from its data, after saving: the same command goes on from here."""
    if saved_at != state.step:
        save(job, state, epoch)
    raise problem


def _evaluate(job: Job, state: TrainState, epoch: int, saved_at: int) -> bool:
    """Measure the backbone; whether its online k-NN accuracy is the highest so far, which `state.best` then holds."""
    _average_if_late(job, state)
    top1: float | None | Exception
    job.runtime.at(f"evaluates after step {state.step}")
    try:
        top1 = job.evaluate(state.step, epoch)
    except (SourceBusy, SourceClosed) as reason:
        top1 = reason
    told = job.runtime.gather_objects(top1)
    for problem in told:
        if isinstance(problem, Exception):
            _save_and_raise(job, state, epoch, problem, saved_at)
    # Rank 0's figure counts: ranks that differed in a last digit would part over whether to save.
    top1 = told[0]
    if top1 is None or (state.best is not None and top1 <= state.best["top1"]):
        return False
    state.best = {"step": state.step, "top1": top1}
    return True


def _lr(job: Job, step: int) -> float:
    recipe = job.config.recipe
    return lr_at(step, job.steps_per_epoch, recipe.epochs, recipe.schedule, recipe.optim, recipe.global_batch)


def take_step(job: Job, state: TrainState, step: int, micro_batches: list[StepInputs]) -> None:
    """Forward and backward over the micro-batches, then optimizer, EMA, queue and running statistics.

    Nothing here waits for the device.
    """
    recipe, runtime = job.config.recipe, job.runtime
    # Any draw outside our counters (there should be none) would still be a function of (seed, step) alone.
    torch.manual_seed((job.config.run.seed << 32) + step)
    set_learning_rate(state.optimizer, _lr(job, step))
    state.guard.keep()
    outputs = []
    for position, inputs in enumerate(micro_batches):
        last = position == len(micro_batches) - 1
        outputs.append(_forward_backward(job, state, inputs, 1.0 / len(micro_batches), last))
    state.method.before_update(step)
    if state.scaler is not None:
        state.scaler.unscale_(state.optimizer)
    loss = torch.stack([output.loss.detach().float() for output in outputs]).mean()
    grad_norm = clip_or_measure(state.optimizer, recipe.optim)
    # A variance may overflow where loss and gradient are still finite, and the network of the next steps reads it.
    good = torch.isfinite(loss) & torch.isfinite(grad_norm) & state.guard.finite()
    bad = runtime.any_rank(~good)
    taken = _update(state, bad, runtime.device)
    if not taken or runtime.device.type != "cpu":
        state.guard.put_back(bad)
    state.non_finite.add_(1).mul_(bad)
    if taken:
        method = state.method
        joined = _joined(outputs)
        if runtime.device.type != "cpu":
            # The host does not know whether this step was skipped; a queue takes no key that is not finite.
            keys = {name: rows.masked_fill(bad, torch.nan) for name, rows in joined.keys.items()}
            joined = StepOutput(joined.loss, joined.metrics, keys)
        method.after_step(joined, ema_at(step + method.ema_index_offset, job.total_steps, recipe.ema))
        if _averages_at(job, step + 1):
            average_buffers(running_buffers(method))
    _accumulate(state, outputs, loss, grad_norm, bad)
    if not taken:
        _tell_skipped(job, step + 1, 1, step)
        _give_up_if_stuck(state)


def _averages_at(job: Job, step: int) -> bool:
    """Whether the ranks' running statistics are averaged after `step` steps whatever follows.

    They are read by evaluations and checkpoints alone, and the mean over ranks may be taken late, for it commutes with
    the moving average over steps. So a GPU spends no exchange on it in most steps. Where a run may be stopped after any
    step, and where results are to be the same in every digit, a late mean would round otherwise than an early one.
    """
    run, runtime = job.config.run, job.runtime
    every = runtime.device.type == "cpu" or run.deterministic
    return runtime.world_size > 1 and (every or step % run.log_every == 0)


def _average_if_late(job: Job, state: TrainState) -> None:
    """Average the running statistics over ranks where this step has not done so."""
    if job.runtime.world_size > 1 and not _averages_at(job, state.step):
        average_buffers(running_buffers(state.method))


def _forward_backward(job: Job, state: TrainState, inputs: StepInputs, weight: float, last: bool) -> StepOutput:
    if job.graphed is not None:
        return job.graphed(inputs)
    # Gradients travel once a step, after the last micro-batch.
    accumulate = isinstance(job.wrapped, nn.parallel.DistributedDataParallel) and not last
    with job.wrapped.no_sync() if accumulate else contextlib.nullcontext():  # type: ignore[operator]
        with job.runtime.autocast(), moved_together():
            output: StepOutput = job.wrapped(inputs)
        loss = output.loss * weight
        (state.scaler.scale(loss) if state.scaler is not None else loss).backward()
    return output


def _update(state: TrainState, bad: Tensor, device: torch.device) -> bool:
    """Take the optimizer step unless the gradient is non-finite; false where the host knows that it was skipped.

    On the CPU looking is free. On CUDA the fused optimizers read a flag on the device, so the host need not wait.
    """
    if device.type == "cpu":
        skip = bool(bad)
        if not skip:
            state.optimizer.step()
    elif state.scaler is not None:
        # The scaler has looked at the gradients alone; what else makes a step bad must stop it too.
        for found in state.scaler._found_inf_per_device(state.optimizer).values():
            # Never above 1: the fused optimizers skip at 1 exactly, and would take a step that both had found bad.
            found.add_(bad).clamp_(max=1)
        state.scaler.step(state.optimizer)
        state.scaler.update()
        skip = False
    else:
        # A scalar, as the gradient scaler's: AdamW takes it off its scalar step counts.
        state.optimizer.found_inf = bad.float()  # type: ignore[attr-defined]
        state.optimizer.grad_scale = None  # type: ignore[attr-defined]
        state.optimizer.step()
        skip = False
    state.optimizer.zero_grad(set_to_none=True)
    return not skip


def _joined(outputs: list[StepOutput]) -> StepOutput:
    """One output whose keys are those of all micro-batches, in the order of the rank's batch."""
    if len(outputs) == 1:
        return outputs[0]
    keys = {name: torch.cat([output.keys[name] for output in outputs]) for name in outputs[0].keys}
    return StepOutput(outputs[-1].loss, outputs[-1].metrics, keys)


def _tell_skipped(job: Job, step: int, count: int, since: int) -> None:
    """Write how many of the steps after `since` up to `step` were skipped, and keep what it takes to repeat them."""
    reason = "non-finite loss, gradient or running statistics"
    if job.run_dir is not None:
        keep(job.run_dir, Skipped(since, step - 1))
    job.metrics.row("skipped_step", step, (step - 1) // job.steps_per_epoch, steps=count, reason=reason)


def _accumulate(state: TrainState, outputs: list[StepOutput], loss: Tensor, grad_norm: Tensor, bad: Tensor) -> None:
    """Add this step's figures to the sums on the device; a bad step adds to none of them but to the steps."""
    values = {_TAKEN: torch.ones_like(loss), "loss": loss, "grad_norm": grad_norm}
    for name in outputs[0].metrics:
        values[f"loss/{name}"] = torch.stack([output.metrics[name].detach().float() for output in outputs]).mean()
    for name, value in values.items():
        # Chosen, not multiplied: NaN times zero stays NaN. In fp64, since many small values are added.
        value = torch.where(bad, 0.0, value.double())
        state.sums[name] = state.sums[name] + value if name in state.sums else value
    state.sum_steps += 1


@dataclass
class _Clock:
    """Images and seconds since the last row."""

    global_batch: int
    steps: int = 0
    started: float = 0.0

    def __post_init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self.steps = 0
        self.started = time.perf_counter()


def _read_sums(job: Job, state: TrainState) -> dict[str, float]:
    """The sums on the host, as means over all ranks; the host waits for the device here."""
    names = list(state.sums)
    totals = torch.stack([state.sums[name] for name in names])
    if job.runtime.world_size > 1:
        # A row tells the mean over all ranks, and all must agree on the number of steps taken.
        average_buffers([totals])
    return dict(zip(names, totals.tolist(), strict=True))


def _write_row(job: Job, state: TrainState, epoch: int, clock: _Clock) -> float | None:
    """Read the sums (the host waits for the device here), write a row of means over the steps taken, start the next.

    Returns:
        The mean instance loss; None where the method has none or every step was skipped.
    """
    step = state.step - 1
    recipe = job.config.recipe
    method = state.method
    sums = _read_sums(job, state)
    taken = round(sums.pop(_TAKEN))
    skipped = state.sum_steps - taken
    if skipped and job.runtime.device.type != "cpu":
        _tell_skipped(job, state.step, skipped, state.step - state.sum_steps)
    seconds = max(time.perf_counter() - clock.started, 1e-9)
    stages = job.stream.stages(seconds)
    if taken:
        job.metrics.row(
            "train",
            state.step,
            epoch,
            **{name: value / taken for name, value in sums.items()},
            lr=_lr(job, step),
            ema_momentum=ema_at(step + method.ema_index_offset, job.total_steps, recipe.ema),
            images_per_s=clock.steps * clock.global_batch / seconds,
            **stages,
        )
    state.sums, state.sum_steps = {}, 0
    clock.restart()
    _give_up_if_stuck(state)
    return sums["loss/ins"] / taken if taken and "loss/ins" in sums else None


def _look_for_collapse(job: Job, state: TrainState, epoch: int, inputs: StepInputs, loss: float | None) -> None:
    """Announce a collapse with its cause: a row, and so a line of the log; a healthy run leaves nothing."""
    job.runtime.at(f"looks for a collapse after step {state.step}")
    temperature = getattr(job.config.model, "temperature", None)
    found = signs(state.method, inputs, job.runtime, loss, temperature)
    announced = collapse(found)
    if announced is not None:
        job.metrics.row(KIND, state.step, epoch, **collapse_row(announced, found))


def _give_up_if_stuck(state: TrainState) -> None:
    stuck = state.non_finite.tolist()[0]
    if stuck >= PATIENCE:
        raise NonFinite(
            f"loss or gradient non-finite for {stuck} steps in a row at step {state.step}; lower --optim.lr, "
            "use --precision bf16 or fp32, or look at the data with tools/doctor.py"
        )


def save(job: Job, state: TrainState, epoch: int) -> None:
    """Write the checkpoint of this step and the exported backbone; all ranks call this, rank 0 writes.

    Raises:
        CheckpointFailed: on every rank when rank 0 could not write, so that none waits for a rank that has gone.
    """
    job.runtime.at(f"saves step {state.step}")
    _average_if_late(job, state)
    # A continued run cuts its rows to this length, so that none is there twice.
    state.metrics_bytes = job.metrics.position()
    best = state.best["step"] if state.best is not None else None
    job.checkpoints.save(state, lambda folder: _write_backbone(job, state, epoch, folder), best)


def _write_backbone(job: Job, state: TrainState, epoch: int, folder: Path) -> None:
    assert job.run_dir is not None
    path, recipe, method = job.run_dir / BACKBONE_FILE, job.config.recipe, job.config.run.method
    persistently(f"backbone {path}", lambda: save_backbone(state.method.encoder, path, arch=recipe.arch, method=method))
    job.metrics.row("checkpoint", state.step, epoch, path=folder.name)
