"""Exact resumption of a fine-tuning run: its network, optimizer, step and settings in hashed files without pickle.

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
The files and their guarantees are those of `train/checkpoint.py`.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from pipeline.rng import SLOT_STEP_SEED, philox

from ..checkpoint import (
    load_model,
    newest_good,
    optimizer_tensors,
    plain_copy,
    read_document,
    restore_optimizer,
    write_folder,
)
from ..errors import CheckpointFailed, Stopped, UserMistake
from ..runtime import Runtime, SignalWatch

_REMEDY = "choose another --output, or --resume never to start over"


@dataclass
class TuningState:
    """Everything that decides how a fine-tuning run goes on.

    Attributes:
        model: the network itself, not its DDP wrapper; parameters and buffers are saved.
        optimizer: built over its parameters in the same order each time.
        scaler: fp16 loss scale, or None.
        step: optimizer steps taken.
        record: plain JSON values that continue with the run, such as figures of earlier validations.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler | None = None
    step: int = 0
    record: dict[str, Any] = field(default_factory=dict)


def state_folder(result: Path) -> Path:
    """Where the checkpoints of a protocol lie: `eval-NAME.state` beside its result `eval-NAME.json`."""
    return result.with_name(f"{result.stem}.state")


def discard_state(result: Path, runtime: Runtime) -> None:
    """Remove the checkpoints of a run whose result is written, so that the next one may have other settings."""
    if runtime.is_main:
        shutil.rmtree(state_folder(result), ignore_errors=True)


def fingerprint(module: nn.Module) -> str:
    """SHA-256 over names, shapes and values of a module's tensors, hexadecimal."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        value = plain_copy(tensor)
        digest.update(f"{name} {tuple(value.shape)} {value.dtype};".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def seed_step(seed: int, step: int, rank: int) -> None:
    """Make what PyTorch draws in the next step (dropout, sampled proposals) a function of (seed, step, rank)."""
    low, high = philox(seed, step, rank, 0, SLOT_STEP_SEED)[:2].tolist()
    torch.manual_seed((high << 32 | low) >> 1)


def changed_settings(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """Names of settings that differ, as `name: saved -> current`."""
    pairs = {name: (saved.get(name), current.get(name)) for name in sorted({*saved, *current})}
    return [f"{name}: {before} -> {now}" for name, (before, now) in pairs.items() if before != now]


class TuningCheckpoints:
    """The checkpoints of one fine-tuning run; every rank makes and calls it alike, rank 0 writes.

    Args:
        root: folder of the checkpoints, which all ranks see.
        settings: JSON values of everything that decides what is computed: flags, hash of the data, `fingerprint` of
            the backbone; a checkpoint with others is refused. What changes nothing (paths, workers) stays out.
        runtime: this process.
        resume: continue from the newest good checkpoint; otherwise what is there is overwritten.
        keep: newest checkpoints that stay on disk.
    """

    def __init__(
        self, root: Path, settings: Mapping[str, Any], runtime: Runtime, resume: bool = True, keep: int = 2
    ) -> None:
        self.root, self.runtime, self.resume, self.keep = root, runtime, resume, keep
        # As JSON gives them back: tuples become lists.
        self.settings: dict[str, Any] = json.loads(json.dumps(dict(settings)))

    def restore(self, state: TuningState) -> bool:
        """Fill `state` in place from the newest good checkpoint; whether there was one.

        Raises:
            UserMistake: it has other settings or is of another network, no checkpoint is whole, or the ranks do not
                see the same one; `state` is then unchanged.
        """
        folder = newest_good(self.root) if self.resume else None
        name = folder.name if folder else None
        if any(other != name for other in self.runtime.gather_objects(name)):
            raise UserMistake(f"the ranks see different checkpoints under {self.root}; put it on a shared disk")
        if folder is None:
            if self.resume and any(self.root.glob("step_*")):
                raise UserMistake(f"no checkpoint under {self.root} is whole; move it away or use --resume never")
            return False
        document = read_document(folder)
        changes = changed_settings(document["settings"], self.settings)
        if changes:
            raise UserMistake(f"{self.root} holds a run with other settings ({'; '.join(changes[:3])}); {_REMEDY}")
        load_model(state.model, load_file(folder / "model.safetensors"), folder, _REMEDY)
        restore_optimizer(state.optimizer, load_file(folder / "optimizer.safetensors"), document["optimizer"])
        if state.scaler is not None and document["scaler"] is not None:
            state.scaler.load_state_dict(document["scaler"])
        state.step, state.record = document["step"], document["record"]
        if self.runtime.is_main:
            print(f"continued after step {state.step} from {folder}", flush=True)
        return True

    def save(self, state: TuningState) -> None:
        """Write a checkpoint of `state`.

        Raises:
            CheckpointFailed: on every rank when rank 0 could not write, so that none waits for a rank that has gone.
        """
        failure = None
        if self.runtime.is_main:
            try:
                write_folder(self.root, state.step, lambda folder: self._write_files(folder, state), self.keep)
            except CheckpointFailed as reason:
                failure = str(reason)
        told = next((message for message in self.runtime.gather_objects(failure) if message), None)
        if told is not None:
            raise CheckpointFailed(told)

    def save_if_stopped(self, state: TuningState, watch: SignalWatch) -> None:
        """Where a signal has asked any rank to stop: save and end the run. Every rank calls it after the same step.

        Raises:
            Stopped: after saving.
        """
        if self.runtime.agree(bool(watch.asked)):
            self.save(state)
            raise Stopped(
                f"stopped by {watch.asked or 'a signal to another rank'} after step {state.step}, saved; "
                "the same command goes on from here"
            )

    def _write_files(self, folder: Path, state: TuningState) -> None:
        save_file({name: plain_copy(t) for name, t in state.model.state_dict().items()}, folder / "model.safetensors")
        tensors, plain = optimizer_tensors(state.optimizer)
        save_file(tensors, folder / "optimizer.safetensors")
        document = {
            "step": state.step,
            "settings": self.settings,
            "record": state.record,
            "optimizer": plain,
            "scaler": state.scaler.state_dict() if state.scaler else None,
        }
        (folder / "state.json").write_text(json.dumps(document, indent=1))
