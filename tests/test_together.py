"""A rank that leaves, is killed or stands still ends the whole job soon, and the job says which rank it was."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import HashStore

from tests.runs import TINY, comparable, finish, last_wins, rows, run, start
from train import together
from train.errors import EXIT_CHECKPOINT, EXIT_HUNG, RunEnd, UserMistake
from train.together import Together

ROOT = Path(__file__).resolve().parents[1]


def argv(run_dir: Path, steps: int, *more: str) -> list[str]:
    return last_wins(["--method", "moco-v2", "--run-dir", str(run_dir), "--max-steps", str(steps), *TINY, *more])


def wait_for_row(run_dir: Path, kind: str) -> None:
    deadline = time.monotonic() + 120
    while not ((run_dir / "metrics.jsonl").exists() and rows(run_dir, kind)):
        assert time.monotonic() < deadline, f"no row of kind {kind}"
        time.sleep(0.1)


def test_a_rank_that_leaves_alone_ends_the_others_with_its_words(tmp_path: Path) -> None:
    """Rank 0 alone writes config.json: when it cannot, the other rank learns why, and at once."""
    (tmp_path / "run" / "config.json").mkdir(parents=True)
    (tmp_path / "run" / "config.json" / "in the way").touch()
    log, started = tmp_path / "log", time.monotonic()
    # On one machine only the first of the two says it, and either may be first.
    codes = run(argv(tmp_path / "run", 2), world_size=2, log=log, apart=True)
    assert codes == [EXIT_CHECKPOINT, EXIT_CHECKPOINT]
    assert time.monotonic() - started < 120
    assert "rank 0 ended the run: config.json could not be written" in log.read_text()
    assert "regatta: config.json could not be written" in log.read_text()


@pytest.mark.parametrize("culprit", [0, 1])
@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
def test_a_rank_that_stands_still_or_dies_is_named(tmp_path: Path, culprit: int, number: signal.Signals) -> None:
    """Rank 0 keeps the store through which the ranks talk, which then stands still with it."""
    log = tmp_path / "log"
    long = ("--epochs", "1000", "--hang-timeout", "6", "--log-every", "1")
    processes = start(argv(tmp_path / "run", 10000, *long), 2, log)
    wait_for_row(tmp_path / "run", "train")
    os.kill(processes[culprit].pid, number)
    processes[1 - culprit].join(60)
    code = processes[1 - culprit].exitcode
    finish(processes, 1)  # kills the one that stands still
    said = log.read_text()
    if number == signal.SIGSTOP:
        assert code == EXIT_HUNG, said[-2000:]
        assert "no progress for" in said and f"rank {culprit} gives no sign of life" in said
    else:
        assert code == 1, said[-2000:]
        assert f"regatta: rank {culprit} ended the run: it has gone without a word" in said


def test_words_that_were_heard_outlast_the_store() -> None:
    """The rank that spoke leaves with its store; what the others then lose is their connection, not its reason."""
    store = HashStore()
    first, second = (Together(Shared(store), rank, 2, limit_s=0, leave=lambda code: None) for rank in range(2))
    first.end(UserMistake("no room"))
    second._store = Gone()
    with pytest.raises(RunEnd, match="rank 0 ended the run: no room") as end:
        second.end(RuntimeError("connection closed by peer"))
    assert end.value.code == UserMistake.code
    first.close(), second.close()


def test_the_clock_does_not_run_while_a_rank_tells_why_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen with a killed rank, which hears nothing: the one that waited for it to hear ended as one that hangs."""
    monkeypatch.setattr(together, "_LINGER_S", 4.0)
    codes: list[int] = []
    ending = Together(Shared(HashStore()), 0, 2, limit_s=0.5, leave=codes.append)
    ending.at("takes step 1")
    ending.end(UserMistake("no room"))
    ending.close()
    assert codes == []


def test_a_rank_that_died_before_it_told_anything_is_gone() -> None:
    """Seen with steps so short that the first was taken before the first sign."""
    store = HashStore()
    alone = Together(Shared(store), 0, 3, limit_s=0, leave=lambda code: None)
    other = Together(Shared(store), 2, 3, limit_s=0, leave=lambda code: None)
    assert alone._gone() == [1]
    alone.close(), other.close()


class Shared:
    """A store in this process, with the one call of a networked store that it lacks."""

    def __init__(self, store: HashStore) -> None:
        self._inner = store

    def clone(self) -> Shared:
        return self

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


class Gone:
    def __getattr__(self, name: str) -> Any:
        raise RuntimeError("the store has gone")


def test_one_process_names_what_it_waits_for(capfd: pytest.CaptureFixture[str]) -> None:
    codes: list[int] = []
    together = Together(None, 0, 1, limit_s=1.0, leave=codes.append)
    time.sleep(1.7)
    assert not codes, "the limit begins with the first note of progress"
    for step in range(4):
        together.at(f"waits for the data of step {step}")
        time.sleep(0.5)
    assert not codes
    time.sleep(2.0)
    assert codes == [EXIT_HUNG]
    assert "rank 0 waits for the data of step 3" in capfd.readouterr().err
    together.close()


@pytest.mark.slow
def test_torchrun_starts_the_ranks_again_and_nothing_is_left(tmp_path: Path) -> None:
    """A killed rank ends the other; torchrun starts both again, and they go on from the checkpoint to the same end."""
    shared = set(os.listdir("/dev/shm"))
    whole, struck = tmp_path / "whole", tmp_path / "struck"
    assert run(argv(whole, 30), 2) == [0, 0]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    with (tmp_path / "log").open("w") as log:
        launcher = subprocess.Popen(
            [*command, str(ROOT / "train" / "main.py"), *argv(struck, 30)], env=environment, stdout=log, stderr=log
        )
        wait_for_row(struck, "checkpoint")
        first = ranks_of(launcher.pid)
        os.kill(first[1], signal.SIGKILL)
        assert launcher.wait(300) == 0, (tmp_path / "log").read_text()[-2000:]
    assert len(rows(struck, "resume")) == 1 and comparable(struck) == comparable(whole)
    assert not [pid for pid in first if Path(f"/proc/{pid}").exists()]
    assert set(os.listdir("/dev/shm")) <= shared


def ranks_of(launcher: int) -> list[int]:
    """Process numbers of the ranks that a launcher has started, in the order of their numbers."""
    return [int(pid) for pid in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()]
