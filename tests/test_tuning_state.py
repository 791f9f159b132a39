"""Exact resumption of fine-tuning: equal bytes, damaged and foreign checkpoints, two ranks."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

import train.eval.linear
import train.eval.semi
from train.backbone_io import build_encoder, save_backbone
from train.errors import CheckpointFailed, Stopped, UserMistake
from train.eval.tuning import TuningCheckpoints, fingerprint, seed_step, state_folder
from train.evaluate import main
from train.runtime import Runtime
from train.state import TuningState, to_files

SETTINGS = {"lr": 0.1, "seed": 3, "crop": (8, 8)}
RUNTIME = Runtime(0, 1, torch.device("cpu"), torch.float32, False)


def network() -> nn.Module:
    torch.manual_seed(1)
    layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(4, 2, 1))
    return layers.to(memory_format=torch.channels_last)


def fresh(kind: str) -> TuningState:
    model = network()
    groups = [{"params": list(model[:2].parameters()), "lr": 0.1}, {"params": list(model[2:].parameters()), "lr": 0.5}]
    optimizer = torch.optim.SGD(groups, momentum=0.9) if kind == "sgd" else torch.optim.AdamW(groups)
    return TuningState(model, optimizer)


def advance(state: TuningState, until: int, checkpoints: TuningCheckpoints | None = None) -> None:
    state.model.train()
    while state.step < until:
        seed_step(3, state.step, 0)
        images = torch.randn(4, 3, 8, 8)
        loss = F.cross_entropy(state.model(images), torch.randint(0, 2, (4, 6, 6)))
        state.optimizer.zero_grad()
        (loss if state.scaler is None else state.scaler.scale(loss)).backward()
        for group in state.optimizer.param_groups:
            group["lr"] *= 0.9
        if state.scaler is None:
            state.optimizer.step()
        else:
            state.scaler.step(state.optimizer)
            state.scaler.update()
        state.step += 1
        state.record.setdefault("losses", []).append(loss.item())
        if checkpoints is not None:
            checkpoints.save(state)


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_a_continued_run_has_the_bytes_of_one_never_stopped(tmp_path: Path, kind: str) -> None:
    whole = fresh(kind)
    advance(whole, 7)
    TuningCheckpoints(tmp_path / "whole", SETTINGS, RUNTIME).save(whole)

    checkpoints = TuningCheckpoints(tmp_path / "parts", SETTINGS, RUNTIME)
    advance(fresh(kind), 3, checkpoints)
    torch.rand(5)  # what else the process drew must not matter
    continued = fresh(kind)
    with torch.no_grad():
        continued.model[0].weight.zero_()
    assert checkpoints.restore(continued) and continued.step == 3
    names = [set(run.optimizer.state[run.model[0].weight]) for run in (continued, whole)]
    assert names[0] == names[1] != set()
    advance(continued, 7, checkpoints)
    assert continued.record == whole.record
    for name in ("model.safetensors", "optimizer.safetensors", "state.json"):
        folders = [tmp_path / part / "step_00000007" / name for part in ("whole", "parts")]
        assert folders[0].read_bytes() == folders[1].read_bytes(), name
    # two stay, and the first of them is whole as well
    assert sorted(p.name for p in (tmp_path / "parts").glob("step_*")) == ["step_00000006", "step_00000007"]


def _forget_weights(state: TuningState) -> None:
    state.model.load_state_dict(network().state_dict())


def _forget_statistics(state: TuningState) -> None:
    state.model[1].running_var.fill_(1.0)


def _forget_momentum(state: TuningState) -> None:
    state.optimizer.state.clear()


def _forget_rates(state: TuningState) -> None:
    for group in state.optimizer.param_groups:
        group["lr"] = 0.1


def _forget_step(state: TuningState) -> None:
    state.step -= 1


def _forget_record(state: TuningState) -> None:
    state.record = {}


def _forget_scale(state: TuningState) -> None:
    state.scaler = _scaler()


def _scaler() -> torch.amp.GradScaler:
    """It doubles every second step."""
    return torch.amp.GradScaler("cpu", init_scale=2.0, growth_interval=2)


PIECES = (
    _forget_weights,
    _forget_statistics,
    _forget_momentum,
    _forget_rates,
    _forget_step,
    _forget_record,
    _forget_scale,
)


@pytest.mark.parametrize("forget", [lambda state: None, *PIECES])
def test_without_any_piece_of_its_state_a_run_ends_differently(tmp_path: Path, forget: Callable) -> None:
    ends = []
    for stop in (None, 3):
        state = fresh("sgd")
        state.scaler = _scaler()
        checkpoints = TuningCheckpoints(tmp_path / str(stop), SETTINGS, RUNTIME)
        if stop is not None:
            advance(state, stop, checkpoints)
            state = fresh("sgd")
            state.scaler = _scaler()
            assert checkpoints.restore(state)
            forget(state)
        advance(state, 6)
        ends.append(to_files(state, [None], {}))
    assert (ends[0] == ends[1]) == (forget not in PIECES)


def test_the_newest_whole_checkpoint_is_taken(tmp_path: Path) -> None:
    checkpoints = TuningCheckpoints(tmp_path, SETTINGS, RUNTIME)
    assert not checkpoints.restore(fresh("sgd"))
    advance(fresh("sgd"), 4, checkpoints)
    newest = tmp_path / "step_00000004" / "optimizer.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    state = fresh("sgd")
    assert checkpoints.restore(state) and state.step == 3
    (tmp_path / "step_00000003" / "state.json").unlink()
    with pytest.raises(UserMistake, match="no checkpoint under .* is whole"):
        checkpoints.restore(state)
    never = TuningCheckpoints(tmp_path, SETTINGS, RUNTIME, resume=False)
    again = fresh("sgd")
    assert not never.restore(again)
    advance(again, 1, never)
    # another history's later steps must not be taken for newer ones
    assert [p.name for p in tmp_path.glob("step_*")] == ["step_00000001"]


def test_other_settings_and_networks_are_refused(tmp_path: Path) -> None:
    advance(fresh("sgd"), 1, TuningCheckpoints(tmp_path, SETTINGS, RUNTIME))
    state = fresh("sgd")
    before = {name: value.clone() for name, value in state.model.state_dict().items()}
    other = TuningCheckpoints(tmp_path, {**SETTINGS, "lr": 0.2, "more": True}, RUNTIME)
    with pytest.raises(UserMistake, match=r"settings \(lr: 0.1 -> 0.2; more: None -> True\); choose another --output"):
        other.restore(state)
    assert all(torch.equal(value, before[name]) for name, value in state.model.state_dict().items())
    wider = TuningState(nn.Conv2d(3, 4, 3), state.optimizer)
    with pytest.raises(UserMistake, match="another model"):
        TuningCheckpoints(tmp_path, SETTINGS, RUNTIME).restore(wider)


class Asked:
    asked = "SIGTERM"


def test_a_signal_saves_and_a_failed_write_is_told(tmp_path: Path) -> None:
    checkpoints = TuningCheckpoints(tmp_path / "runs", SETTINGS, RUNTIME)
    state = fresh("sgd")
    advance(state, 2)
    with pytest.raises(Stopped, match="stopped by SIGTERM after step 2, saved") as end:
        checkpoints.save_if_stopped(state, Asked())  # type: ignore[arg-type]
    assert end.value.code == 75
    assert json.loads((tmp_path / "runs" / "step_00000002" / "state.json").read_text())["settings"]["crop"] == [8, 8]
    saved = load_file(tmp_path / "runs" / "step_00000002" / "model.safetensors")
    assert torch.equal(saved["0.weight"], state.model[0].weight)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointFailed, match="could not be written"):
        TuningCheckpoints(tmp_path / "file", SETTINGS, RUNTIME).save(state)


def test_a_signal_does_not_save_a_step_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = TuningCheckpoints(tmp_path, SETTINGS, RUNTIME)
    state = fresh("sgd")
    advance(state, 2, checkpoints)
    monkeypatch.setattr("train.checkpoint.write_checkpoint", None)
    with pytest.raises(Stopped):
        checkpoints.save_if_stopped(state, Asked())  # type: ignore[arg-type]


def test_fingerprints_follow_the_values_and_steps_have_their_own_draws() -> None:
    model = network()
    first = fingerprint(model)
    assert first == fingerprint(network()) and len(first) == 64
    assert first == fingerprint(network().to(memory_format=torch.contiguous_format))
    with torch.no_grad():
        model[0].weight[0, 0, 0, 0] += 1e-6
    assert fingerprint(model) != first
    draws = set()
    for address in [(3, 0, 0), (3, 1, 0), (3, 0, 1), (4, 0, 0)]:
        seed_step(*address)
        draws.add(torch.rand(1).item())
    assert len(draws) == 4
    assert state_folder(Path("a.b/eval-segment.json")) == Path("a.b/eval-segment.state")


# ---------------------------------------------------------------------------------------------------------------------
# Classification protocols


class Killed(Exception):
    pass


class Killer:
    """Lets the first `saves` checkpoints be written, then dies as a process would."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, saves: int) -> None:
        original = TuningCheckpoints.save

        def save(checkpoints: TuningCheckpoints, state: TuningState) -> None:
            nonlocal saves
            original(checkpoints, state)
            saves -= 1
            if saves == 0:
                raise Killed

        monkeypatch.setattr(TuningCheckpoints, "save", save)


