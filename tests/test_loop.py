"""What the loop does when a loss is not finite."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import train.inputs
import train.main
from tests.runs import TINY, rows
from train.errors import EXIT_NON_FINITE
from train.loop import PATIENCE


def argv(run_dir: Path, steps: int, *more: str) -> list[str]:
    return ["--method", "regioncl-m", "--run-dir", str(run_dir), "--max-steps", str(steps), *TINY, *more]


def test_one_bad_batch_is_skipped_and_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    build = train.inputs.InputBuilder.build

    def poisoned(self, batch, epoch, step):
        inputs = build(self, batch, epoch, step)
        if step == 4:
            inputs[0].view1[0, 0, 0, 0] = torch.nan
        return inputs

    monkeypatch.setattr(train.inputs.InputBuilder, "build", poisoned)
    assert train.main.main(argv(tmp_path / "run", 8)) == 0
    assert [row["step"] for row in rows(tmp_path / "run", "skipped_step")] == [5]
    losses = [row["loss"] for row in rows(tmp_path / "run", "train")]
    assert len(losses) == 4 and all(loss == loss for loss in losses)
    # Every line is strict JSON, and the exported backbone took no harm from the batch.
    for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda text: pytest.fail(f"{text} is not JSON"))
    from safetensors.torch import load_file

    for name, tensor in load_file(tmp_path / "run" / "backbone.safetensors").items():
        assert torch.isfinite(tensor).all(), name


def test_a_run_that_stays_non_finite_gives_up(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    torch.set_num_threads(1)
    flags = ("--epochs", "20", "--optim.lr", "1e30", "--checkpoint-every", "500")
    code = train.main.main(argv(tmp_path / "run", 200, *flags))
    assert code == EXIT_NON_FINITE
    last = capfd.readouterr().err.strip().splitlines()[-1]
    assert f"{PATIENCE} steps in a row" in last and "--optim.lr" in last
    assert len(rows(tmp_path / "run", "skipped_step")) == PATIENCE
