"""`--dry-run` predicts what a run then shows on the same machine, and leaves nothing behind."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest

import train.main
import train.rehearsal
from tests.runs import run
from train.rehearsal import Forecast, Pace, Repeated, duration

FLAGS = (
    "--method moco-v2 --loader synthetic --arch resnet10-w16 --image-size 32 --global-batch 16 --queue-size 64 "
    "--hidden-dim 16 --dim 8 --bn.group-size 8 --holdout 0 --device cpu --no-report --log-every 10"
).split()
SPEED = re.compile(r"^speed: ([\d.,]+) images/s", re.MULTILINE)
TIME = re.compile(r"^time: (\d+):(\d\d):(\d\d), done at", re.MULTILINE)


def predicted(said: str) -> tuple[float, float]:
    """Images per second and seconds that a dry run names."""
    speed, ends = SPEED.search(said), TIME.search(said)
    assert speed and ends, said
    hours, minutes, seconds = map(int, ends.groups())
    return float(speed[1].replace(",", "")), 3600 * hours + 60 * minutes + seconds


def shown(run_dir: Path) -> float:
    """Images per second of a run, over all of its rows: what its steps took, evaluations and saving left out."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    speeds = [row["images_per_s"] for row in rows if row["kind"] == "train"]
    return len(speeds) / sum(1 / speed for speed in speeds)


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second of steps is enough where a test does not look at digits."""
    monkeypatch.setattr(train.rehearsal, "LEAST_S", 0.3)
    monkeypatch.setattr(train.rehearsal, "MOST_S", 2.0)


def test_it_says_what_a_run_then_shows(short: None, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run_dir = tmp_path / "deep" / "run"
    flags = [*FLAGS, "--data", "160", "--val-data", "40", "--max-steps", "25", "--run-dir", str(run_dir)]
    flags += ["--checkpoint-every", "10", "--knn-every", "1", "--epochs", "4"]
    assert train.main.main([*flags, "--dry-run"]) == 0
    said = capfd.readouterr().out
    assert "steps: 10 an epoch of 160 images, 25 in all" in said
    # At the start, after the first and the second epoch, and at the end; at steps 10, 20 and 25.
    assert re.search(r"evaluations 4 x [\d.]+ s, checkpoints 3 x [\d.]+ s", said)
    assert re.search(r"^memory: [\d.]+ [MG]B of host memory at the peak", said, re.MULTILINE)
    assert re.search(
        r"^disk: checkpoints of [\d.]+ MB, [\d.]+ MB more are needed at .*, [\d.]+ GB are free", said, re.M
    )
    assert list(tmp_path.iterdir()) == []
    speed, seconds = predicted(said)
    begun = time.monotonic()
    assert train.main.main(flags) == 0
    took = time.monotonic() - begun
    # Other work on the machine may slow either by this much.
    assert 1 / 5 < shown(run_dir) / speed < 5
    assert took / 5 - 2 < seconds < 5 * took + 2


@pytest.mark.slow
def test_within_fifteen_percent(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """On a quiet machine; one of three tries must do, since other work comes and goes."""
    tried = []
    for attempt in range(3):
        run_dir = tmp_path / str(attempt)
        flags = [*FLAGS, "--data", "3200", "--val-data", "400", "--epochs", "4", "--knn-every", "2"]
        flags += ["--checkpoint-every", "100", "--run-dir", str(run_dir)]
        assert train.main.main([*flags, "--dry-run"]) == 0
        speed, seconds = predicted(capfd.readouterr().out)
        begun = time.monotonic()
        assert train.main.main(flags) == 0
        tried.append((speed / shown(run_dir), seconds / (time.monotonic() - begun)))
        if all(abs(ratio - 1) <= 0.15 for ratio in tried[-1]):
            return
    pytest.fail(f"predicted over shown, images per second and seconds: {tried}")


def test_a_run_that_goes_on_is_told_what_is_left(
    short: None, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    flags = [*FLAGS, "--data", "64", "--run-dir", str(tmp_path / "run"), "--knn-every", "0"]
    assert train.main.main([*flags, "--epochs", "3", "--max-steps", "5"]) == 0
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    capfd.readouterr()
    assert train.main.main([*flags, "--epochs", "3", "--dry-run"]) == 0
    said = capfd.readouterr().out
    assert "12 in all, 7 left" in said and "evaluations 1 x" in said
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}


def test_data_that_do_not_fit_are_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    flags = [*FLAGS, "--dry-run", "--run-dir", str(tmp_path / "run")]
    assert train.main.main([*flags, "--data", "8"]) == 2
    assert "8 images to train on are fewer than --global-batch 16" in capfd.readouterr().err
    flags[flags.index("synthetic")] = "folder"
    assert train.main.main([*flags, "--data", str(tmp_path / "nowhere")]) == 2
    assert "nowhere" in capfd.readouterr().err


def test_a_place_that_cannot_be_written_is_refused(
    short: None, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    flags = [*FLAGS, "--data", "64", "--dry-run", "--run-dir", str(tmp_path / "file" / "run")]
    assert train.main.main(flags) == 2
    assert "--run-dir" in capfd.readouterr().err


def test_two_processes_agree_on_one_forecast(tmp_path: Path) -> None:
    log = tmp_path / "log"
    argv = [*FLAGS, "--data", "64", "--run-dir", str(tmp_path / "run"), "--dry-run"]
    assert run(argv, 2, log) == [0, 0]
    said = log.read_text()
    assert len(SPEED.findall(said)) == 1 and "of the time waiting" in said and not (tmp_path / "run").exists()


def test_the_finish_is_the_sum_of_its_parts() -> None:
    forecast = Forecast(
        run_dir="runs/a",
        images=1600,
        global_batch=16,
        steps_per_epoch=100,
        first_step=100,
        last_step=1100,
        pace=Pace(0.1, 20, 0.25, 3.0),
        start_s=7.0,
        evaluations=Repeated(3, 10.0),
        checkpoints=Repeated(2, 5.0),
        host_bytes=[2_000_000_000, 3_000_000_000],
        device_bytes=[20_000_000_000, 20_100_000_000],
        device_total=80_000_000_000,
        checkpoint_bytes=500_000_000,
        disk_needed=2_500_000_000,
        disk_free=9_000_000_000,
    )
    assert forecast.images_per_s == pytest.approx(160) and forecast.seconds == pytest.approx(100 + 7 + 3 + 30 + 10)
    said = forecast.text()
    assert "1,100 in all, 1,000 left" in said and "speed: 160 images/s (20 steps" in said
    assert "2 GB to 3 GB of host memory and 20.1 GB of 80 GB of GPU memory" in said
    assert "checkpoints of 500 MB, 2.5 GB more are needed at runs/a, 9 GB are free" in said and "time: 0:02:30" in said


def test_a_speed_that_still_falls_is_measured_on() -> None:
    """The first windows live on what the loader had prepared."""
    steady = train.rehearsal._is_steady
    assert not steady([(10, 3.0)]) and not steady([(10, 2.0), (10, 4.0)])
    assert not steady([(10, 1.0), (10, 1.0)])  # equal, but too short
    assert steady([(10, 3.0), (10, 3.1)]) and steady([(1, 70.0)])


def test_durations() -> None:
    assert duration(7509.4) == "2:05:09" and duration(90000) == "1 day, 1:00:00"
