"""Checkpoints in the form that earlier versions wrote go on bit for bit."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.runs import run
from tests.test_resume import argv, assert_same, cut_back
from tests.test_tuning_state import RUNTIME, SETTINGS, advance, fresh
from train.eval.tuning import TuningCheckpoints

TRAIN_KEYS = "step optimizer scaler host_state sum_steps non_finite metrics_bytes config sums".split()
TUNING_KEYS = "step settings record optimizer scaler".split()


def rewrite_as_before(folder: Path, keys: list[str]) -> None:
    """Write a checkpoint anew with exactly the files, keys and manifest that version 0.1 wrote, and nothing more."""
    document = json.loads((folder / "state.json").read_text())
    document = {key: document[key] for key in keys}
    document["optimizer"] = {key: document["optimizer"][key] for key in ("state", "param_groups")}
    for name in ("model.safetensors", "optimizer.safetensors"):
        save_file(load_file(folder / name), folder / name)
    (folder / "state.json").write_text(json.dumps(document, indent=1))
    (folder / "manifest.json").unlink()
    hashes = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}
    (folder / "manifest.json").write_text(json.dumps({"files": hashes}, indent=1))


def test_a_training_run_of_before_goes_on(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run(argv(whole)) == [0]
    assert run(argv(parts, steps=4)) == [0]
    cut_back(parts)
    rewrite_as_before(parts / "checkpoints" / "step_00000003", TRAIN_KEYS)
    assert run(argv(parts)) == [0]
    assert_same(whole, parts)


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_a_fine_tuning_run_of_before_goes_on(tmp_path: Path, kind: str) -> None:
    torch.set_num_threads(1)
    whole, parts = (TuningCheckpoints(tmp_path / name, SETTINGS, RUNTIME) for name in ("whole", "parts"))
    advance(fresh(kind), 5, whole)
    advance(fresh(kind), 3, parts)
    rewrite_as_before(tmp_path / "parts" / "step_00000003", TUNING_KEYS)
    state = fresh(kind)
    assert parts.restore(state) and state.step == 3
    advance(state, 5, parts)
    for name in ("model.safetensors", "optimizer.safetensors", "state.json"):
        left, right = (tmp_path / part / "step_00000005" / name for part in ("whole", "parts"))
        assert left.read_bytes() == right.read_bytes(), name
