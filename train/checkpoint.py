"""Checkpoints of training and of fine-tuning: atomic, hashed, without pickle, and agreed upon by all ranks.

A checkpoint is a folder `step_XXXXXXXX` of the files that `train/state.py` makes, with a `manifest.json` of their
SHA-256. It is written under a temporary name and renamed when whole, so a kill at any moment leaves the previous one in
place. It is read into memory once, and what is loaded is what was hashed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from pipeline.atomic import remove, replacing, write_atomically

from .config import Config
from .errors import CheckpointFailed, RunEnd, Stopped, UserMistake
from .resolve import changed_fields, lengthened
from .retry import persistently
from .runtime import Runtime
from .state import (
    DOCUMENT_FILE,
    MODEL_FILE,
    OPTIMIZER_FILE,
    Mismatch,
    Saved,
    State,
    check,
    restore,
    state_bytes,
    to_files,
)
from .stop import SignalWatch

_NAME = re.compile(r"step_(\d{8,})")
_MANIFEST = "manifest.json"
_NEEDED = (MODEL_FILE, OPTIMIZER_FILE, DOCUMENT_FILE)
_MAX_JSON_BYTES = 64 << 20
_MAX_HEADER_BYTES = 16 << 20
_READ_ATTEMPTS = 3
PAUSE_S = 1.0
"""Seconds between attempts at reading, and between looks at a folder that ranks on other machines see otherwise."""


class Damaged(Exception):
    """A checkpoint is not whole; the message says in what."""


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def write_checkpoint(root: Path, name: str, files: Mapping[str, bytes]) -> Path:
    """Write one checkpoint under `root`; returns its folder.

    Args:
        root: folder of the checkpoints, made where it is missing.
        name: of the checkpoint's folder, `step_XXXXXXXX`.
        files: content by file name.

    Raises:
        OSError: when it could not be written; nothing half-written is left under a final name, and the other
            checkpoints are as they were.
    """
    root.mkdir(parents=True, exist_ok=True)
    for leftover in root.glob(".*.tmp"):  # of writers that were killed: a run has one writer at a time
        remove(leftover)
    # Hashed in memory: what the disk made of the bytes is what the hash shall find out.
    hashes = {file: hashlib.sha256(data).hexdigest() for file, data in sorted(files.items())}
    with replacing(root / name) as temporary:
        temporary.mkdir()
        for file, data in files.items():
            (temporary / file).write_bytes(data)
        (temporary / _MANIFEST).write_text(json.dumps({"files": hashes}, indent=1))
    # After the folder has its name: "latest" must never name a checkpoint that is not there.
    write_atomically(root / "latest", name.encode())
    return root / name


def checkpoint_name(step: int) -> str:
    """The folder's name of the checkpoint of a step."""
    return f"step_{step:08d}"


def step_of(folder: Path) -> int:
    """The step of the checkpoint in a folder of that name; inverse of `checkpoint_name`."""
    return int(folder.name.removeprefix("step_"))


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def steps_on_disk(root: Path) -> list[Path]:
    """Checkpoint folders, newest first; empty where there is no such folder.

    Raises:
        UserMistake: the folder is there and cannot be listed. Taking that for an empty one would start the run over.
        CheckpointFailed: a file is in its place, so that nothing could be saved.
    """
    try:
        names = [entry.name for entry in root.iterdir()]
    except (FileNotFoundError, NotADirectoryError):
        # Told before the first step, not at the first save.
        if os.path.lexists(root):
            raise CheckpointFailed(f"checkpoints {root} is no folder; move it away, or choose another folder") from None
        return []  # below a file there is no folder either; --run-dir is refused by name when it is made
    except OSError as reason:
        raise UserMistake(
            f"checkpoints {root} cannot be listed: {reason.strerror}; give this user the right to read them, or choose "
            "another folder"
        ) from None
    steps = [(int(found[1]), name) for name in names if (found := _NAME.fullmatch(name))]
    return [root / name for _, name in sorted(steps, reverse=True)]


