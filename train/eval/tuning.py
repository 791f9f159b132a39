"""The checkpoints of a fine-tuning protocol: where they lie, what tells one run from another, and each step's draws.

A protocol makes one `TuningCheckpoints` beside its result file, restores before its first step and saves at the end of
an epoch or every so many steps:

    checkpoints = TuningCheckpoints(state_folder(result), settings, runtime, resume=config.resume == "auto")
    state = TuningState(model, optimizer, scaler)
    checkpoints.restore(state)
    while state.step < steps:
        seed_step(config.seed, state.step, runtime.rank)
        ...  # one step: order, augmentation and learning rate are functions of (seed, step)
        state.step += 1
        if state.step % config.checkpoint_every == 0:
            checkpoints.save(state)
    ...  # write the result
    discard_state(result, runtime)

With deterministic kernels the continued run is then byte-identical with one that was not stopped, at equal world size.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeline.rng import SLOT_STEP_SEED, philox

from ..checkpoint import Checkpoints
from ..runtime import Runtime
from ..state import State, digest
from ..stop import EvaluationWatch


class TuningCheckpoints(Checkpoints):
    """The checkpoints of one fine-tuning run; every rank makes and calls it alike, rank 0 writes.

    Args:
        root: folder of the checkpoints, which all ranks see.
        settings: JSON values of everything that decides what is computed: flags, hash of the data, `fingerprint` of
            the backbone; a checkpoint with others is refused. What changes nothing (paths, workers) stays out.
        runtime: this process.
        resume: continue from the newest good checkpoint; otherwise what is there is overwritten.
        keep: newest checkpoints that stay on disk.
        watch: is told what is saved, on which the exit code of a stopped evaluation depends.
    """

    def __init__(
        self,
        root: Path,
        settings: Mapping[str, Any],
        runtime: Runtime,
        resume: bool = True,
        keep: int = 2,
        watch: EvaluationWatch | None = None,
    ) -> None:
        # As JSON gives them back: tuples become lists.
        current: dict[str, Any] = json.loads(json.dumps(dict(settings)))
        super().__init__(
            root=root,
            runtime=runtime,
            identity={"settings": current},
            changes=lambda document: changed_settings(document["settings"], current),
            place=str(root),
            remedy="choose another --output, or --resume never to start over",
            resume=resume,
            keep=keep,
        )
        self._watch = watch

    def save(self, state: State, also: Callable[[Path], None] | None = None, best: int | None = None) -> None:
        """`Checkpoints.save`, which a signal lets come to its end."""
        with self._watch.whole_writing() if self._watch else nullcontext():
            super().save(state, also, best)
        self._note(state)

    def _note(self, state: State) -> None:
        if self._watch is not None:
            self._watch.saved = f"step {state.step}"

    def restore(self, state: State, before: int | None = None) -> bool:
        """`Checkpoints.restore`, a line on the first rank that says where the run goes on, and a look at the disk."""
        found = super().restore(state, before)
        self.check_space(state)
        if found:
            self._note(state)
        if found and self.runtime.is_main:
            print(f"continued after step {state.step} from {self.root / f'step_{state.step:08d}'}", flush=True)
        return found


def state_folder(result: Path) -> Path:
    """Where the checkpoints of a protocol lie: `eval-NAME.state` beside its result `eval-NAME.json`."""
    return result.with_name(f"{result.stem}.state")


def discard_state(result: Path, runtime: Runtime) -> None:
    """Remove the checkpoints of a run whose result is written, so that the next one may have other settings."""
    if runtime.is_main:
        # What cannot be removed does no harm: the next run with other settings refuses it by name.
        shutil.rmtree(state_folder(result), ignore_errors=True)


def fingerprint(module: nn.Module) -> str:
    """SHA-256 over names, shapes and values of a module's tensors, hexadecimal."""
    return digest(module.state_dict())


def seed_step(seed: int, step: int, rank: int) -> None:
    """Make what PyTorch draws in the next step (dropout, sampled proposals) a function of (seed, step, rank)."""
    low, high = philox(seed, step, rank, 0, SLOT_STEP_SEED)[:2].tolist()
    torch.manual_seed((high << 32 | low) >> 1)


def changed_settings(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """Names of settings that differ, as `name: saved -> current`."""
    # Settings of both sides: one that only one version knows counts as a difference too.
    pairs = {name: (saved.get(name), current.get(name)) for name in sorted({*saved, *current})}
    return [f"{name}: {before} -> {now}" for name, (before, now) in pairs.items() if before != now]
