"""Checkpoints under damage, failing disks, missing rights, other ranks and hostile files."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import pickle
import shutil
import stat
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

import train.checkpoint
import train.retry
from pipeline.atomic import replacing, write_atomically
from tests.faults.checkpoints import RUNTIME, SETTINGS, advance, attack, make, outcome, tiny_state, values
from train.backbone_io import build_encoder, read_backbone, save_backbone
from train.checkpoint import Checkpoints, Damaged, read_checkpoint, steps_on_disk
from train.errors import EXIT_CHECKPOINT, CheckpointFailed, UserMistake
from train.eval.tuning import TuningCheckpoints
from train.runtime import Runtime

ERRORS = (errno.ENOSPC, errno.EIO, errno.EACCES, errno.ESTALE, errno.EROFS)


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train.retry, "PAUSES_S", (0.0, 0.0))
    monkeypatch.setattr(train.checkpoint, "PAUSE_S", 0.0)
    torch.set_num_threads(1)


# --- damage ----------------------------------------------------------------------------------------------------------


def test_no_mutation_loads_a_wrong_state(tmp_path: Path) -> None:
    tally = attack(300, tmp_path / "checkpoints")
    assert sum(tally.values()) == 300
    assert sum(count for (_, _, result), count in tally.items() if result == "fallback") > 250


def test_a_missing_file_and_another_folder_s_name_are_damage(tmp_path: Path) -> None:
    for number, name in enumerate(["manifest.json", "model.safetensors", "optimizer.safetensors", "state.json"]):
        root = tmp_path / str(number)
        states = make(root)
        (root / "step_00000002" / name).unlink()
        assert outcome(root, states)[0] == "fallback", name
    root = tmp_path / "renamed"
    states = make(root)
    shutil.copytree(root / "step_00000001", root / "step_00000009")
    result, said = outcome(root, states)
    assert result == "newest" and "step_00000009 is damaged" in said


def reseal(folder: Path) -> None:
    """A manifest that vouches for the files as they are."""
    hashes = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.iterdir()
        if path.name != "manifest.json"
    }
    (folder / "manifest.json").write_text(json.dumps({"files": hashes}))


def test_each_piece_left_out_is_noticed(tmp_path: Path) -> None:
    """A checkpoint that is whole by its hashes and lacks one value or tensor is refused by name, nothing is changed."""
    from safetensors.torch import load_file, save_file

    make(tmp_path / "made")
    folder = tmp_path / "made" / "step_00000002"
    document = json.loads((folder / "state.json").read_text())
    pieces = [("state.json", name) for name in document]
    for file in ("model.safetensors", "optimizer.safetensors"):
        pieces += [(file, name) for name in load_file(folder / file)]
    assert len(pieces) > 20
    for number, (file, name) in enumerate(pieces):
        root = tmp_path / str(number)
        shutil.copytree(tmp_path / "made", root)
        shutil.rmtree(root / "step_00000001")
        path = root / "step_00000002" / file
        if file == "state.json":
            path.write_text(json.dumps({key: value for key, value in document.items() if key != name}))
        else:
            save_file({key: value for key, value in load_file(path).items() if key != name}, path)
        reseal(root / "step_00000002")
        result, said = outcome(root, {})
        assert result == "refused", (file, name, result, said)


# --- hostile files ---------------------------------------------------------------------------------------------------


def tensor_file(header: bytes, size: int | None = None, body: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header) if size is None else size) + header + body


HOSTILE = {
    "empty": b"",
    "header longer than the file": tensor_file(b"{}", 1 << 62),
    "header of the largest size": tensor_file(b"{}", (1 << 64) - 1),
    "huge shape": tensor_file(b'{"a":{"dtype":"F32","shape":[1099511627776,1099511627776],"data_offsets":[0,4]}}'),
    "data outside": tensor_file(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4000000000000]}}'),
    "negative": tensor_file(b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}', body=bytes(4)),
    "overlap": tensor_file(
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        body=bytes(4),
    ),
    "unknown type": tensor_file(b'{"a":{"dtype":"F99","shape":[1],"data_offsets":[0,4]}}', body=bytes(4)),
    "no object": tensor_file(b"[1]"),
    "deep": tensor_file(b'{"a":' * 5000 + b"1" + b"}" * 5000),
    "not text": tensor_file(b"\xff\xfe\xfd"),
    "pickle": pickle.dumps({"a": 1}),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_tensor_file_is_damage(tmp_path: Path, kind: str) -> None:
    states = make(tmp_path)
    folder = tmp_path / "step_00000002"
    (folder / "model.safetensors").write_bytes(HOSTILE[kind])
    reseal(folder)  # its hash is right: only its content is hostile
    assert outcome(tmp_path, states)[0] == "fallback"
    path = tmp_path / "backbone.safetensors"
    path.write_bytes(HOSTILE[kind])
    with pytest.raises(UserMistake, match="cannot be read"):
        read_backbone(path)


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, '{"step":' * 5000, "null", "[]", '{"step": 2}', '{"step": 1e999}', '{"step": "2"}', "1" * 9999],
    ids=range(8),
)
def test_hostile_json_is_damage_or_refused(tmp_path: Path, text: str) -> None:
    states = make(tmp_path)
    folder = tmp_path / "step_00000002"
    (folder / "state.json").write_text(text)
    reseal(folder)
    assert outcome(tmp_path, states)[0] == "fallback"
    (folder / "manifest.json").write_text(text)
    assert outcome(tmp_path, states)[0] == "fallback"


def test_a_giant_file_is_not_read_into_memory(tmp_path: Path) -> None:
    states = make(tmp_path)
    for name in ("model.safetensors", "state.json", "manifest.json"):
        path = tmp_path / "step_00000002" / name
        whole = path.read_bytes()
        os.truncate(path, 1 << 40)  # holes: it takes no room, only its size is giant
        started = time.perf_counter()
        assert outcome(tmp_path, states)[0] == "fallback"
        assert time.perf_counter() - started < 5
        path.write_bytes(whole)


def test_a_manifest_cannot_name_files_elsewhere(tmp_path: Path) -> None:
    states = make(tmp_path)
    (tmp_path / "step_00000002" / "manifest.json").write_text('{"files": {"../step_00000001/state.json": "0"}}')
    assert outcome(tmp_path, states)[0] == "fallback"


def test_resuming_reads_no_pickle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    states = make(tmp_path)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a pickle was read")

    for owner, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(owner, name, refuse)
    assert outcome(tmp_path, states)[0] == "newest"


# --- failing disks ---------------------------------------------------------------------------------------------------


class HalfWritten(io.FileIO):
    """A file whose first write takes half of the bytes and then fails."""

    error = errno.ENOSPC

    def write(self, data: Any) -> int:
        super().write(bytes(data)[: len(data) // 2])
        raise OSError(self.error, os.strerror(self.error))


@dataclass
class FailingDisk:
    """Counts the calls that change the disk and lets those from `first` to before `last` fail."""

    error: int
    first: int
    last: int
    calls: int = 0
    kinds: list[str] = field(default_factory=list)

    def fails(self, kind: str) -> bool:
        self.calls += 1
        self.kinds.append(kind)
        return self.first <= self.calls - 1 < self.last

    def install(self, patch: pytest.MonkeyPatch) -> None:
        for name in ("fsync", "rename", "replace", "mkdir"):
            patch.setattr(os, name, self._wrapped(name, getattr(os, name)))
        patch.setattr(io, "open", self._open(io.open))

    def _wrapped(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **more: Any) -> Any:
            if self.fails(name):
                raise OSError(self.error, os.strerror(self.error))
            return original(*arguments, **more)

        return call

    def _open(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(file: Any, mode: str = "r", *arguments: Any, **more: Any) -> Any:
            if "w" in mode and self.fails("write"):
                broken = HalfWritten(file, "w")
                broken.error = self.error
                return broken if "b" in mode else io.TextIOWrapper(broken, write_through=True)
            return original(file, mode, *arguments, **more)

        return call


def saved_at(root: Path) -> tuple[TuningCheckpoints, Any, dict[int, list[Any]]]:
    """Checkpoints with those of steps 1 and 2 on the disk, and the state of step 3 not yet saved."""
    states = make(root)
    checkpoints, state = TuningCheckpoints(root, SETTINGS, RUNTIME), tiny_state()
    checkpoints.restore(state)
    advance(state)
    states[3] = values(state)
    return checkpoints, state, states


def restored(root: Path) -> tuple[int, list[Any]]:
    state = tiny_state(seed=9)
    # Not `TuningCheckpoints.restore`, which would also look for room on the disk.
    assert Checkpoints.restore(TuningCheckpoints(root, SETTINGS, RUNTIME), state)
    return state.step, values(state)


def number_of_calls(tmp_path: Path) -> int:
    checkpoints, state, _ = saved_at(tmp_path / "counting")
    disk = FailingDisk(0, 1 << 30, 1 << 30)
    with pytest.MonkeyPatch.context() as patch:
        disk.install(patch)
        checkpoints.save(state)
    assert {"fsync", "rename", "replace", "mkdir", "write"} - {"rename"} <= set(disk.kinds)
    return disk.calls


@pytest.mark.parametrize("error", ERRORS, ids=lambda number: errno.errorcode[number])
def test_a_failing_disk_at_any_call(tmp_path: Path, error: int, capsys: pytest.CaptureFixture[str]) -> None:
    """For a moment: the save succeeds. For good: exit code 5, and the older checkpoints are as they were."""
    total, retried = number_of_calls(tmp_path), 0
    assert total > 12
    for call in range(total):
        for lasting in (False, True):
            root = tmp_path / f"{call}-{lasting}"
            checkpoints, state, states = saved_at(root)
            with pytest.MonkeyPatch.context() as patch:
                FailingDisk(error, call, 1 << 30 if lasting else call + 1).install(patch)
                if lasting:
                    with pytest.raises(CheckpointFailed, match="could not be written") as end:
                        checkpoints.save(state)
                    assert end.value.code == EXIT_CHECKPOINT
                else:
                    checkpoints.save(state)
                    retried += "trying again" in capsys.readouterr().err
            step, found = restored(root)
            assert found == states[step]
            # After the rename the new one counts, whatever fails behind it.
            assert step == 3 or (lasting and step == 2)
            assert not lasting or step == 3 or (root / "step_00000001").is_dir()
            shutil.rmtree(root)
    # A folder that is there already need not be made: that call alone may fail without a word.
    assert retried >= total - 1


def can_mount(folder: Path) -> bool:
    folder.mkdir(exist_ok=True)
    options = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    return os.getuid() == 0 and shutil.which("mount") is not None and subprocess.run(options).returncode == 0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 2 MB."""
    folder = tmp_path / "disk"
    if not can_mount(folder):
        pytest.skip("mounting a small disk needs root and a kernel that allows it")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_that_is_really_full_and_really_read_only(small_disk: Path) -> None:
    root = small_disk / "checkpoints"
    checkpoints, state, states = saved_at(root)
    filler = small_disk / "filler"
    with pytest.raises(OSError), filler.open("wb", buffering=0) as stream:
        while stream.write(bytes(4096)):
            pass
    with pytest.raises(CheckpointFailed, match="No space left"):
        checkpoints.save(state)
    assert restored(root) == (2, states[2])
    filler.unlink()
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(CheckpointFailed, match="Read-only"):
        checkpoints.save(state)
    assert restored(root) == (2, states[2])
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    checkpoints.save(state)
    assert restored(root) == (3, states[3])
    assert not list(root.glob(".*")), "leftovers of the failed attempts"