def read_checkpoint(folder: Path, largest_bytes: int | None = None) -> Saved:
    """A checkpoint's content, with every file's hash seen to be the manifest's.

    Args:
        folder: of the checkpoint.
        largest_bytes: a tensor file that is larger is not read into memory.

    Raises:
        Damaged: a file is missing, is not what was written, or cannot be made sense of.
        UserMistake: this user may not read it, which says nothing about whether it is whole.
    """
    hashes = _hashes(folder)
    document = _document(folder, hashes)
    model, optimizer = (_tensors(folder / name, hashes[name], largest_bytes) for name in (MODEL_FILE, OPTIMIZER_FILE))
    return Saved(document, model, optimizer)


def is_good(folder: Path) -> bool:
    """Whether a checkpoint can be read and every file of it has its hash.

    Raises:
        UserMistake: this user may not read it.
    """
    try:
        read_checkpoint(folder)
    except Damaged:
        return False
    return True


def _hashes(folder: Path) -> dict[str, Any]:
    hashes = _json(_read(folder / _MANIFEST, _MAX_JSON_BYTES), _MANIFEST).get("files")
    if not isinstance(hashes, dict) or not set(_NEEDED) <= set(hashes):
        raise Damaged(f"{_MANIFEST} does not name all files")
    return hashes


def _document(folder: Path, hashes: Mapping[str, Any]) -> dict[str, Any]:
    document = _json(_verified(folder / DOCUMENT_FILE, hashes[DOCUMENT_FILE], _MAX_JSON_BYTES), DOCUMENT_FILE)
    step = document.get("step")
    # A folder under another step's name would be taken for a newer or older state than it is.
    if type(step) is not int or folder.name != checkpoint_name(step):
        raise Damaged(f"{DOCUMENT_FILE} is of step {str(step)[:20]}")
    return document


def _tensors(path: Path, expected: Any, largest_bytes: int | None) -> dict[str, Tensor]:
    data = _verified(path, expected, largest_bytes)
    # The library believes a header of up to 100 MB, which takes some times as much to hold; ours have some kilobytes.
    if int.from_bytes(data[:8], "little") > _MAX_HEADER_BYTES:
        raise Damaged(f"{path.name} has a header that is too large")
    try:
        tensors: dict[str, Tensor] = load(data)
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as reason:
        raise Damaged(f"{path.name} holds no tensors: {str(reason)[:80]}") from None
    return tensors


def _verified(path: Path, expected: Any, largest_bytes: int | None) -> bytes:
    data = _read(path, largest_bytes)
    if hashlib.sha256(data).hexdigest() != expected:
        raise Damaged(f"{path.name} is not what was written (its SHA-256 differs)")
    return data


def _read(path: Path, largest_bytes: int | None) -> bytes:
    """The bytes of a file; a disk that fails for a moment is asked again, because falling back loses work."""
    for attempt in range(_READ_ATTEMPTS):
        try:
            if largest_bytes is not None and path.stat().st_size > largest_bytes:
                raise Damaged(f"{path.name} has more than {largest_bytes} bytes")
            return path.read_bytes()
        except PermissionError as reason:
            raise UserMistake(
                f"{path} may not be read by this user ({reason.strerror}); it may well be whole: have its owner give "
                "the right to read it, or choose another folder"
            ) from None
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as reason:
            raise Damaged(f"{path.name}: {reason.strerror}") from None
        except OSError as reason:
            if attempt == _READ_ATTEMPTS - 1:
                raise Damaged(f"{path.name}: {reason.strerror}") from None
        time.sleep(PAUSE_S)
    raise AssertionError("the last attempt returns or raises")


