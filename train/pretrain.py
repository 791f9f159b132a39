"""Pre-training from a resolved configuration to an exit code: process, method, data, state, steps, page."""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from models.methods.base import Method
from pipeline.atomic import write_atomically
from pipeline.claim import claimed

from .backbone_io import BACKBONE_FILE
from .build import build_job, build_method, build_state, check_fit, compile_heads, last_step
from .callbacks import Callback, made
from .checkpoint import recorded_config, run_checkpoints
from .config import Config
from .data import RunData, open_data
from .describe import describe
from .errors import Stopped, UserMistake
from .few_images import fitted
from .loop import Job, save, train
from .measure.online import health_figures, knn_figures, labelled_features, probe_figures
from .memory import naming_remedy, training_remedy
from .micro_batch import settle_micro_batch
from .proving.choose import Choice, apply, settle, told
from .record.live import LivePage
from .record.loggers import LOGGERS, Background
from .record.run import CONFIG, has_ended
from .rehearsal import rehearse
from .resolve import changed_fields, continued, resolve
from .retry import persistently
from .runtime import Runtime, start
from .schedules import lr_at
from .state import TrainState
from .stop import SignalWatch
from .versions import machine, versions

_NAMED = 20
"""Damaged records that the last row names."""


def run(
    config: Config,
    taken_over: Sequence[str] = (),
    recorded: Mapping[str, Any] | None = None,
    advice: str = "",
    callbacks: Sequence[Callback] = (),
) -> int:
    """One run from resolved configuration to exit code.

    Args:
        config: resolved configuration.
        taken_over: values that the run's folder has recorded and that the recipe would have otherwise, to be told.
        recorded: configuration in the checkpoint that the run goes on from; None for a new run.
        advice: a line about defaults that follow from the data, to be told.
        callbacks: told first of all.
    """
    started = time.monotonic()
    with ExitStack() as held, start(config.run) as runtime, naming_remedy(lambda: training_remedy(config, runtime)):
        config, about_micro_batch = settle_micro_batch(config, runtime, recorded)
        method = build_method(config, runtime)
        check_fit(config, runtime, method)
        if runtime.is_main:
            print("\n".join(filter(None, (advice, describe(config, runtime, method), about_micro_batch))), flush=True)
            if taken_over:
                print(f"goes on as recorded, not as asked for by the recipe: {'; '.join(taken_over)}", flush=True)
            if config.run.dry_run:
                print(json.dumps(config.to_json(), indent=1), flush=True)
        # From here on a signal saves before it stops; opening the data may take minutes. A dry run has nothing to save.
        watch = None if config.run.dry_run else SignalWatch()
        run_dir = _prepare_run_dir(config, held) if runtime.is_main and watch is not None else None
        listeners = _listeners(config, callbacks) if run_dir is not None else []
        choice = settle(config, runtime, recorded)
        if runtime.is_main and told(choice):
            print(told(choice), flush=True)
        settled = apply(config, choice)
        # The same weights again: both are drawn from the seed.
        method = build_method(settled, runtime) if settled.model != config.model else method
        data = open_data(config, runtime)
        if runtime.is_main:
            print(data.text(), flush=True)
        try:
            return _train_on(config, choice, runtime, method, data, run_dir, watch, recorded, started, listeners)
        finally:
            data.close()


def _prepare_run_dir(config: Config, held: ExitStack) -> Path:
    """The run's folder, made, seen to be writable, and claimed until `held` ends."""
    run_dir = Path(config.run.run_dir)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        probe = run_dir / ".writable"
        probe.touch()
        probe.unlink()
        # A run killed while it wrote its backbone left a part of some hundred megabytes.
        held.enter_context(claimed(run_dir / ".lock", f"--run-dir {run_dir}", [run_dir / BACKBONE_FILE]))
    except OSError as reason:
        raise UserMistake(
            f"--run-dir {run_dir}: {reason.strerror or reason}; choose a folder that can be written"
        ) from None
    return run_dir