def test_too_little_room_is_told_at_the_start(small_disk: Path) -> None:
    state = tiny_state()
    state.model = torch.nn.Linear(512, 512)
    state.optimizer = torch.optim.AdamW(state.model.parameters())
    checkpoints = TuningCheckpoints(small_disk / "checkpoints", SETTINGS, RUNTIME)
    with pytest.raises(UserMistake, match=r"need 0\.\d\d GB in all, 0\.00 GB are free; free space"):
        checkpoints.restore(state)


def test_a_moment_s_read_error_does_not_cost_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    states = make(tmp_path)
    original, left = Path.read_bytes, [2]

    def read(path: Path) -> bytes:
        if path.name == "model.safetensors" and left[0]:
            left[0] -= 1
            raise OSError(errno.ESTALE, "Stale file handle")
        return original(path)

    monkeypatch.setattr(Path, "read_bytes", read)
    assert outcome(tmp_path, states)[0] == "newest"
    left[0] = 3
    result, said = outcome(tmp_path, states)
    assert result == "fallback" and "Stale file handle" in said


# --- rights ----------------------------------------------------------------------------------------------------------


def as_another_user(action: Callable[[], None]) -> str:
    """What `action` ends with, in a process without any rights of its own."""
    if os.getuid() != 0:
        pytest.skip("changing the user needs root")
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        said = "nothing"
        try:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            action()
        except BaseException as reason:
            said = f"{type(reason).__name__}: {reason}"
        os.write(writer, said.encode()[:4000])
        os._exit(0)
    os.close(writer)
    os.waitpid(child, 0)
    with os.fdopen(reader, "rb") as stream:
        return stream.read().decode()


