"""What decides how a training or fine-tuning run goes on, as bytes of files and back, without pickle.

A state becomes three files: the network's tensors and the optimizer's as safetensors, and plain values as JSON.
`train/checkpoint.py` keeps such files; nothing here touches the disk.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import torch
from safetensors.torch import save
from torch import Tensor, nn

from models.methods.base import Method

from .guard import StatisticsGuard

MODEL_FILE = "model.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
DOCUMENT_FILE = "state.json"
_PLAIN_BYTES = 1 << 16  # JSON and headers


class Mismatch(ValueError):
    """A saved state does not fit the live objects that it should go into; nothing was changed."""


class State(Protocol):
    """A run that can be saved and continued."""

    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler | None
    step: int

    @property
    def network(self) -> nn.Module:
        """The module whose parameters and buffers are saved; not a DDP wrapper."""

    def rank_part(self) -> Any:
        """JSON values that only this rank has; the host may wait for the device here."""

    def plain(self, rank_parts: list[Any]) -> dict[str, Any]:
        """The JSON values of the state beyond step, optimizer and scaler; `rank_parts` are in rank order."""

    def check_plain(self, saved: Mapping[str, Any]) -> None:
        """Raise KeyError, TypeError or ValueError where `load_plain` would not find what it needs."""

    def load_plain(self, saved: Mapping[str, Any], rank: int, world_size: int) -> None:
        """Inverse of `plain`, on each rank."""


@dataclass
class TrainState:
    """Everything that decides how a pre-training run goes on.

    Attributes:
        method: online and momentum networks, queues, BN buffers.
        optimizer: its per-parameter state and groups.
        scaler: fp16 loss scale, or None.
        step: optimizer steps taken.
        sums: running sums of the metrics not yet written as a row, and how many steps they cover.
        non_finite: (1,) int64 device tensor, how many steps in a row were skipped.
        metrics_bytes: length of `metrics.jsonl` when the state was saved.
        best: ("step" and "top1") of the evaluation with the highest online k-NN accuracy so far, or None.
    """

    method: Method
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler | None
    step: int
    sums: dict[str, Tensor]
    sum_steps: int
    non_finite: Tensor
    metrics_bytes: int = 0
    best: dict[str, Any] | None = None

    @property
    def network(self) -> nn.Module:
        """The method."""
        return self.method

    @cached_property
    def guard(self) -> StatisticsGuard:
        """Of the method's running statistics, while a step may still turn out to be bad."""
        return StatisticsGuard(self.method)

    def rank_part(self) -> dict[str, Any]:
        """This rank's sums as plain numbers."""
        return {name: value.tolist() for name, value in self.sums.items()}

    def plain(self, rank_parts: list[Any]) -> dict[str, Any]:
        """Queue pointers, counters and every rank's sums."""
        return {
            "host_state": self.method.host_state(),
            "sum_steps": self.sum_steps,
            "non_finite": self.non_finite.item(),
            "metrics_bytes": self.metrics_bytes,
            "sums": rank_parts,
            "best": self.best,
        }

    def check_plain(self, saved: Mapping[str, Any]) -> None:
        """Raise KeyError, TypeError or ValueError for values that are missing or of another kind."""
        for name in ("sum_steps", "non_finite", "metrics_bytes"):
            _check_count(saved, name)
        for sums in saved["sums"]:
            for value in sums.values():
                float(value)
        if not saved["sums"]:
            raise ValueError("sums: no rank has any")
        best = saved.get("best")  # checkpoints of earlier versions have none
        if best is not None:
            _check_count(best, "step")
            float(best["top1"])
        live = self.method.host_state()
        if set(saved["host_state"]) != set(live):
            raise ValueError(f"host_state: {sorted(saved['host_state'])} instead of {sorted(live)}")

    def load_plain(self, saved: Mapping[str, Any], rank: int, world_size: int) -> None:
        """Put the plain values back; each rank takes its own sums."""
        self.method.load_host_state(saved["host_state"])
        self.sums = {
            name: torch.tensor(value, dtype=torch.float64, device=self.non_finite.device)
            for name, value in _own_sums(saved["sums"], rank, world_size).items()
        }
        self.sum_steps = saved["sum_steps"]
        self.non_finite.fill_(saved["non_finite"])
        self.metrics_bytes = saved["metrics_bytes"]
        self.best = saved.get("best")


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

    @property
    def network(self) -> nn.Module:
        """The model."""
        return self.model

    def rank_part(self) -> None:
        """Nothing: all ranks hold the same."""

    def plain(self, rank_parts: list[Any]) -> dict[str, Any]:
        """The record."""
        return {"record": self.record}

    def check_plain(self, saved: Mapping[str, Any]) -> None:
        """Raise KeyError or TypeError where there is no record."""
        if not isinstance(saved["record"], dict):
            raise TypeError("record: not an object")

    def load_plain(self, saved: Mapping[str, Any], rank: int, world_size: int) -> None:
        """Put the record back."""
        self.record = saved["record"]


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, shapes, types and values of tensors, hexadecimal; their order does not matter."""
    sha = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        value = plain_copy(tensor)
        sha.update(f"{name} {tuple(value.shape)} {value.dtype};".encode())
        sha.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def state_bytes(state: State) -> int:
    """About how many bytes the checkpoints of this state have, also before the optimizer has taken its first step."""
    weights = [p for group in state.optimizer.param_groups for p in group["params"]]
    # Adam keeps two numbers for each weight, momentum one.
    estimate = sum(p.nbytes for p in weights) * (2 if "betas" in state.optimizer.defaults else 1)
    network = sum(t.nbytes for t in state.network.state_dict().values())
    return network + estimate + _PLAIN_BYTES


def _check_count(saved: Mapping[str, Any], name: str) -> None:
    if type(saved[name]) is not int or saved[name] < 0:
        raise ValueError(f"{name}: {str(saved[name])[:40]} is not a count")


def _own_sums(rank_sums: list[dict[str, float]], rank: int, world_size: int) -> dict[str, float]:
    """This rank's sums, or the mean of all ranks' where the number of ranks has changed."""
    if len(rank_sums) == world_size:
        return rank_sums[rank]
    return {name: sum(sums[name] for sums in rank_sums) / len(rank_sums) for name in rank_sums[0]}


# ---------------------------------------------------------------------------------------------------------------------
# To bytes


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
    # The count shows on loading that none was left out, which shapes and hashes cannot tell.
    return tensors, {"state": plain, "param_groups": saved["param_groups"], "tensors": len(tensors)}


def to_files(state: State, rank_parts: list[Any], identity: Mapping[str, Any]) -> dict[str, bytes]:
    """The files of a checkpoint, by name.

    Args:
        state: what is saved.
        rank_parts: `state.rank_part()` of each rank, in rank order.
        identity: JSON values that say which run this is; they stand beside the state's own.
    """
    tensors, optimizer = optimizer_tensors(state.optimizer)
    document = {
        "step": state.step,
        "optimizer": optimizer,
        "scaler": state.scaler.state_dict() if state.scaler else None,
        **state.plain(rank_parts),
        **identity,
    }
    return {
        MODEL_FILE: save({name: plain_copy(t) for name, t in state.network.state_dict().items()}),
        OPTIMIZER_FILE: save(tensors),
        DOCUMENT_FILE: json.dumps(document, indent=1).encode(),
    }


# ---------------------------------------------------------------------------------------------------------------------
# And back


@dataclass(frozen=True)
class Saved:
    """A saved state that has been read and is whole, not yet in any live object.

    Attributes:
        document: the plain values.
        model: the network's tensors by name, on the CPU.
        optimizer: the optimizer's tensors by `index/name`, on the CPU.
    """

    document: dict[str, Any]
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]


def restore(saved: Saved, state: State, rank: int, world_size: int) -> None:
    """Copy a saved state into the live objects of `state`; everything is checked before anything is changed.

    Raises:
        Mismatch: it is of another network or optimizer, or lacks a piece.
    """
    # Everything before anything: a run half restored would go on without a word.
    check(saved, state)
    with torch.no_grad():
        for name, target in state.network.state_dict().items():
            target.copy_(saved.model[name])  # in place: keeps the live tensor's device and strides
    restore_optimizer(state.optimizer, saved.optimizer, saved.document["optimizer"])
    if state.scaler is not None and saved.document["scaler"] is not None:
        state.scaler.load_state_dict(saved.document["scaler"])
    state.load_plain(saved.document, rank, world_size)
    state.step = saved.document["step"]


def check(saved: Saved, state: State) -> None:
    """Check that every piece of a saved state is there and fits the live objects.

    Raises:
        Mismatch: naming the first that does not.
    """
    _check_tensors(saved.model, state.network.state_dict())
    try:
        _check_count(saved.document, "step")
        _check_optimizer(saved, state.optimizer)
        state.check_plain(saved.document)
        _check_scaler(saved.document["scaler"], state.scaler)
    except KeyError as reason:
        raise Mismatch(f"lacks {reason}") from None
    except (TypeError, AttributeError, IndexError, ValueError) as reason:
        raise Mismatch(f"does not fit: {reason}") from None


def _check_tensors(saved: Mapping[str, Tensor], live: Mapping[str, Tensor]) -> None:
    missing, unexpected = sorted(set(live) - set(saved)), sorted(set(saved) - set(live))
    if missing or unexpected:
        raise Mismatch(
            f"is of another model: {len(missing)} tensors missing (first {missing[:1]}), "
            f"{len(unexpected)} unexpected (first {unexpected[:1]})"
        )
    for name, target in live.items():
        if target.shape != saved[name].shape:
            raise Mismatch(
                f"is of another model: {name} has shape {tuple(saved[name].shape)}, this run needs "
                f"{tuple(target.shape)}"
            )


def _check_optimizer(saved: Saved, optimizer: torch.optim.Optimizer) -> None:
    plain = saved.document["optimizer"]
    sizes = [len(group["params"]) for group in plain["param_groups"]]
    live_sizes = [len(group["params"]) for group in optimizer.param_groups]
    if sizes != live_sizes:
        raise ValueError(f"its optimizer has groups of {sizes} parameters, this run's of {live_sizes}")
    if plain.get("tensors", len(saved.optimizer)) != len(saved.optimizer):  # older checkpoints have no count
        raise ValueError(f"its optimizer has {len(saved.optimizer)} tensors instead of {plain['tensors']}")
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    names: dict[int, set[str]] = {}
    for key in [*saved.optimizer, *plain["state"]]:
        index, name = key.split("/", 1)
        names.setdefault(int(index), set()).add(name)
        value = saved.optimizer.get(key)
        # A tensor of the optimizer is a number, or has the shape of its parameter.
        if value is not None and value.numel() != 1 and value.shape != parameters[int(index)].shape:
            raise ValueError(f"its optimizer's {key} has shape {tuple(value.shape)}")
    _check_optimizer_names(names, parameters, optimizer)


def _check_optimizer_names(
    names: Mapping[int, set[str]], parameters: list[Any], optimizer: torch.optim.Optimizer
) -> None:
    """Every parameter has the same pieces of state as the others, and those that the live optimizer begins with."""
    usual = max(names.values(), key=len, default=set())
    for index, parameter in enumerate(parameters):
        found = names.get(index, set())
        wanted = usual if found else set(optimizer.state[parameter]) if parameter in optimizer.state else set()
        if not wanted <= found:
            raise ValueError(f"its optimizer lacks {index}/{sorted(wanted - found)[0]}")


def _check_scaler(saved: Any, scaler: torch.amp.GradScaler | None) -> None:
    if scaler is not None and saved is not None and set(saved) != set(scaler.state_dict()):
        raise ValueError("its loss scale is incomplete")


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], plain: dict[str, Any]) -> None:
    """Put what `optimizer_tensors` gave back into an optimizer over parameters of the same shapes and order."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    fused = [group.get("fused") for group in optimizer.param_groups for _ in group["params"]]
    # What the live optimizer began with, such as zero momentum, must not survive beside the saved state.
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
