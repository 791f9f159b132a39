"""Atomic, hashed checkpoints without pickle, and exact restoration.

A checkpoint is a folder `step_XXXXXXXX` of safetensors and JSON files with a `manifest.json` of their SHA-256. It is
written under a temporary name and renamed when whole, so a kill at any moment leaves the previous one in place.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from models.methods.base import Method

from .errors import CheckpointFailed, UserMistake

_PREFIX = "step_"


@dataclass
class TrainState:
    """Everything that decides how a run goes on.

    Attributes:
        method: online and momentum networks, queues, BN buffers.
        optimizer: its per-parameter state and groups.
        scaler: fp16 loss scale, or None.
        step: optimizer steps taken.
        sums: running sums of the metrics not yet written as a row, and how many steps they cover.
        non_finite: (1,) int64 device tensor, how many steps in a row were skipped.
        metrics_bytes: length of `metrics.jsonl` when the state was saved.
    """

    method: Method
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler | None
    step: int
    sums: dict[str, Tensor]
    sum_steps: int
    non_finite: Tensor
    metrics_bytes: int = 0


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, data: bytes) -> None:
    """Write a small file so that readers see the old or the new content, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, path)
    _fsync(path.parent)


def plain_copy(tensor: Tensor) -> Tensor:
    """The tensor on the CPU in the plain layout."""
    # safetensors refuses channels-last tensors; strides are restored on loading from the live tensors.
    return tensor.detach().cpu().contiguous()


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The optimizer's state as tensors by `index/name`, and the rest as plain values."""
    saved = optimizer.state_dict()
    tensors, plain = {}, {}
    for index, entries in saved["state"].items():
        for name, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"{index}/{name}"] = plain_copy(value)
            else:
                plain[f"{index}/{name}"] = value
    return tensors, {"state": plain, "param_groups": saved["param_groups"]}


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], plain: dict[str, Any]) -> None:
    """Put what `optimizer_tensors` gave back into an optimizer over parameters of the same shapes and order."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    fused = [group.get("fused") for group in optimizer.param_groups for _ in group["params"]]
    optimizer.state.clear()
    for key, value in tensors.items():
        index, name = key.split("/", 1)
        parameter = parameters[int(index)]
        if value.shape == parameter.shape:
            # The layout of a buffer decides the order of later sums: give it its parameter's.
            value = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
        elif fused[int(index)]:
            value = value.to(parameter.device)  # the fused kernels read the step count where they run
        optimizer.state[parameter][name] = value
    for key, value in plain["state"].items():
        index, name = key.split("/", 1)
        optimizer.state[parameters[int(index)]][name] = value
    for group, saved in zip(optimizer.param_groups, plain["param_groups"], strict=True):
        # How steps are launched follows from the device of this run, not from that of the saved one.
        group.update({name: value for name, value in saved.items() if name not in ("params", "fused", "foreach")})


def _write_files(folder: Path, state: TrainState, extra: dict[str, Any]) -> None:
    save_file({name: plain_copy(t) for name, t in state.method.state_dict().items()}, folder / "model.safetensors")
    tensors, optimizer_plain = optimizer_tensors(state.optimizer)
    save_file(tensors, folder / "optimizer.safetensors")
    document = {
        "step": state.step,
        "optimizer": optimizer_plain,
        "scaler": state.scaler.state_dict() if state.scaler else None,
        "host_state": state.method.host_state(),
        "sum_steps": state.sum_steps,
        "non_finite": state.non_finite.item(),
        "metrics_bytes": state.metrics_bytes,
        **extra,
    }
    (folder / "state.json").write_text(json.dumps(document, indent=1))


def save_checkpoint(root: Path, state: TrainState, extra: dict[str, Any], keep: int) -> Path:
    """Write the checkpoint of `state.step` under `root`, as `write_folder` does."""
    return write_folder(root, state.step, lambda folder: _write_files(folder, state, extra), keep)


def _seal(folder: Path) -> None:
    """Add the manifest of the files' hashes and see that all of them reach the disk."""
    hashes = {path.name: _sha256(path) for path in sorted(folder.iterdir())}
    (folder / "manifest.json").write_text(json.dumps({"files": hashes}, indent=1))
    for path in folder.iterdir():
        _fsync(path)
    _fsync(folder)