@pytest.fixture
def shared_folder() -> Iterator[Path]:
    """A folder that everybody can reach; pytest's own are closed to others."""
    import tempfile

    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def test_what_may_not_be_read_is_not_called_damaged(shared_folder: Path) -> None:
    root = shared_folder / "checkpoints"
    make(root)

    def resume() -> None:
        TuningCheckpoints(root, SETTINGS, RUNTIME)._same_on_all_ranks()
        TuningCheckpoints(root, SETTINGS, RUNTIME).restore(tiny_state())

    (root / "step_00000002" / "model.safetensors").chmod(0o600)
    said = as_another_user(resume)
    assert "UserMistake" in said and "may not be read by this user (Permission denied)" in said
    root.chmod(0o700)
    assert "cannot be listed" in as_another_user(resume), "an unreadable folder must not be taken for an empty one"
    backbone = shared_folder / "backbone.safetensors"
    save_backbone(build_encoder("resnet18"), backbone, arch="resnet18")
    assert as_another_user(lambda: read_backbone(backbone) and None) == "nothing"
    backbone.chmod(0o600)
    assert "may not be read by this user" in as_another_user(lambda: read_backbone(backbone) and None)


def test_a_folder_that_may_not_be_written(shared_folder: Path) -> None:
    root = shared_folder / "checkpoints"
    checkpoints, state, states = saved_at(root)
    said = as_another_user(lambda: checkpoints.save(state))
    assert "CheckpointFailed" in said and "Permission denied" in said
    assert restored(root) == (2, states[2])


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_files_for_others_follow_the_umask(tmp_path: Path, umask: int, mode: int) -> None:
    from tools.support.exports import export
    from train.backbone_io import load

    old = os.umask(umask)
    try:
        make(tmp_path / "checkpoints")
        save_backbone(build_encoder("resnet18"), tmp_path / "backbone.safetensors", arch="resnet18")
        loaded = load(str(tmp_path / "backbone.safetensors"), "", lambda _: None)
        for target, name in (("timm", "t.safetensors"), ("hf", "folder"), ("detectron2", "d.pkl")):
            export(loaded, tmp_path / "exports" / name, target)
    finally:
        os.umask(old)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 14
    assert {str(path): stat.S_IMODE(path.stat().st_mode) for path in files} == {str(path): mode for path in files}