def _train_on(
    config: Config,
    choice: Choice,
    runtime: Runtime,
    method: Method,
    data: RunData,
    run_dir: Path | None,
    watch: SignalWatch | None,
    recorded: Mapping[str, Any] | None,
    started: float,
    callbacks: Sequence[Callback],
) -> int:
    facts = {
        **config.to_json(),
        "data_hash": data.train.data_hash,
        "data_images": data.train.num_samples,
        "versions": versions(),
        "world_size": runtime.world_size,
        "kernels": choice.to_json(),
    }
    state = build_state(config, runtime, method)
    checkpoints = run_checkpoints(config, facts, runtime)
    resumed = checkpoints.restore(state)
    complete = resumed and state.step >= last_step(config, len(data.train))
    # After a kill behind the last checkpoint, its names, the export or the last row are still to be written.
    if complete and runtime.gather_objects(has_ended(Path(config.run.run_dir)))[0]:
        if runtime.is_main:
            print(f"{config.run.run_dir} is complete at step {state.step}; a larger --epochs goes on from there")
        return 0
    before = recorded["recipe"]["epochs"] if resumed and recorded is not None else config.recipe.epochs
    if before < config.recipe.epochs:
        _check_finished(config, state.step, before, len(data.train))
        if runtime.is_main:
            print(_said_of_extension(config, state.step, before, len(data.train)), flush=True)
    checkpoints.check_space(state)
    if run_dir is not None:
        document = json.dumps(facts, indent=1).encode()
        persistently(CONFIG, lambda: write_atomically(run_dir / CONFIG, document))
    if runtime.compile:
        compile_heads(method)
    job = build_job(apply(config, choice), runtime, state, data.train, checkpoints, run_dir, callbacks)
    if watch is None:
        forecast = rehearse(job, state, data, started)
        if runtime.is_main:
            print(forecast.text(), flush=True)
        return 0
    job.evaluate = _evaluator(job, method, data)
    if complete:
        save(job, state, state.step // job.steps_per_epoch)
    _run_job(job, state, watch, resumed, facts)
    return 0


def _check_finished(config: Config, step: int, before: int, steps_per_epoch: int) -> None:
    if step < before * steps_per_epoch:
        raise UserMistake(
            f"--run-dir {config.run.run_dir}: the run is at step {step} of {before * steps_per_epoch}, and other "
            f"epochs ({before} -> {config.recipe.epochs}) would change its schedule on the way; finish it with "
            f"--epochs {before} first, choose another --run-dir, or --resume never to start over"
        )


def _said_of_extension(config: Config, step: int, before: int, steps_per_epoch: int) -> str:
    """What the schedule does at the seam of a run that goes on after its end."""
    recipe = config.recipe

    def lr(at: int, epochs: int) -> float:
        return lr_at(at, steps_per_epoch, epochs, recipe.schedule, recipe.optim, recipe.global_batch)

    return (
        f"finished after {before} epochs, goes on to {recipe.epochs}: from step {step} on, learning rate and EMA are "
        f"those of a run of {recipe.epochs} epochs at that step (lr {lr(step - 1, before):.3g} -> "
        f"{lr(step, recipe.epochs):.3g}); the first {before} epochs keep what they were trained with, so the result is "
        f"not that of {recipe.epochs} epochs at once"
    )


def _evaluator(job: Job, method: Method, data: RunData) -> Callable[[int, int], float | None]:
    def evaluate(step: int, epoch: int) -> float | None:
        if job.runtime.is_main:
            job.metrics.row("health", step, epoch, **health_figures(method, data, job.runtime))
        if data.queries is None:
            return None
        tables = labelled_features(method, data, job.runtime)
        # Before k-NN, in whose exchange the other ranks wait for this one.
        if job.config.run.probe and job.runtime.is_main:
            job.metrics.row("probe", step, epoch, **probe_figures(tables, job.config.run.seed))
        figures = knn_figures(tables, job.runtime)
        job.metrics.row("knn", step, epoch, **figures)
        return figures["top1"]

    return evaluate


def _run_job(job: Job, state: TrainState, watch: SignalWatch, resumed: bool, document: dict[str, Any]) -> None:
    facts = {
        "world_size": job.runtime.world_size,
        "steps_per_epoch": job.steps_per_epoch,
        "last_step": job.last_step,
        "machine": machine(job.runtime.device),
    }
    epoch = state.step // job.steps_per_epoch
    outcome = "failed"
    job.metrics.start(document)
    job.metrics.row("resume" if resumed else "start", state.step, epoch, **facts)
    try:
        train(job, state, watch)
        bad = _unreadable(job)
        # By name, so that the page can list them; a few tell the kind, and a row must stay a line that can be read.
        named = {"bad": dict(itertools.islice(bad.items(), _NAMED))} if bad else {}
        job.metrics.row("end", state.step, state.step // job.steps_per_epoch, bad_records=len(bad), **named)
        outcome = "done"
    except Stopped:
        outcome = "stopped"
        raise
    finally:
        job.metrics.close(outcome)
    if job.runtime.is_main:
        print(
            f"done: {job.run_dir}, backbone in {job.run_dir}/backbone.safetensors"
            + (f"; {len(bad)} damaged records were replaced, for example {next(iter(bad.items()))}" if bad else "")
        )
        _write_report(job)


def _unreadable(job: Job) -> dict[int, str]:
    """Sample and reason of every image that some rank could not read in this start of the run; all ranks must call it.

    Without those of the others a run of eight ranks would own up to an eighth.
    """
    # A copy: a loader that is ahead of the last step may still add to it.
    own = dict(job.stream.pipeline.stats().bad_records)
    return {sample: reason for each in job.runtime.gather_objects(own) for sample, reason in each.items()}


def _write_report(job: Job) -> None:
    """The page about the run; a run that ended well does not fail for want of its page."""
    if not job.config.run.report or job.run_dir is None:
        return
    from .record.page import build_report

    try:
        build_report([job.run_dir], job.run_dir / "report.html")
    except Exception as reason:  # whatever a chart or picture stumbles over
        print(f"report.html could not be written: {reason}; run python tools/report.py {job.run_dir}", file=sys.stderr)


def _listeners(config: Config, given: Sequence[Callback]) -> list[Callback]:
    """The callbacks of a run: the caller's, then those of `--callbacks`, `--log` and `--live-report`."""
    # One name given twice is one logger.
    loggers = [Background(LOGGERS[name]()) for name in dict.fromkeys(config.run.log)]
    page = [LivePage(config.run.live_report)] if config.run.live_report else []
    return [*given, *made(config.run.callbacks), *loggers, *page]


def go_on_or_start(config: Config, arguments: Sequence[str], callbacks: Sequence[Callback] = ()) -> int:
    """Run a configuration; a run that goes on keeps its recorded values where no argument says otherwise.

    Args:
        config: what `resolve` made of the arguments.
        arguments: the command line, which tells what was asked for and what is a default.
        callbacks: told what happens in the run.

    Returns:
        The exit code.
    """
    recorded = recorded_config(Path(config.run.run_dir) / "checkpoints") if config.run.resume == "auto" else None
    arguments, advice = fitted(arguments, config, recorded)
    config = resolve(arguments)
    kept = config if recorded is None else continued(arguments, config, recorded)
    return run(kept, changed_fields(config.to_json(), kept.to_json()), recorded, advice, callbacks)
