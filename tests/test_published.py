"""Published figures stand beside runs of the very setting that they were measured in, and beside no other."""

from __future__ import annotations

import json
from typing import Any

import pytest

from train.record.published import PUBLISHED, candidates
from train.resolve import resolve


def shown(flags: str, protocol: str = "linear", data_images: int = 1_281_167, task: str = "") -> set[float]:
    config: dict[str, Any] = json.loads(json.dumps(resolve(flags.split()).to_json()))
    rows = candidates({**config, "data_images": data_images}, protocol, task)
    return {next(iter(row.figures.values())) for row in rows}


@pytest.mark.parametrize(
    ("flags", "figures"),
    [
        ("--method care", {72.06}),
        ("--method care --pos absolute", {72.01, 72.02}),
        ("--method care --lambda-att 0", {70.52}),
        ("--method care --design sequential", {69.32}),
        ("--method care --recipe care-conv", set()),
        ("--method care --recipe care-400ep", {74.68}),
        ("--method moco-v2 --recipe moco-v1", {60.6}),
        ("--method moco-v2 --recipe moco-v2-symmetric-800ep --epochs 200", {69.9}),
        ("--method regioncl-m", {69.4, 69.3}),
        ("--method regioncl-m --region.use-paste false", set()),
        ("--method regioncl-m --region.upper 6", set()),
        ("--method regioncl-s --region.use-canvas false", set()),
        ("--method regioncl-d --region.intra-negative false", set()),
        ("--method densecl --dense-weight 0.3", set()),
        ("--method moco-v2 --extra-head", set()),
        ("--method lewel-b --aligned-loss false", set()),
        ("--method lewel-b --c 32", set()),
        ("--method barlow-twins", {73.2, 73.3}),
        ("--method simclr", {64.5}),
        ("--method simclr --projector-layers 3", {66.5}),
        ("--method swav", {73.9}),
        ("--method swav --recipe swav-800ep", {75.3}),
        ("--method swav --recipe swav-bs256-400ep", {74.3}),
        ("--method swav --recipe swav-2x224-400ep", {70.1}),
        ("--method swav --recipe swav-2x224-400ep --projector-layers 3", {70.7}),
        ("--method swav --small-crops 4", set()),
        ("--method simclr --recipe simclr-1000ep", {69.3, 69.1}),
    ],
)
def test_the_figures_are_those_of_the_setting(flags: str, figures: set[float]) -> None:
    assert shown(flags) == figures


def test_rows_of_lewels_table_7_are_those_of_dim_alone() -> None:
    run = "--method lewel-b --recipe lewel-b-in100 --dim 512"
    assert shown(run, data_images=126_689) == {84.6}
    assert shown(f"{run} --c 256", data_images=126_689) == set()


@pytest.mark.parametrize(
    ("flags", "task", "figures"),
    [
        ("--method pixpro", "VOC07+12 Faster R-CNN C4", {58.8}),
        ("--method pixpro --recipe pixpro-400ep", "VOC07+12 Faster R-CNN C4", {60.2}),
        ("--method pixpro --recipe pixpro-400ep", "COCO Mask R-CNN C4 1x", {40.5}),
        ("--method pixpro --transform-layers 0", "VOC07+12 Faster R-CNN C4", set()),
        ("--method lewel-b", "COCO Mask R-CNN FPN 4conv1fc 1x", {41.3}),
        ("--method lewel-b", "COCO Mask R-CNN FPN 4conv1fc 60 steps", {41.3}),
        ("--method lewel-b --recipe lewel-b-400ep", "COCO Mask R-CNN FPN 4conv1fc 2x", {43.4}),
        ("--method care --recipe care-200ep", "COCO Mask R-CNN FPN 1x", {39.5}),
        ("--method care --recipe care-200ep", "COCO Mask R-CNN FPN 4conv1fc 1x", set()),
        ("--method regioncl-m", "COCO Mask R-CNN FPN 1x", {40.1}),
        ("--method regioncl-m --region.use-canvas false", "COCO Mask R-CNN FPN 1x", set()),
        ("--method moco-v2 --symmetric.enabled true", "COCO Mask R-CNN C4 1x", {39.2}),
        ("--method simclr --epochs 200", "VOC07+12 Faster R-CNN C4", set()),
        ("--method simclr --epochs 200 --projector-layers 3", "VOC07+12 Faster R-CNN C4", {55.5}),
    ],
)
def test_a_detector_is_compared_with_those_of_its_box_head(flags: str, task: str, figures: set[float]) -> None:
    assert shown(flags, "detect", task=task) == figures


def test_a_plain_box_head_stands_beside_no_row_of_lewels_four_convolutions() -> None:
    config = json.loads(json.dumps(resolve(["--method", "lewel-b"]).to_json()))
    rows = candidates({**config, "data_images": 1_281_167}, "detect", "COCO Mask R-CNN FPN 1x")
    assert not [row for row in rows if "FPN" in row.task]


def test_every_row_is_there_once() -> None:
    rows = [(row.method, row.arch, row.epochs, row.protocol, row.task, str(row.flags), row.source) for row in PUBLISHED]
    assert len(rows) == len(set(rows)) == 334