# --- what stays ------------------------------------------------------------------------------------------------------


def test_the_newest_and_the_best_stay(tmp_path: Path) -> None:
    checkpoints, state = TuningCheckpoints(tmp_path, SETTINGS, RUNTIME, keep=2), tiny_state()
    kept = []
    for best in (1, 2, 2, 2, 2, 6):
        advance(state)
        checkpoints.save(state, best=best)
        kept.append([int(folder.name[-1]) for folder in steps_on_disk(tmp_path)])
    assert kept == [[1], [2, 1], [3, 2], [4, 3, 2], [5, 4, 2], [6, 5]]
    assert (tmp_path / "best").read_text() == (tmp_path / "latest").read_text() == "step_00000006"
    # The best is known again after a restart, and a run that starts over has none.
    again = TuningCheckpoints(tmp_path, SETTINGS, RUNTIME, keep=1)
    state = tiny_state()
    assert again.restore(state)
    for _ in range(2):
        advance(state)
        again.save(state, best=6)
    assert [int(folder.name[-1]) for folder in steps_on_disk(tmp_path)] == [8, 6]
    over = TuningCheckpoints(tmp_path, SETTINGS, RUNTIME, resume=False)
    fresh = tiny_state()
    assert not over.restore(fresh)
    advance(fresh)
    over.save(fresh)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_00000001"]


def test_all_stay_where_none_is_to_be_dropped(tmp_path: Path) -> None:
    checkpoints, state = TuningCheckpoints(tmp_path, SETTINGS, RUNTIME, keep=0), tiny_state()
    for _ in range(4):
        advance(state)
        checkpoints.save(state)
    assert [int(folder.name[-1]) for folder in steps_on_disk(tmp_path)] == [4, 3, 2, 1]


