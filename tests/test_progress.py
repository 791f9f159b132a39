"""Lines of a log that is no terminal say how far the run is."""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path

import pytest

from train.record.metrics import Metrics


def test_a_line_of_a_log_has_share_time_left_and_clock(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = Metrics(tmp_path, 40, first_step=10)
    metrics._start = time.monotonic() - 10.0  # ten steps took ten seconds, so the twenty that are left take twenty
    metrics._last_console = -100.0
    metrics.row("train", 20, 2, loss=1.0, images_per_s=5.0)
    metrics.close()
    assert re.search(
        r"\[train\] step 20 epoch 2 \(50%, 0:00:[23]\d left at \d\d:\d\d:\d\d\) loss 1 ", capsys.readouterr().err
    )


def test_the_bar_of_a_terminal_moves_at_each_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    metrics = Metrics(tmp_path, 8, steps_per_epoch=4, global_batch=16)
    for step in range(1, 7):
        time.sleep(0.11)  # drawn ten times a second at most
        metrics.at_step(step)
    metrics.row("train", 6, 1, loss=1.25, images_per_s=5.0)
    metrics.at_step(7)
    metrics.close()
    drawn = capsys.readouterr().err
    # No row has come yet: share, epoch, images and their rate are there all the same.
    assert re.search(r"epoch 1/2: +25%\S* +\| 32/128 \[", drawn) and re.search(r"epoch 2/2: +62%", drawn)
    assert " images/s" in drawn and "loss 1.250" in drawn


def test_a_step_costs_the_bar_next_to_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    metrics = Metrics(tmp_path, 20_000, steps_per_epoch=100, global_batch=16)
    begun = time.process_time()
    for step in range(20_000):
        metrics.at_step(step)
    assert (time.process_time() - begun) / 20_000 < 100e-6
    metrics.close()
