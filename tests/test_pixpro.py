"""PixPro beside its formula, and its crop boxes beside the pixels that real loaders deliver."""

from __future__ import annotations

import dataclasses
import importlib.util
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from models.cell_places import cell_places, near_pairs
from models.losses import pair_consistency
from pipeline.cuts import Cuts
from pipeline.interface import Batch, PipelineConfig, ViewSpec
from pipeline.loaders import build_pipeline
from pipeline.profiles import Profile
from tests.method_cases import build, make_inputs
from tests.method_references import check_against_formula, ready
from tests.small_stores import damage_file, damage_packed, pack
from tools import make_webdataset
from train.build import build_method
from train.config import Config
from train.cuda_graph import GraphedForwardBackward
from train.errors import UserMistake
from train.inputs import InputBuilder, finished_views, made_up_batch, train_views
from train.resolve import resolve
from train.runtime import Runtime

CPU = Runtime(0, 1, torch.device("cpu"), torch.float32, False)
TOY = "--method pixpro --arch resnet10-w16 --image-size 32 --global-batch 8 --data 64 --loader synthetic".split()


@pytest.mark.parametrize(
    "changes",
    [
        {"distance": "pixels", "loss_scale": 1.0, "unit_values": False},
        {"transform_layers": 0, "sharpness": 4.0},
        {"transform_layers": 2, "sharpness": 0.5, "reach": 1.5},
        {"instance_weight": 0.5},
        {"instance_weight": 1.0, "loss_scale": 1.0},
    ],
)
def test_the_papers_forms_and_ablations_are_the_formulas(changes: dict[str, Any]) -> None:
    check_against_formula("pixpro", *ready("pixpro", **changes))


def test_the_branch_of_whole_images_is_there_when_it_counts_and_its_projector_is_averaged() -> None:
    method, inputs = ready("pixpro", instance_weight=0.5)
    assert not [name for name, _ in build("pixpro").named_parameters() if "instance" in name]
    online = {name for name, parameter in method.named_parameters() if "instance" in name and parameter.requires_grad}
    assert {name.split(".")[0] for name in online} == {"instance_projector", "instance_predictor"}
    output = method(inputs)
    output.loss.backward()
    assert all(method.get_parameter(name).grad is not None for name in online)
    before = method.momentum_instance_projector[0].weight.clone()
    with torch.no_grad():
        method.instance_projector[0].weight.add_(1.0)
    method.after_step(output, 0.9)
    moved = method.momentum_instance_projector[0].weight - before
    assert torch.allclose(moved, 0.1 * (method.instance_projector[0].weight - before), atol=1e-6)


def test_made_inputs_have_pairs_no_pairs_and_both_distances_differ() -> None:
    """What the formula is compared on must hold every case, or the comparison would not see a fault."""
    boxes = make_inputs(build("pixpro"), 1).crop_boxes
    pairs = near_pairs(boxes["view1"], boxes["view2"], (2, 2), 0.7)
    assert pairs[:-1].any(dim=2).any(dim=1).sum() >= 4 and not pairs[-1].any() and not pairs.all()
    assert not torch.equal(pairs, pairs.mT)
    flipped = [boxes[name][:, 0] > boxes[name][:, 2] for name in ("view1", "view2")]
    assert any((a != b).any() and (a | b).any() for a, b in [flipped])
    in_pixels = near_pairs(boxes["view1"], boxes["view2"], (4, 4), 0.7, "pixels")
    assert not torch.equal(near_pairs(boxes["view1"], boxes["view2"], (4, 4), 0.7), in_pixels)


def test_equal_views_pair_each_cell_with_itself_and_a_flipped_one_with_its_mirror() -> None:
    whole = torch.tensor([[0.0, 0.0, 50.0, 40.0, 50.0, 40.0]])
    mirrored = whole[:, [2, 1, 0, 3, 4, 5]]
    # Neighbours are half a diagonal's side apart: 0.71 of it in a square, so that 0.7 takes none of them.
    assert torch.equal(near_pairs(whole, whole, (3, 3), 0.5)[0], torch.eye(9, dtype=torch.bool))
    mirror = torch.eye(9).view(3, 3, 9).flip(1).view(9, 9).bool()
    assert torch.equal(near_pairs(whole, mirrored, (3, 3), 0.5)[0], mirror)


def test_an_image_without_pairs_adds_nothing_and_its_gradient_is_zero() -> None:
    prediction = torch.randn(2, 3, 2, 2, requires_grad=True)
    pairs = torch.zeros(2, 4, 4, dtype=torch.bool)
    pairs[0, 1, 2] = True
    loss = pair_consistency(prediction, torch.randn(2, 3, 2, 2), pairs)
    loss.sum().backward()
    assert loss[1] == 0 and -1 <= loss[0] <= 1 and prediction.grad is not None
    assert not prediction.grad[1].any() and prediction.grad[0].any()


# ---------------------------------------------------------------------------------------------------------------------
# Places beside pixels


