"""MoCo v3's ViT: timm's function and names, the paper's positions and start, the class token in methods and files."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

from models.methods import METHODS
from models.resnet import build_backbone
from models.vit import VitTrunk, sincos_positions
from tests.method_cases import build, make_inputs, randomise_norms, small_config, to_double
from tests.method_references import check_against_formula
from tools.support.exports import export
from train.backbone_io import load, load_into, save_backbone
from train.build import build_method
from train.errors import UserMistake
from train.optim import build_optimizer
from train.resolve import resolve
from train.runtime import Runtime

CPU = Runtime(0, 1, torch.device("cpu"), torch.float32, False)
HEADS = {"projector_layers": 3, "predictor_norm": True, "zero_init_residual": False}


def narrow() -> VitTrunk:
    torch.manual_seed(0)
    return VitTrunk(dim=24, depth=2, heads=3)


@pytest.mark.parametrize(("arch", "parameters", "heads"), [("vit-s", 21_590_016, 12), ("vit-b", 85_647_360, 12)])
def test_sizes_are_those_of_the_released_models(arch: str, parameters: int, heads: int) -> None:
    with torch.device("meta"):
        trunk: Any = build_backbone(arch, "fan_out")
        names = {"vit-s": "vit_small_patch16_224", "vit-b": "vit_base_patch16_224"}
        other = timm.create_model(names[arch], num_classes=0)
    assert sum(p.numel() for p in trunk.parameters()) == parameters
    assert trunk.blocks[0].attn.heads == heads and len(trunk.blocks) == 12
    shapes = {name: value.shape for name, value in trunk.state_dict().items()}
    assert shapes == {name: value.shape for name, value in other.state_dict().items()}


def test_the_function_is_timm_s() -> None:
    trunk = narrow()
    other = timm.models.vision_transformer.VisionTransformer(
        embed_dim=24, depth=2, num_heads=3, num_classes=0, global_pool="token"
    )
    other.load_state_dict(trunk.state_dict(), strict=True)
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        found = trunk(images)
        assert found.shape == (2, 24, 1, 1)
        torch.testing.assert_close(found.flatten(1), other.eval()(images), rtol=1e-5, atol=1e-5)


def test_positions_are_the_paper_s_cell_by_cell() -> None:
    found = sincos_positions(5, 12)[0]
    assert not found[0].any()
    for row in range(5):
        for column in range(5):
            rates = [10000 ** (-i / 3) for i in range(3)]
            wanted = [f(place * r) for place in (row, column) for f in (math.sin, math.cos) for r in rates]
            assert found[1 + 5 * row + column].tolist() == pytest.approx(wanted, abs=1e-6)


def test_another_size_has_positions_of_its_own_grid() -> None:
    trunk = narrow()
    images = torch.randn(1, 3, 64, 64)
    tokens = torch.cat([trunk.cls_token, trunk.patch_embed(images).flatten(2).transpose(1, 2)], 1)
    wanted = trunk.norm(trunk.blocks(tokens + sincos_positions(4, 24)))[:, 0]
    torch.testing.assert_close(trunk(images).flatten(1), wanted)
    with pytest.raises(ValueError, match="whole patches of 16 px"):
        trunk(torch.randn(1, 3, 72, 72))


def test_it_starts_as_the_released_code_draws_it() -> None:
    trunk: Any = narrow()
    bounds = {
        "patch_embed.proj.weight": math.sqrt(6 / (3 * 16 * 16 + 24)),
        "blocks.0.attn.qkv.weight": math.sqrt(6 / (24 + 24)),
        "blocks.1.attn.proj.weight": math.sqrt(6 / (24 + 24)),
        "blocks.1.mlp.fc1.weight": math.sqrt(6 / (24 + 96)),
    }
    state = trunk.state_dict()
    for name, bound in bounds.items():
        values = state[name].abs()
        assert 0.95 * bound < float(values.max()) <= bound and float(values.mean()) == pytest.approx(bound / 2, rel=0.1)
    assert not any(value.any() for name, value in state.items() if name.endswith("bias"))
    assert float(trunk.cls_token.abs().max()) < 1e-5


@pytest.mark.parametrize("name", ["moco-v3", "byol", "simclr"])
def test_methods_on_a_vit_equal_their_formula_and_leave_the_patches_alone(name: str) -> None:
    torch.set_num_threads(1)
    config = METHODS[name].Config()
    changes = {key: value for key, value in HEADS.items() if hasattr(config, key)}
    method = build(name, small_config(name, **changes), arch="vit-narrow").double()
    randomise_norms(method)
    inputs = to_double(make_inputs(method, 1))
    if name == "byol":  # its formula is in test_byol.py; here that it trains
        method(inputs).loss.backward()
    else:
        check_against_formula(name, method, inputs)
        method(inputs).loss.backward()
    encoder: Any = method.encoder
    assert encoder.patch_embed.proj.weight.grad is None and encoder.cls_token.grad is not None
    trained = {name for name, p in encoder.named_parameters() if p.requires_grad}
    assert {"patch_embed.proj.weight", "patch_embed.proj.bias"} == dict(encoder.named_parameters()).keys() - trained


def test_the_recipe_s_optimizer_decays_everything_but_the_patches() -> None:
    config = resolve("--method moco-v3 --recipe moco-v3-vit-s --data 8 --loader synthetic".split())
    method = build("moco-v3", small_config("moco-v3", **HEADS), arch="vit-narrow")
    optimizer = build_optimizer(method, config.recipe.optim, config.recipe.global_batch)
    groups = optimizer.param_groups
    assert [(group["weight_decay"], group["lr"]) for group in groups] == [(0.1, pytest.approx(2.4e-3))]
    patches = {id(p) for p in method.encoder.patch_embed.parameters()}  # type: ignore[union-attr, operator]
    assert not patches & {id(p) for p in groups[0]["params"]}


@pytest.mark.parametrize("method", ["densecl", "regioncl-m", "lewel-b"])
def test_methods_that_compare_places_are_refused(method: str) -> None:
    config = resolve(["--method", method, "--arch", "vit-s", "--data", "8", "--loader", "synthetic", "--dim", "16"])
    with torch.device("meta"), pytest.raises(UserMistake, match="gives the class token alone"):
        build_method(config, CPU)


def test_files_keep_timm_s_names_and_other_vits_are_refused(tmp_path: Path) -> None:
    trunk: Any = build_backbone("vit-s", "fan_out")
    file = tmp_path / "backbone.safetensors"
    save_backbone(trunk, file, arch="vit-s", method="moco-v3")
    loaded = load(file, say=lambda _: None)
    assert loaded.arch == "vit-s"
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(loaded.encoder(images), trunk.eval()(images))
    out = tmp_path / "timm.safetensors"
    card = export(loaded, out, "timm").read_text()
    assert "name = 'vit_small_patch16_224'" in card and "num_classes=0, num_heads=12" in card
    other = timm.create_model("vit_small_patch16_224", num_classes=0, num_heads=12, checkpoint_path=str(out)).eval()
    large = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(other(large), trunk(large).flatten(1), rtol=1e-4, atol=1e-5)
    with pytest.raises(UserMistake, match="has no vit-s: choose timm or onnx"):
        export(loaded, tmp_path / "tv.safetensors", "torchvision")
    learned: dict[str, Tensor] = {**trunk.state_dict(), "pos_embed": 0.02 * torch.randn(1, 197, 384)}
    with pytest.raises(UserMistake, match="positions are not MoCo v3's fixed ones"):
        load_into(trunk, learned, "vit-s", say=lambda _: None)
