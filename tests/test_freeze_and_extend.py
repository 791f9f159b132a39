"""Stages that stay as they are, and finished runs that go on."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from models.norm import running_buffers
from tests.method_cases import build
from tests.runs import TINY, last_wins, rows
from train.build import build_state
from train.main import main as train_main
from train.resolve import resolve
from train.runtime import start as start_runtime


def command(run_dir: Path, *changes: str) -> list[str]:
    given = ["--method", "regioncl-m", "--arch", "resnet10-w16", "--data", "24", "--image-size", "64", "--holdout", "0"]
    return last_wins([*TINY, *given, "--log-every", "1", "--run-dir", str(run_dir), *changes])


def tensors_under(state: dict[str, torch.Tensor], *stages: str) -> dict[str, torch.Tensor]:
    return {name: value for name, value in state.items() if name.startswith(stages)}


def test_frozen_stages_keep_every_bit(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    stages = ("conv1.", "bn1.", "layer1.")
    free, frozen = tmp_path / "free", tmp_path / "frozen"
    assert train_main(command(free, "--epochs", "1")) == 0
    assert train_main(command(frozen, "--epochs", "1", "--init", str(free), "--freeze", "conv1,bn1,layer1")) == 0
    assert "frozen: conv1, bn1, layer1 (" in capfd.readouterr().out
    before, after = load_file(free / "backbone.safetensors"), load_file(frozen / "backbone.safetensors")
    for name in before:
        # Running statistics as well; the rest moves, or the test would show nothing.
        kept = name.startswith(stages)
        assert torch.equal(before[name], after[name]) == kept or "num_batches" in name, name
    newest = frozen / "checkpoints" / (frozen / "checkpoints" / "latest").read_text()
    model = load_file(newest / "model.safetensors")
    for name, value in tensors_under(model, "momentum_encoder.layer1.").items():
        assert torch.equal(value, model[name.removeprefix("momentum_")]), name


def test_frozen_parts_are_not_in_the_optimizer_and_their_norms_stay_in_eval_mode(tmp_path: Path) -> None:
    config = resolve(command(tmp_path / "run"))
    method = build("regioncl-m")
    everything = len(running_buffers(method))
    method.freeze(["bn1", "layer1"])
    with start_runtime(dataclasses.replace(config.run, device="cpu")) as runtime:
        state = build_state(config, runtime, method)
    held = {id(p) for group in state.optimizer.param_groups for p in group["params"]}
    for name, parameter in method.encoder.named_parameters():
        assert (id(parameter) in held) == (not name.startswith(("bn1.", "layer1."))), name
    for mode in (True, False, True):
        method.train(mode)
    for trunk in (method.encoder, method.momentum_encoder):
        assert isinstance(trunk, nn.Module) and trunk.training and not trunk.layer1.training
        assert not trunk.bn1.training and trunk.layer2.training  # type: ignore[union-attr]
    assert len(running_buffers(method)) < everything


def test_what_cannot_be_frozen_is_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    every = "conv1,bn1,layer1,layer2,layer3,layer4"
    for stages, message in (("layer9", "choose from conv1, bn1"), (every, "leaves nothing of the backbone to train")):
        assert train_main(command(tmp_path / "run", "--freeze", stages)) == 2
        said = capfd.readouterr().err
        assert said.count("\n") == 1 and message in said


def test_a_finished_run_goes_on_with_the_schedule_of_the_new_length(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    short, long = tmp_path / "short", tmp_path / "long"
    assert train_main(command(short, "--epochs", "2")) == 0
    assert train_main(command(long, "--epochs", "4")) == 0
    first = load_file(short / "backbone.safetensors")
    capfd.readouterr()
    assert train_main(command(short, "--epochs", "4")) == 0
    said = capfd.readouterr().out
    assert "finished after 2 epochs, goes on to 4: from step 6 on" in said and "not that of 4 epochs at once" in said
    taken = [row for row in rows(short, "train")]
    assert [row["step"] for row in taken] == list(range(1, 13))
    rates = {row["step"]: (row["lr"], row["ema_momentum"]) for row in rows(long, "train")}
    assert all((row["lr"], row["ema_momentum"]) == rates[row["step"]] for row in taken[6:])
    assert taken[5]["lr"] != rates[6][0]
    assert any(not torch.equal(first[name], value) for name, value in load_file(short / "backbone.safetensors").items())
    # Once longer, it is complete without being told so again, and no shorter one.
    assert train_main(command(short, "--epochs", "4")) == 0
    assert "is complete at step 12; a larger --epochs goes on from there" in capfd.readouterr().out
    assert train_main(command(short, "--epochs", "2")) == 2


def test_a_run_that_is_not_finished_keeps_its_length(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run_dir = tmp_path / "run"
    assert train_main(command(run_dir, "--epochs", "2", "--max-steps", "4")) == 0
    capfd.readouterr()
    assert train_main(command(run_dir, "--epochs", "3")) == 2
    said = capfd.readouterr().err
    assert said.count("\n") == 1 and "at step 4 of 6" in said and "finish it with --epochs 2 first" in said
    assert train_main(command(run_dir, "--epochs", "2")) == 0