def test_a_damaged_checkpoint_does_not_count_as_one_of_the_newest(tmp_path: Path) -> None:
    make(tmp_path)
    checkpoints, state = TuningCheckpoints(tmp_path, SETTINGS, RUNTIME), tiny_state()
    (tmp_path / "step_00000002" / "state.json").write_text("{}")
    assert checkpoints.restore(state) and state.step == 1
    state.step = 2  # the next regular save lies behind the damaged one
    advance(state)
    checkpoints.save(state)
    assert [folder.name for folder in steps_on_disk(tmp_path)] == ["step_00000003", "step_00000001"]


# --- ranks -----------------------------------------------------------------------------------------------------------


class Meeting:
    """What a process group of threads exchanges."""

    def __init__(self, world_size: int) -> None:
        self.barrier = threading.Barrier(world_size)
        self.values: list[Any] = [None] * world_size

    def gather(self, rank: int, value: Any) -> list[Any]:
        self.values[rank] = value
        self.barrier.wait(30)
        gathered = list(self.values)
        self.barrier.wait(30)
        return gathered


def restore_on_ranks(roots: list[Path]) -> list[Any]:
    """Step, or the error's text, of each of several ranks that restore at the same time."""
    meeting, ends = Meeting(len(roots)), [None] * len(roots)

    def work(rank: int) -> None:
        class Rank(Runtime):
            def gather_objects(self, value: Any) -> list[Any]:
                return meeting.gather(rank, value)

        state = tiny_state(seed=rank)
        try:
            found = TuningCheckpoints(
                roots[rank], SETTINGS, Rank(rank, len(roots), torch.device("cpu"), torch.float32, False, object())
            ).restore(state)
            ends[rank] = (found, state.step)  # type: ignore[call-overload]
        except Exception as reason:
            ends[rank] = str(reason)  # type: ignore[call-overload]

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(len(roots))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return ends


def test_all_ranks_resume_from_the_same_checkpoint_or_none_does(tmp_path: Path) -> None:
    make(tmp_path / "a")
    assert restore_on_ranks([tmp_path / "a"] * 2) == [(True, 2)] * 2
    assert restore_on_ranks([tmp_path / "none"] * 2) == [(False, 0)] * 2
    # One node has a disk of its own.
    for end in restore_on_ranks([tmp_path / "a", tmp_path / "none"]):
        assert "the ranks see different checkpoints" in end and "shared disk" in end
    # One node alone reads damage: all fall back together.
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    (tmp_path / "b" / "step_00000002" / "model.safetensors").write_bytes(b"x")
    assert restore_on_ranks([tmp_path / "a", tmp_path / "b"]) == [(True, 1)] * 2
    (tmp_path / "b" / "step_00000001" / "model.safetensors").write_bytes(b"x")
    for end in restore_on_ranks([tmp_path / "a", tmp_path / "b"]):
        assert "no checkpoint" in end


def test_a_rank_that_may_not_list_the_folder_refuses_for_all(tmp_path: Path) -> None:
    """It must say so before the ranks compare what they see: the others would wait for it there."""
    make(tmp_path / "a")
    (tmp_path / "loop").symlink_to("loop")  # listing it fails for root too
    for end in restore_on_ranks([tmp_path / "a", tmp_path / "loop"]):
        assert "cannot be listed" in end


# --- the writer ------------------------------------------------------------------------------------------------------


def test_the_writer_replaces_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    write_atomically(path, b"one")
    with pytest.raises(KeyError), replacing(path) as temporary:
        temporary.write_bytes(b"half")
        raise KeyError
    assert path.read_bytes() == b"one"
    with replacing(path) as temporary:
        assert temporary.suffix == ".txt" and temporary.parent == tmp_path and not temporary.exists()
    assert path.read_bytes() == b"one", "a block that leaves nothing changes nothing"
    folder = tmp_path / "folder"
    for content in ("a", "b"):
        with replacing(folder) as temporary:
            temporary.mkdir()
            (temporary / content).touch()
        assert [each.name for each in folder.iterdir()] == [content]
    assert sorted(each.name for each in tmp_path.iterdir()) == ["file.txt", "folder"]


def test_a_flipped_bit_in_a_backbone_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "backbone.safetensors"
    save_backbone(build_encoder("resnet18"), path, arch="resnet18")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
    with pytest.raises(UserMistake, match="not what was written"):
        read_backbone(path)


def test_read_checkpoint_tells_damage(tmp_path: Path) -> None:
    make(tmp_path)
    assert read_checkpoint(tmp_path / "step_00000002").document["step"] == 2
    with pytest.raises(Damaged, match="manifest"):
        read_checkpoint(tmp_path / "step_00000007")
