"""The short form of `tests.faults.kills`: a few blows on one job of each kind, and that a difference is seen."""

from __future__ import annotations

import random
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.faults.jobs import jobs, make_inputs
from tests.faults.kills import Blow, Whole, attack, differences, run_whole, strike_until_whole
from tests.faults.traps import Trap
from train.eval.session import Session, _claimed_result
from train.record.run import read_results
from train.stop import STOP_SIGNALS, SignalWatch

JOBS = {job.name: job for job in jobs()}


@pytest.mark.parametrize("name", ["train moco-v2", "pack"])
def test_killed_commands_end_as_if_nothing_had_happened(name: str) -> None:
    assert attack([JOBS[name]], kills=2, seed=1).total() >= 2


@pytest.mark.slow
def test_every_job_outlasts_blows() -> None:
    assert attack(list(JOBS.values()), kills=60, seed=2).total() >= 60


def test_a_kill_between_the_last_checkpoint_and_the_export_is_mended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The blow that the long form found: the same command said that the run was complete and left an old backbone."""
    job = JOBS["train moco-v2"]
    make_inputs(tmp_path / "inputs")
    whole = run_whole(job, tmp_path, tmp_path / "inputs")
    # Changes are counted, so each of the last ones can be hit; the row of the last checkpoint is no change of a name.
    for number in range(whole.changes - 8, whole.changes + 1, 3):
        blow = Blow("late", trap=Trap("file", number))
        monkeypatch.setattr("tests.faults.kills.draw_blow", lambda *_, blow=blow: blow)
        hits = list(strike_until_whole(job, whole, tmp_path, tmp_path / "inputs", random.Random(0), 1))
        assert hits == ["late"], number


def test_a_killed_evaluation_leaves_no_second_result(tmp_path: Path) -> None:
    """The long form found it: the file that a killed process was about to rename stayed, and reports read it."""
    (tmp_path / ".result.1-2.tmp.json").write_text('{"protocol": "knn"}')
    assert not read_results(tmp_path.glob("*.json"))
    session = SimpleNamespace(runtime=SimpleNamespace(is_main=True), facts=dict)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("train.eval.session.result_path", lambda session: tmp_path / "result.json")
        with _claimed_result(session):  # type: ignore[arg-type]
            Session.write(session, {"protocol": "knn"})  # type: ignore[arg-type]
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]


def test_another_end_is_a_failure(tmp_path: Path) -> None:
    job = JOBS["export timm"]
    make_inputs(tmp_path / "inputs")
    whole = run_whole(job, tmp_path, tmp_path / "inputs")
    other = Whole({**whole.outcome, "timm.safetensors": "another digest"}, whole.seconds, whole.changes)
    with pytest.raises(AssertionError, match="the end differs .*another digest"):
        list(strike_until_whole(job, other, tmp_path, tmp_path / "inputs", random.Random(0), 0))
    assert differences({"a": [1, 2], "b": 1}, {"a": [1, 3]}) == ["/a/1: 2 -> 3", "/b: 1 -> None"]


@pytest.fixture
def handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("handlers")
def test_a_hangup_stops_a_run_unless_it_was_started_to_outlast_it() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # these tests may run under nohup themselves
    watch = SignalWatch()
    signal.raise_signal(signal.SIGHUP)
    assert watch.asked == "SIGHUP"
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    watch = SignalWatch()
    signal.raise_signal(signal.SIGHUP)
    assert not watch.asked
