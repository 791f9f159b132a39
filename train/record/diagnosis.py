"""From what a run recorded to what to change: symptom, cause, flag."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from pipeline.endings import is_packed, is_tar
from train.record.collapse import KIND
from train.record.run import Run, chance_level

Level = Literal["ok", "note", "fault"]
_WAITING = 0.05
_HARDLY_WAITING = 0.02
_COLLAPSED_SPREAD = 0.1
_LEARNED_NATS = 0.1


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's answer.

    Attributes:
        level: "ok", "note" (works, could be better) or "fault" (must be mended).
        text: what was found.
        remedy: what to do about it; empty when nothing needs doing.
    """

    level: Level
    text: str
    remedy: str = ""


def diagnose(run: Run) -> list[Finding]:
    """Every symptom that a run's metrics show, most of them with a flag to change."""
    rules: tuple[Callable[[Run], list[Finding]], ...] = (_collapse, _speed, _learning, _health, _accidents)
    return [finding for rule in rules for finding in rule(run)]


def _collapse(run: Run) -> list[Finding]:
    """The newest announcement of a collapse with its probable cause."""
    row = run.last(KIND)
    if row is None:
        return []
    return [
        Finding(
            "fault",
            f"collapsed at step {row['step']:,}: {row['what']}; probable cause: {row['cause']}",
            f"look at {row['look_at']}",
        )
    ]


def settled(values: Sequence[float]) -> list[float]:
    """Values after the start, where compilation and cold files count."""
    return list(values[len(values) // 10 + 1 :]) or list(values)


def _speed(run: Run) -> list[Finding]:
    waits, speeds = (settled(run.values("train", name)[1]) for name in ("data_wait_share", "images_per_s"))
    if not waits:
        return [
            Finding("note", "no step has been recorded yet", "let the run go on for --log-every steps, then ask again")
        ]
    wait, speed = float(np.median(waits)), float(np.median(speeds))
    text = f"{speed:,.0f} source images/s, {wait:.1%} of the time waiting for data"
    if wait < _HARDLY_WAITING:
        return [Finding("ok", f"{text}: the step itself is the limit", _faster_step(run))]
    if wait < _WAITING:
        return [Finding("ok", f"{text}: loader and step are about level")]
    return [Finding("note", f"{text}: the loader is the limit", _faster_loader(run))]


def _faster_loader(run: Run) -> str:
    settings = run.config.get("run", {})
    data, loader = str(settings.get("data", "")), settings.get("loader", "auto")
    if loader == "folder" or (loader == "auto" and not (is_packed(data) or is_tar(data) or "://" in data)):
        return "pack the images once with tools/make_ffcv_dataset.py and give --data the packed file"
    remedies = []
    if settings.get("workers"):
        remedies.append(f"--workers {settings['workers']} may be too few; 0 takes all cores that the process may use")
    if loader in ("auto", "ffcv") and "ffcv" not in run.config.get("versions", {}):
        remedies.append("FFCV was not installed: 'bash tools/setup.sh --retry'")
    if settings.get("order") == "global":
        remedies.append("if the file is larger than memory, --order sharded reads it in sequence")
    remedies.append("pack at a smaller --max-resolution, or decode on the GPU with --loader dali")
    return "; ".join(remedies)


def _faster_step(run: Run) -> str:
    settings = run.config.get("run", {})
    remedies = []
    if settings.get("precision") == "fp32":
        remedies.append("--precision auto uses bf16 or fp16 where the GPU has it")
    if settings.get("compile") is False:
        remedies.append("--compile fuses heads and losses")
    if settings.get("deterministic"):
        remedies.append("--deterministic costs speed")
    if settings.get("micro_batch"):
        remedies.append("a larger --micro-batch, or 0, keeps the GPU fuller")
    return "; ".join(remedies)


def _learning(run: Run) -> list[Finding]:
    """The instance loss against chance, once the queue holds real keys only."""
    chance = chance_level(run)
    steps, losses = run.values("train", "loss/ins")
    if chance is None or not losses:
        return []
    batch = run.config["recipe"]["global_batch"]
    # A queue starts with random keys, which make the loss low; after twice its length none is left.
    filled = 2 * run.config["model"]["queue_size"] / batch
    late = [loss for step, loss in zip(steps, losses, strict=True) if step > filled]
    if not late:
        return [
            Finding("ok", f"the queue is full twice only after step {math.ceil(filled):,}; the loss says nothing yet")
        ]
    # The last tenth: single rows are noisy.
    loss = float(np.mean(late[-max(1, len(late) // 10) :]))
    below = f"instance loss {loss:.2f}, chance is {chance:.2f}"
    if loss < chance - _LEARNED_NATS:
        return [Finding("ok", f"{below}: {chance - loss:.2f} nats under it")]
    return [
        Finding(
            "note",
            f"{below}: views of an image are not told from others",
            "train longer, or change --optim.lr; check in the report's pictures that the views show the same thing",
        )
    ]


def _health(run: Run) -> list[Finding]:
    found = []
    _, spread = run.values("health", "feature_std")
    _, rank = run.values("health", "effective_rank")
    # Low alone is no collapse: an untrained backbone may start there.
    if spread and spread[-1] < _COLLAPSED_SPREAD and spread[-1] < spread[0]:
        found.append(
            Finding(
                "fault",
                f"feature spread fell from {spread[0]:.3f} to {spread[-1]:.3f}: all images are given one feature",
                "lower --optim.lr, check --bn.group-size (too small a group leaks), and start again from the beginning",
            )
        )
    elif len(rank) > 1 and rank[-1] < rank[0] / 3:
        found.append(
            Finding(
                "note",
                f"effective rank fell from {rank[0]:.1f} to {rank[-1]:.1f}: features use few directions",
                "normal for a while at the start; if it goes on, lower --optim.lr or raise the temperature",
            )
        )
    _, retrieval = run.values("health", "view_retrieval")
    # After a collapse the retrieval says nothing new.
    if len(retrieval) > 1 and not found:
        text = f"view retrieval went from {retrieval[0]:.1%} to {retrieval[-1]:.1%}"
        rising = retrieval[-1] > retrieval[0]
        remedy = "" if rising else "an early dip below the untrained backbone is usual; train longer before judging"
        found.append(Finding("ok" if rising else "note", text, remedy))
    return found


def _accidents(run: Run) -> list[Finding]:
    found = []
    # A row of a CUDA run tells of all the steps that were skipped since the row before it.
    skipped = sum(row.get("steps", 1) for row in run.of_kind("skipped_step"))
    if skipped:
        half = run.config.get("run", {}).get("precision") == "fp16"
        remedy = (
            "a few are usual while the fp16 scaler settles; --precision bf16 has none" if half else "lower --optim.lr"
        )
        found.append(Finding("note", f"{skipped} steps were skipped for a non-finite loss or gradient", remedy))
    # A run that was extended has several such rows.
    bad = max((row.get("bad_records", 0) for row in run.of_kind("end")), default=0)
    if bad:
        found.append(
            Finding(
                "note",
                f"{bad} damaged records were replaced by other images",
                "run this doctor on the packed file, then copy or pack it again",
            )
        )
    return found
