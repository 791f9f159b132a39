"""Exports give the same features in other libraries, in a process where this project cannot be imported."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from models.hyperparameters import ARCHITECTURES
from pipeline import augment
from tests.export_reader import ArraysOnly, load_detectron2
from tools.export_backbone import main
from tools.support.cli import call
from tools.support.exports import TARGETS
from tools.support.foreign_exports import OWN_FORMATS
from train.backbone_io import build_encoder, save_backbone

GOLDEN = Path(__file__).parent / "golden" / "detectron2_shapes.json"
TOLERANCE = {"torchvision": 1e-5, "timm": 1e-5, "hf": 1e-5, "detectron2": 1e-5, "onnx": 1e-3}


def random_backbone(arch: str, path: Path) -> torch.nn.Module:
    """An encoder whose every tensor, running statistics included, differs from its start and from its neighbours."""
    torch.manual_seed(0)
    encoder = build_encoder(arch)
    for module in encoder.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.8, 1.2)
            # Residual branches add up, so a deeper network needs weaker ones for features of the size of trained ones.
            torch.nn.init.uniform_(module.weight, 0.5, 0.8 if arch in ("resnet101", "resnet152") else 0.9)
            torch.nn.init.normal_(module.bias, std=0.1)
        if isinstance(module, torch.nn.LayerNorm):
            torch.nn.init.uniform_(module.weight, 0.8, 1.2)
            torch.nn.init.normal_(module.bias, std=0.1)
    for name, parameter in encoder.named_parameters():
        if name.endswith("relative_position_bias_table"):
            torch.nn.init.normal_(parameter, std=0.5)
    save_backbone(encoder, path, arch=arch, method="regioncl-m")
    return encoder.eval()


def image_size(arch: str, target: str) -> int:
    if arch != "swin-t":
        return 96
    # Windows only agree between libraries at the size the model was made for; detectron2 shifts them even where the
    # last map is one window, so there it must be larger.
    return 448 if target == "detectron2" else 224


def random_images(size: int) -> torch.Tensor:
    """Images of different colours, so that pooled features differ between them."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(3, 3, size, size, generator=generator) + 2 * torch.randn(3, 3, 1, 1, generator=generator)


