"""Two commands that write one place at once: the second is refused in one line, a killed one is no obstacle."""

from __future__ import annotations

import errno
import fcntl
import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from pipeline import claim
from pipeline.claim import Claimed, claimed
from tests.faults.jobs import make_inputs
from tests.runs import TINY, last_wins
from tools import make_ffcv_dataset, make_webdataset
from train import evaluate, main


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claim, "WAIT_S", 0.3)
    monkeypatch.setattr(claim, "ELSEWHERE_S", 0.5)


def _hold(lock: Path, ready: Any) -> None:
    # A run in the process that this one was forked from may have left handlers that only note a signal.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with claimed(lock, "it"):
        ready.set()
        time.sleep(60)


@pytest.fixture
def hold() -> Iterator[Callable[[Path], BaseProcess]]:
    """Another process that has a claim and keeps it."""
    context, started = multiprocessing.get_context("fork"), []

    def start(lock: Path) -> BaseProcess:
        ready = context.Event()
        process = context.Process(target=_hold, args=(lock, ready))
        process.start()
        started.append(process)
        assert ready.wait(20)
        return process

    yield start
    for process in started:
        process.kill()
        process.join()


def test_the_second_is_refused_with_the_first_one_s_number(tmp_path: Path, hold) -> None:
    holder = hold(tmp_path / ".lock")
    with pytest.raises(
        Claimed, match=rf"^it is being written by process {holder.pid}; wait for it, stop it, or choose"
    ):
        with claimed(tmp_path / ".lock", "it"):
            pass


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_claim_ends_with_its_process(tmp_path: Path, hold, number: int) -> None:
    holder = hold(tmp_path / ".lock")
    os.kill(holder.pid, number)
    with claimed(tmp_path / ".lock", "it"):
        assert (tmp_path / ".lock").read_text().startswith(str(os.getpid()))
    assert not list(tmp_path.iterdir())


def test_what_a_holder_has_forked_does_not_keep_its_claim(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    with claimed(tmp_path / ".lock", "it"):
        child = context.Process(target=time.sleep, args=(30,))
        child.start()
    try:
        with claimed(tmp_path / ".lock", "it"):
            pass
    finally:
        child.kill()
        child.join()


def test_one_that_ends_meanwhile_is_waited_for(tmp_path: Path, hold, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claim, "WAIT_S", 20)
    holder = hold(tmp_path / ".lock")
    multiprocessing.get_context("fork").Process(target=_kill_later, args=(holder.pid,)).start()
    with claimed(tmp_path / ".lock", "it"):
        pass


def _kill_later(pid: int) -> None:
    time.sleep(0.4)
    os.kill(pid, signal.SIGKILL)


def test_one_of_another_machine_is_named_with_it(tmp_path: Path, hold, monkeypatch: pytest.MonkeyPatch) -> None:
    hold(tmp_path / ".lock")
    monkeypatch.setattr(socket, "gethostname", lambda: "here")
    with pytest.raises(Claimed, match=r"of .+; wait for it.*; where that machine is gone, remove .*\.lock"):
        with claimed(tmp_path / ".lock", "it"):
            pass
    (tmp_path / ".lock").unlink()
    with claimed(tmp_path / ".lock", "it"):
        pass


def test_a_disk_without_locks_claims_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with claimed(tmp_path / ".lock", "it"), claimed(tmp_path / ".lock", "it"):
        pass


def refused(capfd: pytest.CaptureFixture[str], code: int) -> str:
    said = capfd.readouterr().err.strip().splitlines()[-1]
    assert code == 2 and said.startswith("regatta: ") and "is being written by process" in said, said
    return said


def test_a_second_run_in_one_folder(tmp_path: Path, hold, capfd) -> None:
    (tmp_path / "run").mkdir()
    hold(tmp_path / "run" / ".lock")
    arguments = last_wins(["--method", "moco-v2", "--run-dir", str(tmp_path / "run"), "--max-steps", "1", *TINY])
    assert "--run-dir" in refused(capfd, main.main(arguments))
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [".lock"], "nothing of the first was touched"


def test_what_a_killed_run_left_of_its_backbone_goes_with_the_next(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    left = tmp_path / "run" / ".backbone.1-2.tmp.safetensors"
    left.touch()
    arguments = ["--method", "moco-v2", "--run-dir", str(tmp_path / "run"), "--max-steps", "1", *TINY]
    assert main.main(last_wins(arguments)) == 0
    assert (tmp_path / "run" / "backbone.safetensors").exists() and not left.exists()


def test_a_second_evaluation_of_one_result(tmp_path: Path, hold, capfd) -> None:
    make_inputs(tmp_path)
    hold(tmp_path / ".out.json.lock")
    arguments = "knn --loader synthetic --data 32 --val-data 16 --image-size 32 --device cpu --k 5".split()
    arguments += ["--checkpoint", str(tmp_path / "r18.safetensors"), "--output", str(tmp_path / "out.json")]
    assert "out.json" in refused(capfd, evaluate.main(arguments))


@pytest.mark.parametrize(
    ("packer", "name", "more", "lock"),
    [
        (make_ffcv_dataset, "photos.beton", [], ".photos.beton.lock"),
        (make_ffcv_dataset, "photos.beton", ["--part", "1/2"], ".photos-1-of-2.beton.lock"),
        (make_webdataset, "shards", [], ".shards.lock"),
        (make_webdataset, "shards", ["--part", "1/2"], "shards/.shard-1-of-2.lock"),
    ],
)
def test_a_second_packer_of_one_file(tmp_path: Path, hold, packer, name: str, more: list[str], lock: str) -> None:
    make_inputs(tmp_path)
    (tmp_path / lock).parent.mkdir(exist_ok=True)
    holder = hold(tmp_path / lock)
    arguments = [str(tmp_path / "images"), str(tmp_path / name), "--workers", "1", *more]
    with pytest.raises(Claimed, match="being written by process"):
        packer.main(arguments)
    holder.kill()
    holder.join()
    # A killed one leaves its file, which the next one takes over and removes.
    assert (tmp_path / lock).exists()
    assert packer.main(arguments) == 0
    assert not (tmp_path / lock).exists()
