"""Checkpoints of other projects, as they publish them: recognised, matched completely, and never executed."""

from __future__ import annotations

import argparse
import collections
import os
import pathlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor, nn

from tools.export_backbone import main as export_main
from train.backbone_io import build_encoder, load
from train.errors import UserMistake
from train.main import main as train_main

State = dict[str, Tensor]
RAN = Path(__file__).with_name("it_ran")


def resnet(seed: int = 0) -> State:
    """A narrow ResNet with torchvision's names."""
    torch.manual_seed(seed)
    return dict(build_encoder("resnet10-w16").state_dict())


def under(prefix: str, state: State) -> State:
    return {f"{prefix}{name}": value for name, value in state.items()}


def head(prefix: str) -> State:
    return {f"{prefix}0.weight": torch.randn(8, 512), f"{prefix}0.bias": torch.randn(8)}


def lightly(state: State) -> State:
    """lightly's backbone: a Sequential of torchvision's children without the classifier."""
    places = {"conv1": "0", "bn1": "1", "layer1": "4", "layer2": "5", "layer3": "6", "layer4": "7"}
    return {f"{places[name.split('.')[0]]}.{name.partition('.')[2]}": value for name, value in state.items()}


# Layout by layout, as `torch.save` got it: the wanted backbone is of seed 0, the momentum one of seed 1.
def documents() -> dict[str, tuple[dict[str, Any], str]]:
    online, momentum = resnet(0), resnet(1)
    queue = {"module.queue": torch.randn(128, 64), "module.queue_ptr": torch.zeros(1, dtype=torch.long)}
    moco = {**under("module.encoder_q.", online), **under("module.encoder_k.", momentum), **queue}
    lewel = {**under("module.online_net.backbone.", online), **under("module.target_net.backbone.", momentum)}
    return {
        "moco-v1": (
            {
                "epoch": 200,
                "arch": "resnet50",
                "state_dict": {**moco, "module.encoder_q.fc.weight": torch.randn(8, 512)},
            },
            "MoCo",
        ),
        "moco-v2": (
            {"arch": "resnet50", "state_dict": {**moco, **head("module.encoder_q.fc.")}, "optimizer": {}},
            "MoCo",
        ),
        "moco-v3": (
            {
                "state_dict": {
                    **under("module.base_encoder.", online),
                    **head("module.base_encoder.fc."),
                    **under("module.momentum_encoder.", momentum),
                    **head("module.predictor."),
                },
                "scaler": {},
            },
            "MoCo v3",
        ),
        "simsiam": (
            {
                "state_dict": {
                    **under("module.encoder.", online),
                    **head("module.encoder.fc."),
                    **head("module.predictor."),
                }
            },
            "SimSiam",
        ),
        "densecl-training": (
            {
                "meta": {"time": "now"},
                "state_dict": {
                    **under("encoder_q.0.", online),
                    **head("encoder_q.1.mlp."),
                    **under("backbone.", online),
                    **under("encoder_k.0.", momentum),
                    "queue": torch.randn(8, 8),
                    "queue2": torch.randn(8, 8),
                },
            },
            "OpenSelfSup",
        ),
        "densecl-extracted": ({"state_dict": online, "author": "them"}, ""),
        "byol-openselfsup": (
            {"state_dict": {**under("online_net.0.", online), **under("target_net.0.", momentum)}},
            "OpenSelfSup",
        ),
        "byol-converted": ({"online_backbone": online, "target_backbone": momentum, "step": 3}, "BYOL"),
        "care": (
            {
                "model": {
                    **under("module.student_encoder.", online),
                    **head("module.student_encoder.fc1."),
                    **head("module.student_encoder.trans."),
                    **under("module.teacher_encoder.", momentum),
                }
            },
            "CARE",
        ),
        "lewel": ({"state_dict": {**lewel, **head("module.online_net.neck.proj.mlp.")}, "epoch": 1}, "LEWEL"),
        "lightning": (
            {
                "pytorch-lightning_version": "2.0",
                "hyper_parameters": {"lr": 0.1},
                "state_dict": {**under("model.", online), "criterion.centre": torch.zeros(3)},
            },
            "Lightning",
        ),
        "lightly": (
            {
                "state_dict": {
                    **under("backbone.", lightly(online)),
                    **under("backbone_momentum.", lightly(momentum)),
                    **head("projection_head.layers."),
                }
            },
            "lightly",
        ),
        "solo-learn": (
            {
                "state_dict": {
                    **under("backbone.", online),
                    **under("momentum_backbone.", momentum),
                    **head("classifier."),
                    **head("projector."),
                    "queue": torch.randn(2, 8, 8),
                }
            },
            "solo-learn",
        ),
    }


@pytest.mark.parametrize("layout", documents())
def test_each_layout_gives_the_trained_backbone_whole(tmp_path: Path, layout: str) -> None:
    document, family = documents()[layout]
    torch.save(document, tmp_path / "theirs.pth.tar")
    said: list[str] = []
    loaded = load(tmp_path / "theirs.pth.tar", say=said.append)
    assert loaded.arch == "resnet10-w16" and family in loaded.report.family and family in said[0]
    for name, value in resnet(0).items():
        assert torch.equal(loaded.encoder.state_dict()[name], value), name