def exported_features(tmp_path: Path, cases: list[tuple[str, str]]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """`arch/format` -> (our features, the other library's), all read in one foreign process."""
    ours, requests = {}, []
    encoders = {arch: random_backbone(arch, tmp_path / f"{arch}.safetensors") for arch, _ in dict(cases).items()}
    for arch, target in cases:
        name, size = f"{arch}/{target}", image_size(arch, target)
        images = random_images(size)
        np.save(tmp_path / f"{arch}-{target}.npy", images.numpy())
        with torch.no_grad():
            ours[name] = encoders[arch](images).mean(dim=(2, 3)).numpy()
        out = tmp_path / f"{arch}-{target}{TARGETS[target].ending}"
        arguments = [str(tmp_path / f"{arch}.safetensors"), str(out), "--format", target]
        if target == "onnx":
            arguments += ["--image-size", str(size)]
        assert main(arguments) == 0
        requests.append(
            {
                "name": name,
                "format": target,
                "arch": arch,
                "path": str(out),
                "images": str(tmp_path / f"{arch}-{target}.npy"),
            }
        )
    (tmp_path / "request.json").write_text(json.dumps(requests))
    reader = Path(__file__).with_name("export_reader.py").read_text()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "reader.py").write_text(reader)
    command = [sys.executable, "-I", "reader.py", str(tmp_path / "request.json"), str(tmp_path / "result.npz")]
    done = subprocess.run(
        command,
        cwd=elsewhere,
        capture_output=True,
        text=True,
        env={"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    theirs = np.load(tmp_path / "result.npz")
    return {name: (features, theirs[name]) for name, features in ours.items()}


def check(tmp_path: Path, cases: list[tuple[str, str]]) -> None:
    for name, (ours, theirs) in exported_features(tmp_path, cases).items():
        assert ours.std(axis=0).mean() > 0.003, f"{name}: features that do not depend on the image prove nothing"
        error = np.abs(ours - theirs).max()
        assert error <= TOLERANCE[name.split("/")[1]], f"{name}: features differ by {error}"


def test_exports_agree_elsewhere(tmp_path: Path) -> None:
    pytest.importorskip("timm")
    pytest.importorskip("transformers")
    pytest.importorskip("onnxruntime")
    check(
        tmp_path,
        [
            ("resnet18", "torchvision"),
            ("resnet18", "timm"),
            ("resnet18", "hf"),
            ("resnet18", "onnx"),
            ("resnet18", "detectron2"),
            ("swin-t", "timm"),
            ("swin-t", "hf"),
        ],
    )


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["resnet34", "resnet50", "resnet101", "resnet152", "resnet50-2x", "swin-t"])
def test_every_export_agrees_elsewhere(tmp_path: Path, arch: str) -> None:
    for module in ("timm", "transformers", "onnxruntime"):
        pytest.importorskip(module)
    check(tmp_path, [(arch, target) for target in TARGETS])


@pytest.mark.parametrize(
    "arch", ["resnet18", "resnet50", pytest.param("resnet50-2x", marks=pytest.mark.slow), "swin-t"]
)
def test_detectron2_keys_and_shapes(tmp_path: Path, arch: str) -> None:
    encoder = random_backbone(arch, tmp_path / "backbone.safetensors")
    assert main([str(tmp_path / "backbone.safetensors"), str(tmp_path / "out.pkl"), "--format", "detectron2"]) == 0
    arrays = load_detectron2(tmp_path / "out.pkl")
    expected = json.loads(GOLDEN.read_text())[arch]
    assert {name: list(value.shape) for name, value in arrays.items()} == expected
    if arch == "swin-t":
        assert torch.equal(arrays["norm3.weight"], encoder.state_dict()["norm.weight"])
        assert torch.equal(
            arrays["layers.1.downsample.reduction.weight"], encoder.state_dict()["features.4.reduction.weight"]
        )


LARGE = ("resnet34", "resnet50", "swin-t", "resnet101", "resnet152", "resnet50-2x", "vit-b")


@pytest.mark.parametrize(
    "arch", [pytest.param(arch, marks=pytest.mark.slow if arch in LARGE else ()) for arch in ARCHITECTURES]
)
def test_each_backbone_is_exported_or_refused_with_what_fits(tmp_path: Path, arch: str) -> None:
    random_backbone(arch, tmp_path / "backbone.safetensors")
    fitting = OWN_FORMATS.get(arch, ("torchvision", "timm", "detectron2", "hf"))
    for target in set(TARGETS) - {"onnx"}:
        arguments = [str(tmp_path / "backbone.safetensors"), str(tmp_path / f"{target}{TARGETS[target].ending}")]
        code = call(main, [*arguments, "--format", target])
        assert code == (0 if target in fitting else 2), target


def test_detectron2_reads_it(tmp_path: Path) -> None:
    detection = pytest.importorskip("detectron2.modeling", reason="detectron2 is not on the package index")
    checkpoint = pytest.importorskip("detectron2.checkpoint")
    from detectron2.config import get_cfg

    encoder = random_backbone("resnet50", tmp_path / "backbone.safetensors")
    main([str(tmp_path / "backbone.safetensors"), str(tmp_path / "out.pkl"), "--format", "detectron2"])
    config = get_cfg()
    config.MODEL.RESNETS.STRIDE_IN_1X1 = False
    config.MODEL.RESNETS.NORM = "BN"
    config.MODEL.RESNETS.OUT_FEATURES = ["res5"]
    backbone = detection.build_backbone(config).eval()
    checkpoint.DetectionCheckpointer(backbone).load(str(tmp_path / "out.pkl"))
    images = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        torch.testing.assert_close(backbone(images)["res5"], encoder(images), atol=1e-5, rtol=0)


def test_the_reader_refuses_code(tmp_path: Path) -> None:
    import pickle

    (tmp_path / "bad.pkl").write_bytes(pickle.dumps({"model": print}))
    with pytest.raises(pickle.UnpicklingError), (tmp_path / "bad.pkl").open("rb") as stream:
        ArraysOnly(stream).load()


def test_model_card_tells_what_the_run_was(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    random_backbone("resnet18", run / "backbone.safetensors")
    (run / "config.json").write_text(
        json.dumps(
            {
                "run": {"method": "regioncl-m", "recipe": "regioncl-m-200"},
                "recipe": {"image_size": 96, "optim": {"lr": 0.5}},
                "model": {"temperature": 0.2},
                "data_hash": "abc123",
                "data_images": 77,
                "versions": {"commit": "f00d"},
            }
        )
    )
    (run / "metrics.jsonl").write_text(
        json.dumps({"kind": "knn", "step": 5, "k": 20, "top1": 0.4321, "val_images": 50}) + "\n" + '{"kind": "tr'
    )
    (run / "eval-linear.json").write_text(
        json.dumps(
            {
                "protocol": "linear",
                "recipe": "moco-v2",
                "top1": 0.1234,
                "top5": 0.3,
                "val_images": 9,
                "val_data_hash": "beef",
            }
        )
    )
    assert main([str(run), str(tmp_path / "out.safetensors"), "--format", "timm"]) == 0
    card = (tmp_path / "out.safetensors.md").read_text()
    for fact in (
        "regioncl-m-200",
        "abc123",
        "77",
        "f00d",
        "43.21%",
        "linear, recipe moco-v2 | top-1 12.3, top-5 30.0 | 9 images",
        "optim.lr: 0.5",
        "temperature: 0.2",
        "timm.create_model",
        "torch.zeros(1, 3, 96, 96)",
    ):
        assert fact in card, fact


@pytest.mark.parametrize(("target", "library"), [("hf", "transformers"), ("timm", "timm"), ("onnx", "onnx")])
def test_the_hub_reads_the_card(tmp_path: Path, target: str, library: str) -> None:
    hub = pytest.importorskip("huggingface_hub")
    odd = 'a "method": of\nothers'
    save_backbone(build_encoder("resnet18"), tmp_path / "b.safetensors", arch="resnet18", method=odd)
    out = tmp_path / f"out{TARGETS[target].ending}"
    assert main([str(tmp_path / "b.safetensors"), str(out), "--format", target]) == 0
    card = hub.ModelCard.load(out / "README.md" if target == "hf" else out.with_name(f"{out.name}.md"))
    assert (card.data.library_name, card.data.pipeline_tag) == (library, "image-feature-extraction")
    assert {"self-supervised-learning", odd, "resnet18"} <= set(card.data.tags) and card.text.startswith("\n# resnet18")


@pytest.mark.parametrize("name", ["it's", 'a"b', "a\\b", "a b {x} \u00e9", "'\"\\n", "a\nb"])
@pytest.mark.parametrize("target", ["timm", "torchvision", "detectron2"])
def test_a_card_s_code_names_the_file(tmp_path: Path, name: str, target: str) -> None:
    random_backbone("resnet18", tmp_path / "backbone.safetensors")
    out = tmp_path / f"{name}{TARGETS[target].ending}"
    assert main([str(tmp_path / "backbone.safetensors"), str(out), "--format", target]) == 0
    card = out.with_name(f"{out.name}.md").read_text()
    blocks = [block.partition("```")[0] for block in card.split("```python\n")[1:]]
    strings = [node.value for block in blocks for node in ast.walk(ast.parse(block)) if isinstance(node, ast.Constant)]
    assert out.name in strings, card


DETECTRON2_FACTS = {
    "resnet18": ("DEPTH = 18", "RES2_OUT_CHANNELS = 64", "STRIDE_IN_1X1 = False", "FREEZE_AT = 0"),
    "resnet50": ("DEPTH = 50", "WIDTH_PER_GROUP = 64", "STRIDE_IN_1X1 = False", "FREEZE_AT = 0"),
    "resnet50-2x": ("DEPTH = 50", "WIDTH_PER_GROUP = 128", "STRIDE_IN_1X1 = False", "FREEZE_AT = 0"),
    "swin-t": ("embed_dim=96", "out_indices=(3,)"),
}


@pytest.mark.parametrize("arch", DETECTRON2_FACTS)
def test_detectron2_is_told_what_it_must_know(arch: str) -> None:
    code = TARGETS["detectron2"].usage(arch).format(out="out.pkl", size=224)
    mean, std = ([round(255 * value, 3) for value in values] for values in (augment.MEAN, augment.STD))
    for fact in (*DETECTRON2_FACTS[arch], str(mean), str(std), '"RGB"', '"out.pkl"'):
        assert fact in code, fact
    compile(code, "card", "exec")


def test_the_card_of_a_detectron2_export(tmp_path: Path) -> None:
    random_backbone("resnet18", tmp_path / "backbone.safetensors")
    assert main([str(tmp_path / "backbone.safetensors"), str(tmp_path / "out.pkl"), "--format", "detectron2"]) == 0
    card = (tmp_path / "out.pkl.md").read_text()
    assert "RGB in 0..255" in card and "0..1," not in card and "STRIDE_IN_1X1 = False" in card


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{file}", "{tmp}/out.bin", "--format", "onnx"], "ends in .onnx"),
        (["{file}", "{file}", "--format", "torchvision"], "exists"),
        (["{file}", "/proc/out.safetensors", "--format", "torchvision"], "choose a place that can be written"),
        (["{tmp}/none", "{tmp}/out.pkl", "--format", "detectron2"], "does not exist"),
        (["{file}", "{tmp}/out.pkl", "--format", "caffe"], "invalid choice"),
        (["{file}", "{tmp}/out.pkl", "--format", "detectron2", "--image-sise", "3"], "--image-size"),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, capfd, arguments: list[str], message: str) -> None:
    file = tmp_path / "backbone.safetensors"
    random_backbone("resnet18", file)
    assert main([a.format(file=file, tmp=tmp_path) for a in arguments]) == 2
    error = capfd.readouterr().err.strip()
    assert "\n" not in error and message in error, error
    assert sorted(p.name for p in tmp_path.iterdir()) == ["backbone.safetensors"], "something half-written was left"