def _json(data: bytes, name: str) -> dict[str, Any]:
    try:
        loaded = json.loads(data)
    except (ValueError, RecursionError) as reason:
        raise Damaged(f"{name} is not JSON: {str(reason)[:80]}") from None
    if not isinstance(loaded, dict):
        raise Damaged(f"{name} holds no object")
    return loaded


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
        keep: newest checkpoints that stay on disk; 0 for all.
    """

    root: Path
    runtime: Runtime
    identity: Mapping[str, Any]
    changes: Callable[[dict[str, Any]], list[str]]
    place: str
    remedy: str
    resume: bool = True
    keep: int = 2
    _history: list[str] = field(default_factory=list)  # names of this run's own checkpoints, oldest first
    _saved_step: int | None = None

    def restore(self, state: State, before: int | None = None) -> bool:
        """Fill `state` in place from the newest checkpoint that every rank finds whole; whether there was one.

        Args:
            state: of this run.
            before: only checkpoints of earlier steps than this one count.

        Raises:
            UserMistake: it has other settings or is of another network, no checkpoint is whole, one may not be read,
                or the ranks do not see the same ones; `state` is then unchanged.
        """
        # `--resume never` speaks of what was there before this run, not of what it has saved itself.
        folders = self._same_on_all_ranks() if self.resume or before is not None else []
        folders = [folder for folder in folders if before is None or step_of(folder) < before]
        passed_over: list[str] = []
        # Newest first; a damaged one is passed over for the one before.
        for position, folder in enumerate(folders):
            saved, complaint = self._read_on_all_ranks(folder, state)
            if saved is None:
                passed_over.append(f"{folder.name} is damaged: {complaint}")
                continue
            self._tell(passed_over, f"going on from {folder.name}")
            restore(saved, state, self.runtime.rank, self.runtime.world_size)
            self._history = [older.name for older in reversed(folders[position:])]
            return True
        if folders:
            self._tell(passed_over, "none is left")
            raise UserMistake(f"no checkpoint under {self.root} is whole; move it away or use --resume never")
        return False

    def _same_on_all_ranks(self) -> list[Path]:
        for attempt in range(_READ_ATTEMPTS):
            folders: list[Path] = []
            mistake: RunEnd | None = None
            try:
                folders = steps_on_disk(self.root)
            except RunEnd as reason:
                mistake = reason
            names = [folder.name for folder in folders]
            # Told before it is raised: a rank that alone left here would leave the others waiting in this exchange.
            told = self.runtime.gather_objects((names, mistake))
            refused = next((mistake for _, mistake in told if mistake is not None), None)
            if refused is not None:
                raise refused
            if all(other == names for other, _ in told):
                return folders
            if attempt < _READ_ATTEMPTS - 1:
                time.sleep(PAUSE_S)  # a network disk may show a change late on another machine
        raise UserMistake(f"the ranks see different checkpoints under {self.root}; put it on a shared disk")

    def _read_on_all_ranks(self, folder: Path, state: State) -> tuple[Saved | None, str]:
        """The saved state if every rank can read it and it fits; otherwise None and the complaint of the first rank."""
        saved, complaint = None, ""
        mistake: UserMistake | None = None
        try:
            saved = self._read(folder, state)
        except Damaged as reason:
            complaint = str(reason)
        except UserMistake as reason:
            mistake = reason
        # Decided together: a rank that alone refused or fell back would leave the others, or train another state.
        told = self.runtime.gather_objects((complaint, mistake))
        refused = next((mistake for _, mistake in told if mistake is not None), None)
        if refused is not None:
            raise refused
        complaint = next((complaint for complaint, _ in told if complaint), "")
        return (None if complaint else saved), complaint

    def _read(self, folder: Path, state: State) -> Saved:
        hashes = _hashes(folder)
        # Settings first: those of another run say more than the tensors that follow from them.
        self._check_settings(_document(folder, hashes))
        saved = read_checkpoint(folder, largest_bytes=4 * state_bytes(state) + _MAX_HEADER_BYTES)
        try:
            check(saved, state)
        except Mismatch as reason:
            raise UserMistake(f"checkpoint {folder} {reason}; {self.remedy}") from None
        return saved

    def _check_settings(self, document: dict[str, Any]) -> None:
        try:
            changes = self.changes(document)
        except (KeyError, TypeError, AttributeError) as reason:
            raise Damaged(f"{DOCUMENT_FILE} does not say which run it is of ({reason})") from None
        if changes:
            raise UserMistake(f"{self.place} holds a run with other settings ({'; '.join(changes[:3])}); {self.remedy}")

    def _tell(self, passed_over: list[str], then: str) -> None:
        if passed_over and self.runtime.is_main:
            print(f"regatta: {self.root}: {'; '.join(passed_over)}; {then}", file=sys.stderr, flush=True)

    def check_space(self, state: State) -> None:
        """Check at the start that the disk has room for the checkpoints of the whole run.

        Raises:
            UserMistake: on every rank, with what is needed and what is free.
        """
        self.runtime.first_rank_does(lambda: self._check_space(state))

    def space(self, state: State) -> tuple[int, int]:
        """Bytes that this run's checkpoints need beyond those on the disk (negative: none), and bytes that are free."""
        # The newest and the best stay while one more is written; a backbone file is at most as large as one.
        count = self.keep + 3
        needed = count * state_bytes(state) - _bytes_below(self.root)
        return needed, shutil.disk_usage(nearest_existing(self.root)).free

    def _check_space(self, state: State) -> None:
        needed, free = self.space(state)
        if needed > free:
            raise UserMistake(
                f"{self.place}: checkpoints of {state_bytes(state) / 1e9:.2f} GB need {needed / 1e9:.2f} GB in all, "
                f"{free / 1e9:.2f} GB are free; free space or choose another disk"
            )

    def save(self, state: State, also: Callable[[Path], None] | None = None, best: int | None = None) -> None:
        """Write a checkpoint of `state`, then drop all but the newest `keep` (0: none is dropped) and the best.

        Args:
            state: what is saved.
            also: called on rank 0 with the checkpoint's folder once it is written; what it raises ends all ranks.
            best: step of the best checkpoint so far, this one or an earlier one; None where none is known.

        Raises:
            CheckpointFailed: on every rank when rank 0 could not write, so that none waits for a rank that has gone.
        """
        # Outside of the first rank's part: every rank must take part in the exchange.
        parts = self.runtime.gather_objects(state.rank_part())
        self.runtime.first_rank_does(lambda: self._write(state, parts, also, best))
        self._saved_step = state.step

    def _write(self, state: State, parts: list[Any], also: Callable[[Path], None] | None, best: int | None) -> None:
        name = checkpoint_name(state.step)
        files = to_files(state, parts, self.identity)
        folder = persistently(f"checkpoint {self.root / name}", lambda: write_checkpoint(self.root, name, files))
        self._history = [older for older in self._history if older != name] + [name]
        # What is not in the history is damaged or another run's (--resume never): it must not crowd this one out.
        newest = self._history[-self.keep :] if self.keep else self._history
        stays = {*newest, *self._name_best(best)}
        self._history = [older for older in self._history if older in stays]
        # After writing: until then the older ones are all that is left of the run.
        for other in steps_on_disk(self.root):
            if other.name not in stays:
                remove(other)
        # Last, so that it finds the checkpoint written.
        if also is not None:
            also(folder)

    def _name_best(self, step: int | None) -> Iterable[str]:
        path = self.root / "best"
        name = "" if step is None else checkpoint_name(step)
        # The best of an earlier start, or one that is gone, must not be named.
        if name not in self._history:
            remove(path)
            return ()
        persistently(f"{path}", lambda: write_atomically(path, name.encode()))
        return (name,)

    def save_if_stopped(self, state: State, watch: SignalWatch) -> None:
        """Where a signal has asked any rank to stop: save this step unless it is saved, and end the run.

        Every rank calls it after the same step.

        Raises:
            Stopped: after saving.
        """
        if self.runtime.agree(bool(watch.asked)):
            if self._saved_step != state.step:
                self.save(state)
            raise stopped(state.step, watch)


def nearest_existing(path: Path) -> Path:
    """What is at `path`, or the nearest above it that exists: where a disk is looked at before anything is made.

    It may be a file in the way of a folder.
    """
    whole = path.absolute()
    return next(each for each in (whole, *whole.parents) if each.exists())


def _bytes_below(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


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
        found = changed_fields(saved, lengthened(saved, config.to_json()))
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
