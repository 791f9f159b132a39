"""Backbone files: what is saved, what is loaded, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torchvision
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from train import backbone_io
from train.backbone_io import build_encoder, load, load_backbone, load_into, save_backbone
from train.errors import UserMistake

ARCHES = {"resnet18": 11_176_512, "resnet50": 23_508_032, "swin-t": 27_519_354}


@pytest.fixture(scope="module")
def encoder() -> torch.nn.Module:
    torch.manual_seed(0)
    return build_encoder("resnet18").to(memory_format=torch.channels_last)


def quiet(_: str) -> None:
    """Takes the line that says what was matched."""


def test_a_saved_backbone_is_contiguous_torchvision_named_and_comes_back(tmp_path: Path, encoder) -> None:
    path = tmp_path / "backbone.safetensors"
    save_backbone(encoder, path, arch="resnet18", method="moco-v2", extra={"step": "7"})
    with safe_open(path, framework="pt") as archive:
        metadata = archive.metadata()
    assert metadata["arch"] == "resnet18" and metadata["method"] == "moco-v2" and metadata["step"] == "7"
    assert metadata["regatta_version"] == backbone_io.version() != "unknown"
    names = set(torchvision.models.resnet18().state_dict()) - {"fc.weight", "fc.bias"}
    state = load_file(path)
    assert set(state) == names
    back = load_backbone(path, say=quiet)
    assert not back.training
    for name, value in encoder.state_dict().items():
        assert torch.equal(value, back.state_dict()[name]), name
    assert encoder.conv1.weight.is_contiguous(memory_format=torch.channels_last), "saving must not move the weights"
    assert [p.name for p in tmp_path.iterdir()] == ["backbone.safetensors"]


def test_a_failed_write_keeps_the_old_file(tmp_path: Path, encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "backbone.safetensors"
    save_backbone(encoder, path, arch="resnet18")
    before = path.read_bytes()

    write_all = Path.write_bytes

    def half(target: Path, data: bytes) -> int:
        write_all(target, data[: len(data) // 2])
        raise OSError("disk full")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="disk full"):
        patch.setattr(Path, "write_bytes", half)
        save_backbone(encoder, path, arch="resnet18")
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["backbone.safetensors"]


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_torchvision_files_with_wrappers_are_found_out(tmp_path: Path, arch: str) -> None:
    model = getattr(torchvision.models, arch)()
    state = {name: value for name, value in model.state_dict().items() if not name.endswith("num_batches_tracked")}
    torch.save(
        {"epoch": 3, "state_dict": {f"module.{name}": value for name, value in state.items()}}, tmp_path / "a.pth"
    )
    said: list[str] = []
    loaded = load(tmp_path / "a.pth", say=said.append)
    assert loaded.arch == arch and loaded.report.classifier == ("fc.weight", "fc.bias")
    assert loaded.report.parameters == ARCHES[arch]
    assert f"{ARCHES[arch]:,}" in said[0] and "fc.weight" in said[0] and arch in said[0]
    assert torch.equal(loaded.encoder.layer4[0].conv2.weight, model.layer4[0].conv2.weight)


@pytest.mark.parametrize("layout", ["torchvision", "timm", "swin"])
def test_swin_in_three_layouts_gives_the_same_features(tmp_path: Path, layout: str) -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    if layout == "torchvision":
        model = torchvision.models.swin_t().eval()
        model.head = torch.nn.Identity()
        state = torchvision.models.swin_t().state_dict() | model.state_dict()
    else:
        model = timm.create_model("swin_tiny_patch4_window7_224", pretrained=False, num_classes=0).eval()
        state = model.state_dict()
    if layout == "swin":  # the authors keep a stage's patch merging in the stage before
        stored_in = {f"layers.{stage}.downsample": f"layers.{stage - 1}.downsample" for stage in (1, 2, 3)}
        state = {stored_in.get(name[:19], name[:19]) + name[19:]: value for name, value in state.items()}
    save_file({name: value.contiguous() for name, value in state.items()}, tmp_path / "swin.safetensors")
    loaded = load(tmp_path / "swin.safetensors", say=quiet)
    assert loaded.arch == "swin-t" and loaded.report.layout == layout
    assert loaded.report.parameters == ARCHES["swin-t"]
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(loaded.encoder(images).mean((2, 3)), model(images), atol=1e-5, rtol=0)


def test_swin_names_go_there_and_back() -> None:
    for name in build_encoder("swin-t").state_dict():
        for offset in (0, 2):
            there = backbone_io.torchvision_to_swin(name, offset)
            assert backbone_io.swin_to_torchvision(there, offset) == name


def test_nothing_is_loaded_unless_all_of_it_fits(tmp_path: Path, encoder) -> None:
    state = dict(encoder.state_dict())
    target = build_encoder("resnet18")
    before = {name: value.clone() for name, value in target.state_dict().items()}
    cases = {
        "missing: layer2.0.conv1.weight": {k: v for k, v in state.items() if k != "layer2.0.conv1.weight"},
        "missing: bn1.running_var": {k: v for k, v in state.items() if k != "bn1.running_var"},
        "not in the backbone: queue": {**state, "queue": torch.zeros(3)},
        "of another shape: conv1.weight": {**state, "conv1.weight": torch.zeros(64, 3, 3, 3)},
    }
    for message, broken in cases.items():
        with pytest.raises(UserMistake, match=message):
            load_into(target, broken, "resnet18", quiet)
    for name, value in target.state_dict().items():
        assert torch.equal(value, before[name]), f"{name} changed although loading was refused"


def test_a_file_of_another_backbone_names_the_one_to_choose(encoder) -> None:
    with pytest.raises(UserMistake, match="it holds a resnet18: choose --arch resnet18$"):
        load_into(build_encoder("resnet10-w16"), dict(encoder.state_dict()), "resnet10-w16", quiet)
    partial = {name: value for name, value in encoder.state_dict().items() if "layer4" not in name}
    with pytest.raises(UserMistake, match="choose the --arch it was trained with"):
        load_into(build_encoder("resnet10-w16"), partial, "resnet10-w16", quiet)


def test_loading_keeps_the_memory_layout(encoder) -> None:
    target = build_encoder("resnet18").to(memory_format=torch.channels_last)
    report = load_into(target, dict(encoder.state_dict()), "resnet18", quiet)
    assert target.layer1[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)
    assert report.matched == len(target.state_dict())


def test_run_folders_and_what_is_no_backbone(tmp_path: Path, encoder) -> None:
    with pytest.raises(UserMistake, match=r"no backbone\.safetensors"):
        load(tmp_path)
    save_backbone(encoder, tmp_path / "backbone.safetensors", arch="resnet18")
    assert load(tmp_path, say=quiet).source.folder == tmp_path
    (tmp_path / "x.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}")
    (tmp_path / "x.json").write_text(json.dumps({}))
    torch.save({"model": 3}, tmp_path / "x.pth")
    torch.save(quiet, tmp_path / "code.pth")
    for name, message in [
        ("none.pth", "does not exist"),
        ("x.safetensors", "cannot be read|no tensors"),
        ("x.json", "unknown ending"),
        ("x.pth", "no tensors"),
        ("code.pth", "plain tensors"),
    ]:
        with pytest.raises(UserMistake, match=message):
            load(tmp_path / name)
    with pytest.raises(UserMistake, match="fits no known architecture; nearest is resnet18"):
        load({k: v for k, v in encoder.state_dict().items() if k != "layer4.1.bn2.weight"})
    with pytest.raises(UserMistake, match="choose from"):
        load(tmp_path, "resnet19")