@pytest.mark.parametrize("layout", ["moco-v2", "care", "lewel", "lightly"])
def test_a_tensor_too_few_or_too_many_is_refused(tmp_path: Path, layout: str) -> None:
    document, _ = documents()[layout]
    state = next(value for value in document.values() if isinstance(value, dict) and len(value) > 50)
    lost = next(
        name for name in state if name.endswith(("layer3.0.bn1.bias", "6.0.bn1.bias")) and "momentum" not in name
    )
    value = state.pop(lost)
    torch.save(document, tmp_path / "a.pth")
    with pytest.raises(UserMistake, match=r"missing: layer3\.0\.bn1\.bias"):
        load(tmp_path / "a.pth", "resnet10-w16")
    state[lost] = value
    state[lost.replace("bn1.bias", "extra")] = value
    torch.save(document, tmp_path / "b.pth")
    with pytest.raises(UserMistake, match=r"in the file but not in the backbone: layer3\.0\.extra"):
        load(tmp_path / "b.pth", "resnet10-w16")


def test_several_backbones_are_refused_by_name(tmp_path: Path) -> None:
    torch.save({**under("left.", resnet(0)), **under("right.", resnet(1))}, tmp_path / "two.pth")
    with pytest.raises(UserMistake, match=r"holds 2 backbones, left\.\*, right\.\*"):
        load(tmp_path / "two.pth")


def test_moco_v3_s_transformers(tmp_path: Path) -> None:
    """vit_base is timm's; vit_small has other heads, of which its tensors know nothing, and is our vit-s."""
    timm = pytest.importorskip("timm")
    small = timm.create_model("vit_small_patch16_224", num_classes=0, depth=1).state_dict()
    torch.save({"arch": "vit_small", "state_dict": under("module.base_encoder.", small)}, tmp_path / "small.pth")
    with pytest.raises(UserMistake, match="12 attention heads .* choose --arch vit-s"):
        load(tmp_path / "small.pth", "timm:vit_small_patch16_224")
    own = build_encoder("vit-s").state_dict()
    torch.save({"state_dict": {**under("module.base_encoder.", own)}}, tmp_path / "own.pth")
    loaded = load(tmp_path / "own.pth", say=lambda _: None)
    assert loaded.arch == "vit-s" and loaded.report.family == "MoCo v3"


@pytest.mark.slow
def test_moco_v3_s_vit_base_is_found_out(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    base = timm.create_model("vit_base_patch16_224", num_classes=0).state_dict()
    state = {**under("module.base_encoder.", base), **head("module.base_encoder.head.")}
    torch.save({"arch": "vit_base", "state_dict": state}, tmp_path / "base.pth")
    loaded = load(tmp_path / "base.pth", say=lambda _: None)
    assert loaded.arch == "timm:vit_base_patch16_224"
    assert torch.equal(loaded.encoder.state_dict()["blocks.7.attn.qkv.weight"], base["blocks.7.attn.qkv.weight"])


# ---------------------------------------------------------------------------------------------------------------------
# What is pickled beside the tensors


class Settings(dict):  # type: ignore[type-arg]
    """A dict of its own kind, as configuration libraries have them."""


class Names(list):  # type: ignore[type-arg]
    """A list of its own kind."""


class Runs:
    """Unpickled in the ordinary way, this writes a file."""

    def __init__(self, command: Any, *arguments: Any) -> None:
        self.reduced = (command, arguments)

    def __reduce__(self) -> Any:
        return self.reduced


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_objects_beside_the_tensors_are_inert(tmp_path: Path, zipped: bool) -> None:
    beside = {
        "args": argparse.Namespace(lr=0.1, path=pathlib.Path("a")),
        "numpy": [np.float64(1.0), np.arange(3)],
        "settings": Settings(lr=Settings(base=1)),
        "names": Names(["a"]),
        "counts": collections.defaultdict(list, a=[1]),
        "code": Runs(eval, f"open({str(RAN)!r}, 'w')"),
    }
    torch.save({"state_dict": resnet(), **beside}, tmp_path / "with.pth", _use_new_zipfile_serialization=zipped)
    loaded = load(tmp_path / "with.pth", say=lambda _: None)
    assert torch.equal(loaded.encoder.state_dict()["conv1.weight"], resnet()["conv1.weight"])
    assert not RAN.exists()


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (torchvision.models.resnet18(), "is a whole pickled torchvision.models.resnet.ResNet"),
        ({"state_dict": {}, "x": Runs(os.system, f"touch {RAN}")}, "whose module (posix|os|nt) is blocked"),
        (torch.zeros(3), "holds a Tensor"),
        ({"model": nn.Linear(2, 2)}, "holds no tensors"),
    ],
    ids=["module", "code", "tensor", "inner module"],
)
def test_what_is_no_state_dict_is_one_plain_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], document: Any, message: str
) -> None:
    torch.save(document, tmp_path / "x.pth")
    with pytest.raises(UserMistake, match=message):
        load(tmp_path / "x.pth")
    argv = ["--format", "timm", str(tmp_path / "x.pth"), str(tmp_path / "out.safetensors")]
    assert export_main(argv) == 2 and not RAN.exists()
    said = capfd.readouterr().err
    assert said.count("\n") == 1 and "\x1b" not in said


def test_init_takes_them(tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.pretrain.rehearse", lambda *_: SimpleNamespace(text=lambda: ""))  # no step is needed
    document, _ = documents()["moco-v2"]
    torch.save({**document, "args": argparse.Namespace(lr=1)}, tmp_path / "moco.pth.tar")
    argv = "--method moco-v2 --arch resnet10-w16 --loader synthetic --data 64 --image-size 64 --device cpu".split()
    argv += ["--dry-run", "--bn.group-size", "4"]
    argv += ["--global-batch", "16", "--queue-size", "64", "--init", str(tmp_path / "moco.pth.tar")]
    assert train_main([*argv, "--run-dir", str(tmp_path / "run")]) == 0
    said = capfd.readouterr().out
    assert "layout of MoCo: encoder_q.* taken; left out 2 tensors of its head and encoder_k, queue, queue_ptr" in said
