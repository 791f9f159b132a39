"""Lines of a log that is no terminal say how far the run is."""

from __future__ import annotations

import re
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