def outcome(result: Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    """What a run says and the bytes of its last state."""
    document = json.loads(result.read_text())
    for name in ("seconds", "settings", "versions", "list"):
        document.pop(name, None)
    newest = max(state_folder(result).glob("step_*"))
    return document, {path.name: path.read_bytes() for path in newest.iterdir()}


FLAGS = {
    "linear": ["--recipe", "moby", "--lrs", "0.1,1", "--head-bn", "yes", "--epochs", "3", "--global-batch", "16"],
    "fewshot": ["--recipe", "simsiam", "--fraction", "0.5", "--epochs", "3", "--global-batch", "8"],
    "semi": ["--fraction", "0.5", "--epochs", "3", "--global-batch", "8", "--eval-every", "1"],
}


@pytest.mark.parametrize("protocol", FLAGS)
def test_a_stopped_protocol_goes_on_exactly(protocol: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    save_backbone(build_encoder("resnet18"), tmp_path / "r18.safetensors", arch="resnet18")
    command = [
        protocol,
        "--checkpoint",
        str(tmp_path / "r18.safetensors"),
        "--loader",
        "synthetic",
        "--data",
        "32",
        "--val-data",
        "16",
        "--image-size",
        "32",
        *FLAGS[protocol],
    ]
    whole, parts = tmp_path / "whole.json", tmp_path / "parts.json"
    with monkeypatch.context() as patch:
        for module in (train.eval.linear, train.eval.semi):
            patch.setattr(module, "discard_state", lambda result, runtime: None)
        assert main([*command, "--output", str(whole)]) == 0
        with patch.context() as inner:
            Killer(inner, 2)
            with pytest.raises(Killed):
                main([*command, "--output", str(parts)])
        assert not parts.exists() and state_folder(parts).is_dir()
        steps = json.loads((max(state_folder(parts).glob("step_*")) / "state.json").read_text())["step"]
        assert main([*command, "--output", str(parts)]) == 0
        assert outcome(whole) == outcome(parts)
        assert steps * 3 == 2 * json.loads((max(state_folder(whole).glob("step_*")) / "state.json").read_text())["step"]
    # without what it left off at, the end would be another: so the comparison above can fail
    shutil.rmtree(state_folder(parts))
    with monkeypatch.context() as patch:
        Killer(patch, 2)
        with pytest.raises(Killed):
            main([*command, "--output", str(parts)])
    assert main([*command, "--output", str(parts), "--seed", "1"]) == 2
    assert main([*command, "--output", str(parts), "--resume", "never"]) == 0
    assert not state_folder(parts).exists(), "a finished run leaves its result alone"
