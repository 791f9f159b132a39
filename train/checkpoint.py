"""Checkpoints of training and of fine-tuning: atomic, hashed, without pickle, and agreed upon by all ranks.

A checkpoint is a folder `step_XXXXXXXX` of the files that `train/state.py` makes, with a `manifest.json` of their
SHA-256. It is written under a temporary name and renamed when whole, so a kill at any moment leaves the previous one in
place. It is read into memory once, and what is loaded is what was hashed.
"""

from __future__ import annotations

import errno
import hashlib
import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from pipeline.atomic import remove, replacing, write_atomically

from .config import Config
from .errors import CheckpointFailed, Stopped, UserMistake
from .resolve import changed_fields
from .runtime import Runtime, SignalWatch
from .state import DOCUMENT_FILE, MODEL_FILE, OPTIMIZER_FILE, Mismatch, Saved, State, check, restore, to_files

_PREFIX = "step_"
_MANIFEST = "manifest.json"
_NEEDED = (MODEL_FILE, OPTIMIZER_FILE, DOCUMENT_FILE)
_MAX_JSON_BYTES = 256 << 20
_MAX_HEADER_BYTES = 64 << 20

PAUSES_S = (1.0, 4.0, 15.0)
"""Seconds to wait before each further attempt at a write; the other ranks wait as long, so the sum stays short."""
_PASSING = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EIO,
    errno.EACCES,
    errno.EPERM,
    errno.ESTALE,
    errno.EROFS,
    errno.ETIMEDOUT,
    errno.EAGAIN,
    errno.EBUSY,
)

T = TypeVar("T")


class Damaged(Exception):
    """A checkpoint is not whole; the message says in what."""


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def persistently(what: str, write: Callable[[], T]) -> T:
    """The result of `write`, attempted again for a while where the disk refuses it.

    A full or unreachable disk is often somebody else's trouble of a moment; a week of training is not ended for it.

    Raises:
        CheckpointFailed: when it could not be written in the end, or never can be.
    """
    for pause in (*PAUSES_S, None):
        try:
            return write()
        except OSError as reason:
            if pause is None or reason.errno not in _PASSING:
                raise CheckpointFailed(
                    f"{what} could not be written: {reason}; free space or fix permissions, then run the same "
                    "command again"
                ) from None
            print(f"regatta: {what}: {reason}; trying again in {pause:g} s", file=sys.stderr, flush=True)
            time.sleep(pause)
    raise AssertionError("the last attempt returns or raises")


def write_checkpoint(root: Path, step: int, files: Mapping[str, bytes], keep: int) -> Path:
    """Write the checkpoint of a step under `root` and drop all but the newest `keep`, and all later ones.

    Args:
        root: folder of the checkpoints.
        step: optimizer steps taken; names the checkpoint.
        files: content by file name.
        keep: checkpoints that stay.

    Returns:
        The checkpoint's folder.

    Raises:
        OSError: when it could not be written; nothing half-written is left under a final name, and the older ones are
            as they were.
    """
    final = root / f"{_PREFIX}{step:08d}"
    root.mkdir(parents=True, exist_ok=True)
    for leftover in root.glob(".*.tmp"):  # of writers that were killed: a run has one writer at a time
        remove(leftover)
    # Hashed in memory: what the disk made of the bytes is what the hash shall find out.
    hashes = {name: hashlib.sha256(data).hexdigest() for name, data in sorted(files.items())}
    with replacing(final) as temporary:
        temporary.mkdir()
        for name, data in files.items():
            (temporary / name).write_bytes(data)
        (temporary / _MANIFEST).write_text(json.dumps({"files": hashes}, indent=1))
    write_atomically(root / "latest", final.name.encode())
    _drop_others(root, final, keep)
    return final


def _drop_others(root: Path, newest: Path, keep: int) -> None:
    # Later steps are another history's (--resume never, or damaged): they must not crowd this one out.
    others = steps_on_disk(root)
    later = [folder for folder in others if folder.name > newest.name]
    for old in later + others[len(later) + keep :]:
        remove(old)


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def steps_on_disk(root: Path) -> list[Path]:
    """Checkpoint folders, newest first."""
    return sorted((p for p in root.glob(f"{_PREFIX}*") if p.is_dir()), key=lambda p: p.name, reverse=True)


