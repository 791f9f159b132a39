"""Backbones of other libraries: maps, batch norm, training, resumption, files there and back, and what is refused."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import load_file
from torch import Tensor, nn

from models.foreign import build_foreign, check_image_size, is_foreign
from models.norm import GroupBatchNorm, convert_batch_norm, stacked_views
from models.resnet import build_backbone
from tests.runs import TINY, comparable, last_wins, run
from tools.export_backbone import main as export_main
from train.backbone_io import build_encoder, load, read_backbone, save_backbone
from train.errors import UserMistake
from train.main import main as train_main

timm = pytest.importorskip("timm")

# name -> (stride, channels): small models of each family that the trunk interface promises
TRUNKS = {
    "timm:test_resnet": (32, 96),
    "timm:test_convnext": (32, 64),
    "timm:test_efficientnet": (32, 256),
    "timm:regnety_002": (32, 368),
    "timm:test_vit": (16, 64),
    "timm:swin_tiny_patch4_window7_224": (32, 768),
    "torchvision:resnet18": (32, 512),
    "torchvision:regnet_y_400mf": (32, 440),
    "torchvision:mobilenet_v3_small": (32, 576),
}


def quiet(_: str) -> None:
    return None


def images(count: int = 4, size: int = 64) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("arch", TRUNKS)
def test_trunks_give_a_map_with_its_stride(arch: str) -> None:
    trunk = build_backbone(arch, "fan_out", zero_init_residual=True)
    stride, channels = TRUNKS[arch]
    assert (trunk.stride, trunk.feature_dim) == (stride, channels)
    with torch.no_grad():
        found = trunk.eval()(images(2, 96))
    assert found.shape == (2, channels, 96 // stride, 96 // stride)


@pytest.mark.parametrize("arch", ["timm:test_efficientnet", "torchvision:mobilenet_v3_small"])
def test_batch_norm_by_group_keeps_the_activation(arch: str) -> None:
    plain = build_foreign(arch).train()
    for mode in ("group", "sync", "plain"):  # each from the one before it
        converted = convert_batch_norm(copy.deepcopy(plain), "group")
        converted = convert_batch_norm(converted, mode)
        torch.testing.assert_close(converted(images()), copy.deepcopy(plain)(images()))
    grouped = convert_batch_norm(copy.deepcopy(plain), "group", 2)
    assert sum(isinstance(layer, GroupBatchNorm) for layer in grouped.modules()) > 10
    assert grouped.state_dict().keys() == plain.state_dict().keys()
    first, second = (copy.deepcopy(plain)(part) for part in images().chunk(2))
    torch.testing.assert_close(grouped(images()), torch.cat([first, second]), rtol=1e-3, atol=1e-4)


def test_stacked_views_are_normalised_apart() -> None:
    trunk = convert_batch_norm(build_foreign("timm:test_efficientnet").train(), "group")
    first, second = (copy.deepcopy(trunk)(part) for part in images().chunk(2))
    with stacked_views(trunk, 2):
        both = trunk(images())
    torch.testing.assert_close(both, torch.cat([first, second]), rtol=1e-3, atol=1e-4)


def test_tokens_keep_their_places() -> None:
    """A change in one patch of a ViT without attention changes that cell alone, and the class token is not a cell."""
    trunk = build_foreign("timm:test_vit").eval()
    for block in trunk.blocks:  # type: ignore[union-attr]
        block.attn.proj.weight.data.zero_()
    before = images(1)
    after = before.clone()
    after[:, :, 16:32, 48:64] += 1
    with torch.no_grad():
        changed = (trunk(after) - trunk(before)).abs().amax(1)[0] > 1e-6
    assert changed.nonzero().tolist() == [[1, 3]]


@pytest.mark.slow
def test_torchvision_s_vit_at_its_own_size_and_at_others() -> None:
    trunk = build_foreign("torchvision:vit_b_16").eval()
    model = torchvision.models.vit_b_16()
    model.heads = nn.Identity()  # type: ignore[assignment]
    assert model.load_state_dict(trunk.state_dict(), strict=True)
    tokens: list[Tensor] = []
    model.encoder.register_forward_hook(lambda module, inputs, output: tokens.append(output))
    with torch.no_grad():
        model.eval()(images(1, 224))
        found = trunk(images(1, 224))
        assert trunk(images(1, 64)).shape == (1, 768, 4, 4)
    torch.testing.assert_close(found.flatten(2).transpose(1, 2), tokens[0][:, 1:], rtol=1e-4, atol=1e-5)


def test_random_layers_are_off() -> None:
    for arch in ("torchvision:efficientnet_b0", "torchvision:swin_t"):
        trunk = convert_batch_norm(build_foreign(arch).train(), "group")
        rates = [layer.p for layer in trunk.modules() if type(layer).__name__ in ("StochasticDepth", "Dropout")]
        assert rates and not any(rates), arch


@pytest.mark.parametrize(
    ("arch", "message"),
    [
        ("timm:resnet9000", "unknown to timm .*near are resnet"),
        ("torchvision:resnet19", "unknown to torchvision; near are resnet"),
        ("torchvision:inception_v3", "no trunk that is known here"),
        ("tests.nowhere:build", "No module named"),
        ("tests.test_foreign:nothing", "has no attribute"),
        ("tests.test_foreign:quiet", "without arguments"),
        ("tests.test_foreign:pooled_factory", r"gives \(1, 3\) for one image"),
        ("tests.test_foreign:text_factory", "returns a str"),
        ("resnet19", "timm:NAME"),
    ],
)
def test_what_is_no_trunk_is_one_line(arch: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as refusal:
        build_backbone(arch, "torch")
    assert "\n" not in str(refusal.value)


def pooled_factory() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 3, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def text_factory() -> str:
    return "a model"


def map_factory() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5), nn.AvgPool2d(8))


def test_timm_is_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    with pytest.raises(ValueError, match="pip install timm"):
        build_backbone("timm:resnet18", "torch")


def test_sizes_that_do_not_fit_are_refused_at_the_start(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="cannot take images of 72 x 72"):
        check_image_size(build_foreign("timm:test_vit"), "timm:test_vit", 72)
    argv = command("byol", "timm:test_vit", tmp_path / "run", "--image-size", "72")
    assert train_main(argv) == 2
    said = capfd.readouterr().err
    assert said.count("\n") == 1 and "cannot take images" in said


@pytest.mark.parametrize("method", ["care", "moby"])
def test_what_a_method_needs_of_a_trunk_is_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], method: str
) -> None:
    argv = ["--method", method, "--arch", "timm:test_convnext", "--loader", "synthetic", "--data", "64"]
    extra = ["--zero-init-residual", "false"] if method == "care" else []
    assert train_main([*argv, *extra, "--device", "cpu", "--run-dir", str(tmp_path / "run")]) == 2
    said = capfd.readouterr().err
    assert said.count("\n") == 1 and ("choose a ResNet" in said or "--drop-path 0" in said)


# ---------------------------------------------------------------------------------------------------------------------
# Files


def test_files_go_there_and_back(tmp_path: Path) -> None:
    """A library's weights fill a trunk; the backbone file names its architecture and is read without being told."""
    for number, (arch, classes) in enumerate(
        [("timm:test_convnext", 10), ("timm:test_vit", 10), ("torchvision:mobilenet_v3_small", 1000)]
    ):
        library, name = arch.split(":")
        model = (
            timm.create_model(name, num_classes=classes)
            if library == "timm"
            else torchvision.models.mobilenet_v3_small()
        )
        torch.save({"state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}, tmp_path / "theirs.pth")
        loaded = load(tmp_path / "theirs.pth", arch, quiet)
        assert loaded.report.classifier and loaded.report.matched == len(loaded.encoder.state_dict())
        file = tmp_path / f"{number}.safetensors"
        save_backbone(loaded.encoder, file, arch=arch)
        again = load(file, say=quiet)
        assert again.arch == arch
        for key, value in again.encoder.state_dict().items():
            assert torch.equal(value, model.state_dict()[key]), key


def test_a_file_cannot_choose_which_code_runs(tmp_path: Path) -> None:
    arch = "tests.test_foreign:map_factory"
    save_backbone(build_encoder(arch), tmp_path / "own.safetensors", arch=arch)
    with pytest.raises(UserMistake, match=f"give --arch {arch}"):
        load(tmp_path / "own.safetensors", say=quiet)
    assert load(tmp_path / "own.safetensors", arch, quiet).encoder.feature_dim == 8
    with pytest.raises(UserMistake, match="not a whole timm:test_resnet"):
        load(tmp_path / "own.safetensors", "timm:test_resnet", quiet)
    assert read_backbone(tmp_path / "own.safetensors").metadata["arch"] == arch and is_foreign(arch)


@pytest.mark.parametrize(
    ("arch", "target"),
    [
        ("timm:test_convnext", "timm"),
        ("timm:test_vit", "timm"),
        ("torchvision:regnet_y_400mf", "torchvision"),
    ],
)
def test_the_card_s_code_computes_the_features(tmp_path: Path, arch: str, target: str) -> None:
    encoder = build_encoder(arch).eval()
    save_backbone(encoder, tmp_path / "b.safetensors", arch=arch)
    out = tmp_path / "out.safetensors"
    assert export_main([str(tmp_path / "b.safetensors"), str(out), "--format", target, "--image-size", "64"]) == 0
    assert load_file(out).keys() == encoder.state_dict().keys()
    features_of_card(out, encoder, 64)


def features_of_card(out: Path, encoder: nn.Module, size: int) -> None:
    card = out / "README.md" if out.is_dir() else out.with_name(f"{out.name}.md")
    code = card.read_text().split("```python\n")[1].split("```")[0]
    code = code.replace(f"torch.zeros(1, 3, {size}, {size})", "given").replace(f"'{out.name}'", f"'{out}'")
    scope = {"given": images(2, size)}
    with torch.no_grad():
        exec(code, scope)
        torch.testing.assert_close(scope["features"], encoder(images(2, size)).mean((2, 3)), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["timm:convnext_atto", "timm:efficientnet_b0", "timm:vit_tiny_patch16_224"])
def test_hf_and_onnx_compute_the_features(tmp_path: Path, arch: str) -> None:
    pytest.importorskip("transformers")
    ort = pytest.importorskip("onnxruntime")
    encoder = build_encoder(arch).eval()
    save_backbone(encoder, tmp_path / "b.safetensors", arch=arch)
    for out, target in ((tmp_path / "hf", "hf"), (tmp_path / "o.onnx", "onnx")):
        assert export_main([str(tmp_path / "b.safetensors"), str(out), "--format", target, "--image-size", "64"]) == 0
    features_of_card(tmp_path / "hf", encoder, 64)
    found = ort.InferenceSession(str(tmp_path / "o.onnx")).run(None, {"images": images(3).numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(found), encoder(images(3)).mean((2, 3)), rtol=1e-3, atol=1e-3)


def test_formats_that_know_no_such_backbone_are_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    save_backbone(build_encoder("timm:test_resnet"), tmp_path / "b.safetensors", arch="timm:test_resnet")
    for target, ending in (("torchvision", ".safetensors"), ("detectron2", ".pkl")):
        assert export_main([str(tmp_path / "b.safetensors"), str(tmp_path / f"x{ending}"), "--format", target]) == 2
        assert "choose timm or hf or onnx" in capfd.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# Training


def command(method: str, arch: str, run_dir: Path, *changes: str) -> list[str]:
    sizes = [*TINY]
    if method != "regioncl-m":  # without a queue
        sizes = sizes[: sizes.index("--queue-size")] + sizes[sizes.index("--queue-size") + 2 :]
    zero = [] if method == "regioncl-m" else ["--c", "16"] if method == "lewel-b" else []
    given = [
        "--method",
        method,
        "--arch",
        arch,
        "--data",
        "24",
        "--epochs",
        "2",
        "--log-every",
        "1",
        "--run-dir",
        str(run_dir),
    ]
    return last_wins([*sizes, "--holdout", "0", *given, *zero, *changes])


def train_resume_export(method: str, arch: str, tmp_path: Path, *changes: str) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    log = tmp_path / "log"
    assert run(command(method, arch, whole, *changes), log=log) == [0], log.read_text()[-2000:]
    assert run(command(method, arch, parts, *changes, "--max-steps", "4"), log=log) == [0], log.read_text()[-2000:]
    assert run(command(method, arch, parts, *changes), log=log) == [0], log.read_text()[-2000:]
    kept, state, tensors = comparable(whole)
    resumed, resumed_state, resumed_tensors = comparable(parts)
    steps, resumed_steps = ([row for row in found if row["kind"] == "train"] for found in (kept, resumed))
    assert len(steps) == 6 and resumed_steps == steps and resumed_tensors == tensors
    assert resumed_state["step"] == state["step"]
    exported = load_file(whole / "backbone.safetensors")
    library, name = arch.split(":")
    fresh = timm.create_model(name, num_classes=0, global_pool="")
    started = {key: value.clone() for key, value in fresh.state_dict().items()}
    fresh.load_state_dict(exported, strict=True)
    moved = sum(not torch.equal(value, started[key]) for key, value in exported.items())
    assert library == "timm" and moved > len(started) // 2 and all(v.isfinite().all() for v in exported.values())


@pytest.mark.parametrize(
    ("method", "arch"),
    [
        ("regioncl-m", "timm:test_convnext"),
        ("byol", "timm:test_vit"),
        ("lewel-b", "timm:test_efficientnet"),
    ],
)
def test_small_ones_train_resume_and_export(method: str, arch: str, tmp_path: Path) -> None:
    train_resume_export(method, arch, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["regioncl-m", "byol", "lewel-b"])
@pytest.mark.parametrize("arch", ["timm:convnext_tiny", "timm:vit_small_patch16_224", "timm:efficientnet_b0"])
def test_the_usual_ones_train_resume_and_export(method: str, arch: str, tmp_path: Path) -> None:
    train_resume_export(method, arch, tmp_path)