def write_folder(root: Path, step: int, write_files: Callable[[Path], None], keep: int) -> Path:
    """Write the checkpoint of a step under `root` and drop all but the newest `keep`, and all later ones.

    Args:
        root: folder of the checkpoints.
        step: optimizer steps taken; names the checkpoint.
        write_files: writes the files of a checkpoint into the empty folder that it is given.
        keep: checkpoints that stay.

    Returns:
        The checkpoint's folder.

    Raises:
        CheckpointFailed: when it could not be written; nothing half-written is left under a final name.
    """
    final = root / f"{_PREFIX}{step:08d}"
    temporary = root / f".{final.name}.{os.getpid()}.tmp"
    try:
        root.mkdir(parents=True, exist_ok=True)
        for stale in root.glob(f".{_PREFIX}*.tmp"):
            shutil.rmtree(stale, ignore_errors=True)
        temporary.mkdir()
        write_files(temporary)
        _seal(temporary)
        if final.exists():
            shutil.rmtree(final)
        os.rename(temporary, final)
        write_atomically(root / "latest", final.name.encode())
    except (OSError, SafetensorError) as reason:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointFailed(
            f"checkpoint {final} could not be written: {reason}; free space or fix permissions, "
            "then run the same command again"
        ) from None
    # Later steps are another history's (--resume never, or damaged): they must not crowd this one out.
    others = _steps_on_disk(root)
    later = [folder for folder in others if folder.name > final.name]
    for old in later + others[len(later) + keep :]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def _steps_on_disk(root: Path) -> list[Path]:
    """Checkpoint folders, newest first."""
    return sorted((p for p in root.glob(f"{_PREFIX}*") if p.is_dir()), key=lambda p: p.name, reverse=True)


def is_good(folder: Path) -> bool:
    """Whether every file of the manifest is there with its hash."""
    try:
        files = json.loads((folder / "manifest.json").read_text())["files"]
        return all(_sha256(folder / name) == expected for name, expected in files.items())
    except (OSError, ValueError, KeyError, TypeError):
        return False


def newest_good(root: Path) -> Path | None:
    """The newest checkpoint whose files are whole, or None."""
    return next((folder for folder in _steps_on_disk(root) if is_good(folder)), None)


def read_document(folder: Path) -> dict[str, Any]:
    """The plain part of a checkpoint, with what the caller stored as `extra`."""
    document: dict[str, Any] = json.loads((folder / "state.json").read_text())
    return document


def load_model(model: nn.Module, saved: dict[str, Tensor], folder: Path, remedy: str) -> None:
    """Copy saved tensors into the live ones of `model`.

    Raises:
        UserMistake: their names or shapes differ; the message ends in `remedy`.
    """
    live = model.state_dict()
    missing, unexpected = sorted(set(live) - set(saved)), sorted(set(saved) - set(live))
    if missing or unexpected:
        raise UserMistake(
            f"checkpoint {folder} is of another model: {len(missing)} tensors missing (first {missing[:1]}), "
            f"{len(unexpected)} unexpected (first {unexpected[:1]}); {remedy}"
        )
    with torch.no_grad():
        for name, target in live.items():
            if target.shape != saved[name].shape:
                raise UserMistake(
                    f"checkpoint {folder}: {name} has shape {tuple(saved[name].shape)}, this run needs "
                    f"{tuple(target.shape)}; {remedy}"
                )
            target.copy_(saved[name])  # in place: keeps the live tensor's device and strides


def _own_sums(rank_sums: list[dict[str, float]], rank: int, world_size: int) -> dict[str, float]:
    """This rank's sums, or the mean of all ranks' where the number of ranks has changed."""
    if len(rank_sums) == world_size:
        return rank_sums[rank]
    return {name: sum(sums[name] for sums in rank_sums) / len(rank_sums) for name in rank_sums[0]}


def restore_checkpoint(folder: Path, state: TrainState, rank: int, world_size: int) -> dict[str, Any]:
    """Load `folder` into the live objects of `state`; returns the plain part.

    Raises:
        UserMistake: when the checkpoint is of another model.
    """
    document = read_document(folder)
    remedy = "choose another --run-dir or --resume never"
    load_model(state.method, load_file(folder / "model.safetensors"), folder, remedy)
    restore_optimizer(state.optimizer, load_file(folder / "optimizer.safetensors"), document["optimizer"])
    if state.scaler is not None and document["scaler"] is not None:
        state.scaler.load_state_dict(document["scaler"])
    state.method.load_host_state(document["host_state"])
    device = state.non_finite.device
    state.step = document["step"]
    state.sums = {
        name: torch.tensor(value, dtype=torch.float64, device=device)
        for name, value in _own_sums(document["sums"], rank, world_size).items()
    }
    state.sum_steps = document["sum_steps"]
    state.non_finite.fill_(document["non_finite"])
    state.metrics_bytes = document["metrics_bytes"]
    return document