def read_checkpoint(folder: Path) -> Saved:
    """A checkpoint's content, with every file's hash seen to be the manifest's.

    Raises:
        Damaged: a file is missing, is not what was written, or cannot be made sense of.
        UserMistake: this user may not read it, which says nothing about whether it is whole.
    """
    manifest = _json(_read(folder / _MANIFEST, _MAX_JSON_BYTES), _MANIFEST)
    hashes = manifest.get("files")
    if not isinstance(hashes, dict) or not set(_NEEDED) <= set(hashes):
        raise Damaged(f"{_MANIFEST} does not name all files")
    contents = {name: _verified(folder / name, hashes[name]) for name in _NEEDED}
    document = _json(contents[DOCUMENT_FILE], DOCUMENT_FILE)
    if folder.name != f"{_PREFIX}{document.get('step')!s:>08}":
        raise Damaged(f"{DOCUMENT_FILE} is of step {str(document.get('step'))[:20]}")
    return Saved(document, _tensors(contents, MODEL_FILE), _tensors(contents, OPTIMIZER_FILE))


def _read(path: Path, limit: int | None = None) -> bytes:
    try:
        with path.open("rb") as stream:
            if limit is not None and path.stat().st_size > limit:
                raise Damaged(f"{path.name} is larger than {limit} bytes")
            return stream.read()
    except PermissionError as reason:
        raise UserMistake(
            f"{path} may not be read by this user ({reason.strerror}); it may well be whole: have its owner give the "
            "right to read it, or choose another folder"
        ) from None
    except OSError as reason:
        raise Damaged(f"{path.name}: {reason.strerror}") from None


def _verified(path: Path, expected: Any) -> bytes:
    data = _read(path)
    if hashlib.sha256(data).hexdigest() != expected:
        raise Damaged(f"{path.name} is not what was written (its SHA-256 differs)")
    return data


def _json(data: bytes, name: str) -> dict[str, Any]:
    try:
        loaded = json.loads(data)
    except (ValueError, RecursionError) as reason:
        raise Damaged(f"{name} is not JSON: {str(reason)[:80]}") from None
    if not isinstance(loaded, dict):
        raise Damaged(f"{name} holds no object")
    return loaded


def _tensors(contents: Mapping[str, bytes], name: str) -> dict[str, Tensor]:
    data = contents[name]
    # The library believes a header of up to 100 MB; ours have some kilobytes.
    if int.from_bytes(data[:8], "little") > _MAX_HEADER_BYTES:
        raise Damaged(f"{name} has a header that is too large")
    try:
        tensors: dict[str, Tensor] = load(data)
        return tensors
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as reason:
        raise Damaged(f"{name} holds no tensors: {str(reason)[:80]}") from None


def is_good(folder: Path) -> bool:
    """Whether a checkpoint can be read and every file of it has its hash."""
    try:
        read_checkpoint(folder)
    except Damaged:
        return False
    return True


# ---------------------------------------------------------------------------------------------------------------------
# One run's checkpoints