SIZES = ((90, 140), (150, 100), (64, 64), (200, 90), (77, 131), (120, 121))
GRID, CELL_PX = 7, 15  # an odd number of pixels, so that a cell's centre is the centre of a pixel
VIEWS = tuple(ViewSpec(f"view{number + 1}", GRID * CELL_PX, scale=(0.2, 1.0), draw_id=number) for number in range(2))
FLIPS = Profile(operations=("flip",))
has_ffcv = pytest.mark.skipif(importlib.util.find_spec("ffcv") is None, reason="FFCV is not installed")
has_dali = pytest.mark.skipif(importlib.util.find_spec("nvidia.dali") is None, reason="DALI is not installed")
STORES = [
    pytest.param("folder", "files", id="folder"),
    pytest.param("reference", "files", id="reference"),
    pytest.param("folder", "packed", id="packed"),
    pytest.param("ffcv", "packed", id="ffcv", marks=[pytest.mark.ffcv, pytest.mark.slow, has_ffcv]),
    pytest.param("webdataset", "shards", id="webdataset"),
    pytest.param("dali", "packed", id="dali", marks=[pytest.mark.dali, has_dali]),
]


def _ramp(height: int, width: int) -> Image.Image:
    """An image whose red says how far right a pixel is and whose green how far down."""
    across = np.linspace(0, 255, width)[None, :].repeat(height, 0)
    down = np.linspace(0, 255, height)[:, None].repeat(width, 1)
    return Image.fromarray(np.stack([across, down, np.full_like(across, 128)], axis=2).round().astype(np.uint8))


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Ramps of several sizes as files, packed and as shards; one is damaged, and of the files one is rotated."""
    folder = tmp_path_factory.mktemp("ramps") / "jpeg"
    folder.mkdir()
    for number, (height, width) in enumerate(SIZES):
        _ramp(height, width).save(folder / f"{number}.jpg", quality=100, subsampling=0)
    packed = pack(folder, folder.parent / "ramps.beton")
    damage_packed(packed, 1)
    shards = folder.parent / "shards"
    assert make_webdataset.main([str(folder), str(shards), "--workers", "1"]) == 0
    damage_file(folder / "1.jpg")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    _ramp(*SIZES[0]).transpose(Image.Transpose.ROTATE_90).save(
        folder / "0.jpg", quality=100, subsampling=0, exif=exif.tobytes()
    )
    _ramp(*SIZES[2]).save(folder / "2.png")
    (folder / "2.jpg").unlink()
    return {"files": str(folder), "packed": str(packed), "shards": str(shards)}


def _batches(loader: str, data: str, implementation: str = "auto") -> list[Batch]:
    """Two epochs of one batch, whose views are flipped and otherwise left alone."""
    settings = PipelineConfig(data, VIEWS, len(SIZES), seed=5, workers=1, augment=FLIPS, implementation=implementation)
    pipeline = build_pipeline(loader, settings, quiet=True)
    batches = []
    for epoch in (3, 4):
        pipeline.set_epoch(epoch)
        batches += list(pipeline)
    pipeline.close()
    return batches


def _centres(view: Tensor) -> Tensor:
    """Red and green in 0..1 of the pixels at the centres of a view's cells, (B, S, 2)."""
    deviation, mean = torch.tensor([0.229, 0.224]), torch.tensor([0.485, 0.456])
    middle = slice(CELL_PX // 2, None, CELL_PX)
    return view[:, :2, middle, middle].float().flatten(2).mT * deviation + mean


@pytest.mark.parametrize(("loader", "store"), STORES)
def test_the_pixels_of_every_loader_lie_where_the_places_say(loader: str, store: str, stores: dict[str, str]) -> None:
    batches = _batches(loader, stores[store])
    assert len(batches) == 2
    for batch in batches:
        assert batch.cuts is not None and batch.sizes is not None
        for name, boxes in boxes_of(batch).items():
            seen, image = _centres(batch.views[name]), boxes[:, None, 4:]
            places, _ = cell_places(boxes, (GRID, GRID), "pixels")
            # At the edge an antialiased resize has pixels on one side only; 3 grey levels besides, for JPEG's rounding.
            inner = slice(GRID + 1, -GRID - 1)
            exact = (places - 0.5) / (image - 1)
            torch.testing.assert_close(seen[:, inner], exact[:, inner], rtol=0, atol=0.012)
            # The released code counts from pixel to pixel, which is at most half a pixel away.
            places, _ = cell_places(boxes, (GRID, GRID), "sides")
            assert ((places - exact).abs() * (image - 1) <= 0.5).all()


def boxes_of(batch: Batch) -> dict[str, Tensor]:
    """The boxes of a batch as tensors."""
    assert batch.cuts is not None
    return {name: torch.from_numpy(boxes) for name, boxes in batch.cuts.boxes().items()}


@pytest.mark.parametrize(("loader", "store"), [("folder", "files"), ("folder", "packed")])
def test_boxes_are_drawn_for_the_image_that_was_shown(loader: str, store: str, stores: dict[str, str]) -> None:
    """Of a damaged record another one's size, of a rotated photo the upright one's, and each epoch has its own."""
    found = [boxes_of(batch)["view1"] for batch in _batches(loader, stores[store])]
    for boxes, batch in zip(found, _batches(loader, stores[store], "reference"), strict=True):
        assert torch.equal(boxes, boxes_of(batch)["view1"])
        shown = dict(zip(batch.index.tolist(), batch.sizes.tolist(), strict=True))  # type: ignore[union-attr]
        assert shown[0] == list(SIZES[0]) and shown[1] in [list(size) for size in SIZES if size != SIZES[1]]
        assert [shown[number] for number in range(2, 6)] == [list(size) for size in SIZES[2:]]
        flipped = boxes[:, 0] > boxes[:, 2]
        assert flipped.any() and not flipped.all()
    assert not torch.equal(found[0], found[1])


def test_synthetic_images_are_cut_where_the_places_say() -> None:
    settings = PipelineConfig("64", VIEWS, 8, seed=5, augment=FLIPS)
    pipeline = build_pipeline("synthetic", settings, quiet=True)
    batch = next(iter(pipeline))
    grids = pipeline._grids(batch.index.numpy()) / 255  # type: ignore[attr-defined]
    for name, boxes in boxes_of(batch).items():
        places, _ = cell_places(boxes, (GRID, GRID), "pixels")
        points = (2 * places / boxes[:, None, 4:] - 1)[:, None]
        expected = torch.nn.functional.grid_sample(grids, points, padding_mode="border", align_corners=False)
        torch.testing.assert_close(_centres(batch.views[name]), expected[:, :2, 0].mT, rtol=0, atol=0.0025)


# ---------------------------------------------------------------------------------------------------------------------
# From the loader to the step


def _toy(*flags: str) -> Config:
    return resolve([*TOY, *flags])


def _batch_of(config: Config) -> Batch:
    pipeline = build_pipeline("synthetic", finished_views(PipelineConfig("64", (), 8), config, CPU), quiet=True)
    return next(iter(pipeline))


def test_micro_batches_have_their_part_of_the_boxes() -> None:
    config = _toy("--micro-batch=4")
    method = build_method(config, CPU)
    batch = _batch_of(config)
    whole = boxes_of(batch)
    parts = InputBuilder(config, method, CPU, 1).build(batch, 0)
    assert len(parts) == 2
    for number, each in enumerate(parts):
        assert set(each.crop_boxes) == {"view1", "view2"}
        for name, boxes in each.crop_boxes.items():
            assert torch.equal(boxes, whole[name][4 * number : 4 * number + 4])
            assert any(tensor is boxes for tensor in each.tensors())


def test_ranks_have_the_boxes_of_their_own_images() -> None:
    config = _toy()
    settings = finished_views(PipelineConfig("64", (), 8), config, CPU)
    whole = boxes_of(_batch_of(config))
    for rank in (0, 1):
        mine = dataclasses.replace(settings, rank=rank, world_size=2)
        boxes = boxes_of(next(iter(build_pipeline("synthetic", mine, quiet=True))))
        for name in whole:
            assert torch.equal(boxes[name], whole[name][4 * rank : 4 * rank + 4])


def test_no_other_method_draws_boxes(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(self: Cuts) -> None:
        raise AssertionError("boxes were drawn")

    monkeypatch.setattr(Cuts, "boxes", never)
    config = resolve(["--method", "byol", *TOY[2:]])
    (inputs,) = InputBuilder(config, build_method(config, CPU), CPU, 1).build(_batch_of(config), 0)
    assert inputs.crop_boxes == {} and len(inputs.tensors()) == 2


def test_a_batch_that_no_loader_cut_is_refused_by_name() -> None:
    config = _toy()
    views = {spec.name: torch.randn(8, 3, 32, 32) for spec in train_views(config)}
    builder = InputBuilder(config, build_method(config, CPU), CPU, 1)
    index = torch.arange(8)
    with pytest.raises(UserMistake, match="--method pixpro compares places .* does not say where its views were cut"):
        builder.build(Batch(views, index, index), 0)
    (inputs,) = builder.build(made_up_batch(views, config), 0)
    boxes = inputs.crop_boxes["view1"]
    assert boxes.shape == (8, 6) and (boxes[:, 4:] == 32).all() and (boxes[:, 2:4] <= 32).all()


def test_a_step_as_a_graph_gets_its_own_boxes() -> None:
    """A replay computes with the boxes of its step, not with those of the step that was recorded."""
    method = build("pixpro")
    replayed = GraphedForwardBackward(method, CPU, lambda function: function)
    for step in range(3):
        inputs = make_inputs(method, step)
        expected = method(inputs).loss.detach()
        assert torch.equal(replayed(inputs).loss, expected)