@dataclass
class Checkpoints:
    """The checkpoints of one run; every rank makes and calls it alike, rank 0 writes.

    Attributes:
        root: folder of the checkpoints, which all ranks see.
        runtime: this process.
        identity: JSON values that say which run this is, stored in each checkpoint.
        changes: what differs between a saved document and this run, as `name: saved -> current`; a checkpoint of a run
            that differs is refused.
        place: how messages call the folder and the flag to change it, such as "--run-dir runs/a".
        remedy: what else the user can do about a checkpoint that does not fit.
        resume: continue from the newest good checkpoint; otherwise what is there is overwritten.
        keep: newest checkpoints that stay on disk.
    """

    root: Path
    runtime: Runtime
    identity: Mapping[str, Any]
    changes: Callable[[dict[str, Any]], list[str]]
    place: str
    remedy: str
    resume: bool = True
    keep: int = 2

    def restore(self, state: State) -> bool:
        """Fill `state` in place from the newest checkpoint that every rank finds whole; whether there was one.

        Raises:
            UserMistake: it has other settings or is of another network, no checkpoint is whole, one may not be read,
                or the ranks do not see the same ones; `state` is then unchanged.
        """
        folders = steps_on_disk(self.root) if self.resume else []
        names = [folder.name for folder in folders]
        if any(other != names for other in self.runtime.gather_objects(names)):
            raise UserMistake(f"the ranks see different checkpoints under {self.root}; put it on a shared disk")
        passed_over: list[str] = []
        for folder in folders:
            saved, complaint = self._read_on_all_ranks(folder, state)
            if complaint:
                passed_over.append(f"{folder.name} is damaged: {complaint}")
                continue
            assert saved is not None
            self._tell(passed_over, f"going on from {folder.name}")
            restore(saved, state, self.runtime.rank, self.runtime.world_size)
            return True
        if folders:
            self._tell(passed_over, "none is left")
            raise UserMistake(f"no checkpoint under {self.root} is whole; move it away or use --resume never")
        return False

    def _read_on_all_ranks(self, folder: Path, state: State) -> tuple[Saved | None, str]:
        """(what is saved, "") where all ranks could read it and it fits, or (anything, the first rank's complaint)."""
        saved, complaint, mistake = None, "", None
        try:
            saved = read_checkpoint(folder)
            self._check(folder, saved, state)
        except Damaged as reason:
            complaint = str(reason)
        except UserMistake as reason:
            mistake = reason
        # Decided together: a rank that alone refused, or alone fell back, would leave or betray the others.
        told = self.runtime.gather_objects((complaint, mistake))
        refused = next((mistake for _, mistake in told if mistake is not None), None)
        if refused is not None:
            raise refused
        return saved, next((complaint for complaint, _ in told if complaint), "")

    def _check(self, folder: Path, saved: Saved, state: State) -> None:
        try:
            changes = self.changes(saved.document)
        except (KeyError, TypeError, AttributeError) as reason:
            raise Damaged(f"{DOCUMENT_FILE} does not say which run it is of ({reason})") from None
        if changes:
            raise UserMistake(f"{self.place} holds a run with other settings ({'; '.join(changes[:3])}); {self.remedy}")
        try:
            check(saved, state)
        except Mismatch as reason:
            raise UserMistake(f"checkpoint {folder} {reason}; {self.remedy}") from None

    def _tell(self, passed_over: list[str], then: str) -> None:
        if passed_over and self.runtime.is_main:
            print(f"regatta: {self.root}: {'; '.join(passed_over)}; {then}", file=sys.stderr, flush=True)

    def save(self, state: State, also: Callable[[Path], None] | None = None) -> None:
        """Write a checkpoint of `state`.

        Args:
            state: what is saved.
            also: called on rank 0 with the checkpoint's folder once it is written; what it raises ends all ranks.

        Raises:
            CheckpointFailed: on every rank when rank 0 could not write, so that none waits for a rank that has gone.
        """
        parts = self.runtime.gather_objects(state.rank_part())
        self.runtime.first_rank_does(lambda: self._write(state, parts, also))

    def _write(self, state: State, parts: list[Any], also: Callable[[Path], None] | None) -> None:
        files = to_files(state, parts, self.identity)
        where = self.root / f"{_PREFIX}{state.step:08d}"
        folder = persistently(f"checkpoint {where}", lambda: write_checkpoint(self.root, state.step, files, self.keep))
        if also is not None:
            also(folder)

    def save_if_stopped(self, state: State, watch: SignalWatch) -> None:
        """Where a signal has asked any rank to stop: save and end the run. Every rank calls it after the same step.

        Raises:
            Stopped: after saving.
        """
        if self.runtime.agree(bool(watch.asked)):
            self.save(state)
            raise stopped(state.step, watch)


def stopped(step: int, watch: SignalWatch) -> Stopped:
    """The end of a run that was asked to stop and has saved the state of a step."""
    return Stopped(
        f"stopped by {watch.asked or 'a signal to another rank'} after step {step}, saved; "
        "the same command goes on from here"
    )


def recorded_config(root: Path) -> dict[str, Any] | None:
    """The configuration that the newest readable checkpoint under `root` was saved with; None where there is none.

    Hashes are not checked: the configuration is needed before anything is built, and all checkpoints of a folder are
    of one run. Restoring reads the document again, with its hash.
    """
    for folder in steps_on_disk(root):
        try:
            config = _json(_read(folder / DOCUMENT_FILE, _MAX_JSON_BYTES), DOCUMENT_FILE)["config"]
            if {"run", "recipe", "model"} <= set(config):
                return dict(config)
        except (Damaged, KeyError, TypeError):
            continue
    return None


def run_checkpoints(config: Config, config_json: Mapping[str, Any], runtime: Runtime) -> Checkpoints:
    """The checkpoints of a pre-training run.

    Args:
        config: resolved configuration; gives folder, `--resume` and `--keep-checkpoints`.
        config_json: what is written as `config.json`, with the hash of the data.
        runtime: this process.
    """

    def changes(document: dict[str, Any]) -> list[str]:
        saved = document["config"]
        found = changed_fields(saved, config.to_json())
        if saved["data_hash"] != config_json["data_hash"]:
            found.append(f"data hash: {saved['data_hash'][:12]} -> {config_json['data_hash'][:12]}")
        return found

    return Checkpoints(
        root=Path(config.run.run_dir) / "checkpoints",
        runtime=runtime,
        identity={"config": config_json},
        changes=changes,
        place=f"--run-dir {config.run.run_dir}",
        remedy="choose another --run-dir, or --resume never to start over",
        resume=config.run.resume == "auto",
        keep=config.run.keep_checkpoints,
    )
