"""The detection protocol: schedules, order, training, exact resumption, ranks, and the command from end to end."""

from __future__ import annotations

import csv
import dataclasses
import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.distributed import run_ranks
from tests.runs import last_wins
from tools.support.drawn_sets import COLOURS, coco_document, write_coco
from train.backbone_io import build_encoder, save_backbone
from train.errors import NonFinite, UserMistake
from train.eval import detect as detect_command
from train.eval.detect import check, headline, plan_of
from train.eval.detection.data import read_data
from train.eval.detection.feed import TrainingFeed
from train.eval.detection.models import DetectorConfig, build_detector
from train.eval.detection.records import trainable
from train.eval.detection.schedule import Sizes, draw_size_and_flip, epoch_batches, resized, schedule_of
from train.eval.detection.training import Course, build_state, precise_statistics, train, train_step
from train.eval.options import DetectConfig
from train.eval.tuning import TuningCheckpoints
from train.evaluate import main, protocol
from train.runtime import Runtime, wrap_distributed
from train.state import TuningState

RESULTS = Path(__file__).resolve().parents[1] / "tools" / "results"
NAMES = ("faster-rcnn-c4", "mask-rcnn-c4", "faster-rcnn-fpn", "mask-rcnn-fpn", "retinanet")
ONE = Runtime(0, 1, torch.device("cpu"), torch.float32, False)
ANCHORS = (8.0, 16.0, 32.0, 48.0, 64.0)
SMALL = Sizes((48, 64), 64, 96, 96)


# --- schedules, sizes and order ---


def test_published_schedules() -> None:
    rows = {
        ("1x", "coco", "mask-rcnn-c4"): (90_000, (60_000, 80_000), 1000, 16, 0.02),
        ("2x", "coco", "mask-rcnn-fpn"): (180_000, (120_000, 160_000), 1000, 16, 0.02),
        ("1x", "coco", "retinanet"): (90_000, (60_000, 80_000), 1000, 16, 0.01),
        ("24k", "voc", "faster-rcnn-c4"): (24_000, (18_000, 22_000), 100, 16, 0.02),
        ("24k", "cityscapes", "mask-rcnn-fpn"): (24_000, (18_000,), 1000, 8, 0.01),
    }
    for (name, kind, detector), expected in rows.items():
        assert dataclasses.astuple(schedule_of(name, kind, detector)) == expected  # type: ignore[arg-type]


def test_learning_rate_warms_up_and_falls() -> None:
    schedule = schedule_of("1x", "coco", "mask-rcnn-c4")
    assert schedule.lr_at(0, 0.02) == pytest.approx(0.02 / 1000)
    assert schedule.lr_at(500, 0.02) == pytest.approx(0.02 * (0.5 * 0.001 + 0.5))
    assert [schedule.lr_at(step, 0.02) for step in (1000, 59_999)] == [0.02, 0.02]
    assert schedule.lr_at(60_000, 0.02) == pytest.approx(0.002) and schedule.lr_at(80_000, 0.02) == pytest.approx(2e-4)
    short = schedule.scaled_to(900)
    assert (short.steps, short.milestones, short.warmup) == (900, (600, 800), 10)


def test_plan_follows_the_format_and_the_flags() -> None:
    assert plan_of(DetectConfig(), "coco").task == "COCO Mask R-CNN FPN 1x"
    assert plan_of(DetectConfig(box_head="4conv1fc"), "coco").task == "COCO Mask R-CNN FPN 4conv1fc 1x"
    short = DetectConfig(detector="faster-rcnn-fpn", box_head="4conv1fc", steps=60)
    assert plan_of(short, "voc").task == "VOC07+12 Faster R-CNN FPN 4conv1fc 60 steps"
    assert plan_of(DetectConfig(detector="faster-rcnn-c4"), "voc").task == "VOC07+12 Faster R-CNN C4"
    assert plan_of(DetectConfig(), "cityscapes").task == "Cityscapes Mask R-CNN FPN"
    assert plan_of(DetectConfig(schedule="12k"), "coco").task == "COCO Mask R-CNN 12k"
    plan = plan_of(DetectConfig(global_batch=4, steps=90, longest_side=1200), "coco")
    assert plan.peak == pytest.approx(0.005) and plan.schedule.milestones == (60, 80) and plan.sizes.longest == 1200
    assert plan.sizes.test_longest == 1333, "RegionCL's log: MAX_SIZE_TRAIN 1200, MAX_SIZE_TEST 1333"
    assert plan_of(DetectConfig(test_longest_side=900), "coco").sizes.test_longest == 900
    assert plan.sizes.train == (640, 672, 704, 736, 768, 800) and "steps" in plan.task
    assert plan_of(DetectConfig(), "voc").sizes.train[0] == 480
    assert plan_of(DetectConfig(), "cityscapes").sizes == Sizes(tuple(range(800, 1025, 32)), 1024, 2048, 2048)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"lr": -1.0}, "--lr -1.0"),
        ({"regions": 0}, "--regions 0"),
        ({"train_sides": (0,)}, "--train-sides"),
        ({"detector": "retinanet", "box_head": "4conv1fc"}, "--box-head"),
        ({"detector": "mask-rcnn-c4", "box_head": "4conv1fc"}, "--box-head"),
        ({"detector": "retinanet", "regions": 64}, "--regions"),
    ],
)
def test_flags_out_of_range_or_at_odds_are_refused(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(UserMistake, match=message):
        check(dataclasses.replace(DetectConfig(), **flags))


def test_sizes_keep_the_aspect_and_the_limit() -> None:
    assert resized(480, 640, 800, 1333) == (800, 1067) and resized(640, 480, 800, 1333) == (1067, 800)
    assert resized(427, 640, 800, 1333) == (800, 1199)
    assert resized(300, 900, 800, 1333) == (444, 1333)  # the long edge decides
    assert resized(1024, 2048, 1024, 2048) == (1024, 2048)


def test_sizes_and_flips_are_spread_evenly_and_addressed_by_step_and_position() -> None:
    sides = (640, 672, 704, 736, 768, 800)
    draws = [draw_size_and_flip(1, step, position, sides) for step in range(150) for position in range(16)]
    counts = [sum(side == other for side, _ in draws) for other in sides]
    assert min(counts) > 330 and max(counts) < 470, counts
    assert 1080 < sum(flip for _, flip in draws) < 1320
    assert draw_size_and_flip(1, 7, 3, sides) == draws[7 * 16 + 3]
    assert [draw_size_and_flip(2, 0, position, sides) for position in range(16)] != draws[:16]


@pytest.mark.parametrize(("images", "share", "batch"), [(103, 0.6, 8), (16, 1.0, 16), (21, 0.3, 4)])
def test_batches_share_an_orientation_and_no_image_comes_twice(images: int, share: float, batch: int) -> None:
    landscape = np.arange(images) < share * images
    epochs = [epoch_batches(5, epoch, landscape, batch) for epoch in range(3)]
    for blocks in epochs:
        assert blocks.shape == (images // batch, batch)
        assert len(set(blocks.reshape(-1).tolist())) == blocks.size
        mixed = sum(0 < landscape[block].sum() < batch for block in blocks)
        assert mixed <= 1 + (2 * batch - 2) // batch
    assert images == batch or not np.array_equal(epochs[0], epochs[1])
    np.testing.assert_array_equal(epochs[2], epoch_batches(5, 2, landscape, batch))
    whole = [block for block in epochs[0] if landscape[block].all()]
    assert len(whole) == landscape.sum() // batch or (landscape.all() and len(whole) == images // batch)


# --- training ---


@pytest.fixture
def synthetic(tmp_path: Path) -> Path:
    """COCO's folder with eight small drawn images, two of them for validation as well."""
    document = coco_document(8)
    write_coco(tmp_path / "coco", document)
    write_coco(tmp_path / "coco", coco_document(2), "val")
    return tmp_path / "coco"


def make_feed(root: Path, masks: bool, sizes: Sizes = SMALL, batch: int = 2, **more: int) -> TrainingFeed:
    return TrainingFeed(trainable(read_data(str(root), "train", masks, 1)), sizes, batch, 0, **more)


def make_state(name: str, classes: int, steps: int, lr: float) -> tuple[TuningState, Course]:
    torch.manual_seed(0)
    config = DetectorConfig(name, classes, anchor_sizes=ANCHORS, regions=4)  # type: ignore[arg-type]
    course = Course(schedule_of("1x", "coco", name).scaled_to(steps), lr, 1e-4, 0, 2, 1)
    return build_state(build_detector(config, build_encoder("resnet18")), course, ONE), course


def test_the_feed_gives_the_same_samples_whatever_came_before(synthetic: Path) -> None:
    feeds = [make_feed(synthetic, True, batch=4, workers=workers) for workers in (1, 3)]
    halves = [make_feed(synthetic, True, batch=4, rank=rank, world_size=2) for rank in range(2)]
    try:
        for step in (0, 1, 2, 5):
            first = feeds[0].samples(step)
            joined = halves[0].samples(step) + halves[1].samples(step)
            for one, two, three in zip(first, feeds[1].samples(step), joined, strict=True):
                for name in ("image", "boxes", "labels", "masks"):
                    assert torch.equal(getattr(one, name), getattr(two, name))
                    assert torch.equal(getattr(one, name), getattr(three, name))
            assert [sample.draw for sample in first] == [(step, position) for position in range(4)]
    finally:
        for feed in (*feeds, *halves):
            feed.close()
    with pytest.raises(UserMistake, match="--global-batch 9"):
        make_feed(synthetic, True, batch=9)


def test_boxes_and_masks_move_with_the_image(synthetic: Path) -> None:
    feed = make_feed(synthetic, True, Sizes((48, 64, 80), 64, 200, 200), batch=8)
    colours = np.array(COLOURS)
    try:
        for sample in feed.samples(0) + feed.samples(1):
            for box, label, mask in zip(sample.boxes, sample.labels, sample.masks, strict=True):
                x0, y0, x1, y1 = box.round().int().tolist()
                inner = sample.image[:, y0 + 2 : y1 - 2, x0 + 2 : x1 - 2].float().mean((1, 2))
                assert np.abs(inner.numpy() - colours[int(label)]).max() < 4
                rows, columns = torch.where(mask)
                extent = torch.tensor([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
                assert (extent - box).abs().max() <= 1
    finally:
        feed.close()


def run_training(
    root: Path, folder: Path, name: str, stop_at: int, steps: int, resume: bool
) -> tuple[TuningState, list[dict[str, Any]]]:
    state, course = make_state(name, 3, steps, 0.01)
    feed = make_feed(root, name.startswith("mask"))
    checkpoints = TuningCheckpoints(folder, {"name": name}, ONE, resume)
    checkpoints.restore(state)
    try:
        part = dataclasses.replace(course, schedule=dataclasses.replace(course.schedule, steps=stop_at))
        return state, train(state, state.model, feed, part, ONE, checkpoints, None, lambda _: None)
    finally:
        feed.close()


@pytest.mark.parametrize("name", ["mask-rcnn-c4", "retinanet"])
def test_a_resumed_run_is_byte_identical(synthetic: Path, tmp_path: Path, name: str) -> None:
    whole, rows = run_training(synthetic, tmp_path / "whole", name, 3, 3, False)
    run_training(synthetic, tmp_path / "parts", name, 2, 3, False)
    torch.manual_seed(123)  # whatever the process drew before must not matter
    _, resumed_rows = run_training(synthetic, tmp_path / "parts", name, 3, 3, True)
    for file in ("model.safetensors", "optimizer.safetensors"):
        path = f"step_00000003/{file}"
        assert (tmp_path / "whole" / path).read_bytes() == (tmp_path / "parts" / path).read_bytes()
    assert rows == resumed_rows and whole.step == 3
    assert len({row["loss"] for row in rows}) == 3


def _rank_steps(rank: int, world: int, root: str, name: str) -> dict[str, torch.Tensor]:
    group = None
    if world > 1:
        group = torch.distributed.new_group(backend="gloo")
    runtime = Runtime(rank, world, torch.device("cpu"), torch.float32, False, group)
    state, course = make_state(name, 3, 2, 0.01)
    feed = make_feed(Path(root), name.startswith("mask"), Sizes((64,), 64, 96, 96), rank=rank, world_size=world)
    wrapped = wrap_distributed(state.model, runtime, False)
    try:
        state.model.train()
        train_step(state, wrapped, feed.samples(0), course.peak, runtime)
    finally:
        feed.close()
    return {key: value.clone() for key, value in state.model.state_dict().items()}


@pytest.mark.parametrize("name", ["mask-rcnn-c4", "retinanet"])
def test_two_ranks_train_as_one(synthetic: Path, tmp_path: Path, name: str) -> None:
    alone = _rank_steps(0, 1, str(synthetic), name)
    first, second = run_ranks(_rank_steps, 2, tmp_path, str(synthetic), name)
    fresh = make_state(name, 3, 2, 0.01)[0].model.state_dict()
    for key, value in alone.items():
        assert torch.equal(first[key], second[key]), key
        moved = (value.float() - fresh[key].float()).abs().max().item()
        difference = (first[key].float() - value.float()).abs().max().item()
        assert difference <= max(0.02 * moved, 2e-6), f"{key}: {difference} apart, moved by {moved}"


def test_a_loss_that_is_not_finite_ends_the_run_with_the_weights_as_they_were(synthetic: Path) -> None:
    state, _ = make_state("retinanet", 3, 2, 0.01)
    state.model.train()
    before = {key: value.clone() for key, value in state.model.named_parameters()}
    feed = make_feed(synthetic, False)
    with torch.no_grad():
        state.model.net.head.classification_head.cls_logits.bias.fill_(float("nan"))
    with pytest.raises(NonFinite, match="not finite at step 0"):
        train_step(state, state.model, feed.samples(0), 0.01, ONE)
    feed.close()
    changed = [key for key, value in state.model.named_parameters() if not torch.equal(value, before[key])]
    assert changed == ["net.head.classification_head.cls_logits.bias"]


def test_precise_statistics_are_the_mean_over_batches(synthetic: Path) -> None:
    state, _ = make_state("retinanet", 3, 2, 0.01)
    model = state.model
    feed = make_feed(synthetic, False, Sizes((64,), 64, 96, 96), batch=4)
    norm = model.net.backbone.body.stem["bn1"]
    seen: list[torch.Tensor] = []
    norm.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach()))
    norm.running_mean.fill_(99.0)
    try:
        assert precise_statistics(model, feed, 3, 3, ONE) == 26
    finally:
        feed.close()
    torch.testing.assert_close(norm.running_mean, torch.stack([x.mean((0, 2, 3)) for x in seen]).mean(0))
    torch.testing.assert_close(norm.running_var, torch.stack([x.var((0, 2, 3)) for x in seen]).mean(0))
    assert norm.momentum == 0.1 and len(seen) == 3


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name.startswith("faster") else ()) for name in NAMES]
)  # those with masks have the losses of those without
def test_the_loss_falls_over_twenty_steps_on_real_images(eight: Path, name: str) -> None:
    state, course = make_state(name, 80, 20, 0.01)
    feed = make_feed(eight, name.startswith("mask"), Sizes((40,), 40, 64, 64))
    samples = feed.samples(0)
    feed.close()
    losses = []
    state.model.train()
    for step in range(20):
        again = [dataclasses.replace(sample, draw=(step, position)) for position, sample in enumerate(samples)]
        found = train_step(state, state.model, again, course.peak, ONE)
        # RetinaNet divides by a moving average, which falls as well on so small images.
        losses.append(sum(value.item() for value in found.values()) * float(getattr(state.model, "positives", 1.0)))
    # RetinaNet starts from logits of prior 0.01 and small weights, and so more slowly.
    assert np.mean(losses[-5:]) < (0.93 if name == "retinanet" else 0.7) * np.mean(losses[:3]), losses


@pytest.fixture(scope="module")
def eight(unpack: Callable[..., Path]) -> Path:
    """The eight images of the sample whose smallest object covers most of the image, for training and validation."""
    root = unpack("detection-sample")
    document = json.loads((root / "annotations" / "instances_train.json").read_text())
    areas: dict[int, list[float]] = {}
    crowded = {entry["image_id"] for entry in document["annotations"] if entry["iscrowd"]}
    for entry in document["annotations"]:
        areas.setdefault(entry["image_id"], []).append(entry["area"])
    share = {
        image["id"]: min(areas[image["id"]]) / (image["width"] * image["height"])
        for image in document["images"]
        if image["id"] in areas and image["id"] not in crowded
    }
    chosen = sorted(share, key=lambda number: -share[number])[:8]
    document["images"] = [image for image in document["images"] if image["id"] in chosen]
    document["annotations"] = [entry for entry in document["annotations"] if entry["image_id"] in chosen]
    for part in ("train", "val"):
        (root / "annotations" / f"instances_{part}.json").write_text(json.dumps(document))
    return root


# --- the command ---


@pytest.fixture
def backbone(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    path = tmp_path / "r18.safetensors"
    save_backbone(build_encoder("resnet18"), path, arch="resnet18", method="moco-v2")
    return path


def command(backbone: Path, data: Path, *more: str) -> list[str]:
    return last_wins(
        [
            "detect",
            "--checkpoint",
            str(backbone),
            "--data",
            str(data),
            "--val-data",
            str(data),
            "--train-sides",
            "48,64",
            "--test-side",
            "64",
            "--longest-side",
            "96",
            "--anchor-sizes",
            "8,16,32,48,64",
            "--global-batch",
            "2",
            "--precise-bn-steps",
            "1",
            "--workers",
            "1",
            "--device",
            "cpu",
            *more,
        ]
    )


def test_the_command_stops_continues_and_measures(
    backbone: Path, synthetic: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ("--detector", "mask-rcnn-fpn", "--regions", "4", "--steps", "2", "--log-every", "1")
    with monkeypatch.context() as patched:

        def asked(*arguments: Any) -> Any:
            signal.raise_signal(signal.SIGTERM)
            return train(*arguments)

        patched.setattr(detect_command, "train", asked)
        # The command runs in the tests' own process, which a slow step must not end.
        patched.setattr("train.stop.GRACE_S", 600.0)
        assert main(command(backbone, synthetic, *flags)) == 75
    assert "stopped by SIGTERM after step 1, saved" in capsys.readouterr().err
    assert main(command(backbone, synthetic, *flags, "--lr", "0.5")) == 2
    assert "other settings (lr:" in capsys.readouterr().err
    assert main(command(backbone, synthetic, *flags)) == 0
    out = capsys.readouterr().out
    for said in ("all 120 tensors", "continued after step 1", "statistics of 28 norm layers", "COCO mask", "AP75"):
        assert said in out
    result = json.loads((backbone.parent / "r18.eval-detect-mask-rcnn-fpn-1x.json").read_text())
    assert result["protocol"] == "detect" and result["method"] == "moco-v2" and result["classes"] == 3
    assert set(result["metrics"]) == {f"{what}_ap{level}" for what in ("box", "mask") for level in ("", "50", "75")}
    assert all(0 <= value <= 1 for value in result["metrics"].values())
    assert [row["step"] for row in result["history"]] == [1, 2] and result["train_images"] == 8
    assert not list(backbone.parent.glob("*.state"))


def test_no_stopwatch_chooses_convolutions_of_batches_that_differ(
    backbone: Path, synthetic: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """cuDNN would time each new shape of each layer anew, for seconds at nearly every step."""
    seen: list[bool] = []

    def planned(*_: Any) -> Any:
        seen.append(torch.backends.cudnn.benchmark)
        raise UserMistake("far enough")

    monkeypatch.setattr(detect_command, "plan_of", planned)
    assert main(command(backbone, synthetic)) == 2
    assert seen == [False]


def test_what_cannot_be_done_is_one_line(
    backbone: Path, synthetic: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    swin, partial = tmp_path / "swin.safetensors", tmp_path / "partial.safetensors"
    save_backbone(build_encoder("swin-t"), swin, arch="swin-t")
    encoder = build_encoder("resnet18")
    del encoder.layer4
    save_backbone(encoder, partial, arch="resnet18")
    for file, message in ((swin, "swin-t is no backbone of the published detectors"), (partial, "is not a whole")):
        assert main(command(file, synthetic)) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert main(command(backbone, tmp_path / "none")) == 2
    assert "does not exist" in capsys.readouterr().err


def test_detect_is_among_the_protocols() -> None:
    assert protocol("detect").__module__ == "train.eval.detect"


def test_the_headline_is_the_data_s_own_metric() -> None:
    coco, own = {"AP": 0.3, "AP50": 0.5, "AP75": 0.2}, {"AP": 0.4, "AP50": 0.6, "AP75": 0.5}
    assert headline({"COCO box": coco, "VOC box": own}) == {"box_ap": 0.4, "box_ap50": 0.6, "box_ap75": 0.5}
    city = headline({"COCO box": coco, "COCO mask": coco, "Cityscapes mask": {"AP": 0.1, "AP50": 0.2}})
    assert city == {"box_ap": 0.3, "box_ap50": 0.5, "box_ap75": 0.2, "mask_ap": 0.1, "mask_ap50": 0.2}


# --- long runs ---

OVERFIT = {  # detector -> (steps, learning rate, proposals an image)
    "faster-rcnn-c4": (300, 0.02, 8),
    "mask-rcnn-c4": (300, 0.02, 8),
    "faster-rcnn-fpn": (300, 0.02, 16),
    "mask-rcnn-fpn": (300, 0.02, 16),
    "retinanet": (700, 0.01, 512),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_each_detector_learns_eight_images_by_heart(backbone: Path, eight: Path, name: str, tmp_path: Path) -> None:
    steps, lr, regions = OVERFIT[name]
    output = tmp_path / "result.json"
    arguments = [
        "detect",
        "--checkpoint",
        str(backbone),
        "--data",
        str(eight),
        "--val-data",
        str(eight),
        "--detector",
        name,
        "--steps",
        str(steps),
        "--lr",
        str(lr),
        "--global-batch",
        "2",
        "--train-sides",
        "64",
        "--test-side",
        "64",
        "--anchor-sizes",
        "8,16,32,48,64",
        "--precise-bn-steps",
        "4",
        "--workers",
        "1",
        "--output",
        str(output),
        *(() if name == "retinanet" else ("--regions", str(regions))),
    ]
    assert main(arguments) == 0
    result = json.loads(output.read_text())
    assert result["metrics"]["box_ap50"] > 0.5
    assert "mask_ap50" not in result["metrics"] or result["metrics"]["mask_ap50"] > 0.4


def test_committed_rows_of_the_long_runs_hold() -> None:
    path = RESULTS / "transfer.csv"
    if not path.is_file():
        pytest.skip("tools/results/transfer.csv has no rows yet")
    with path.open(newline="") as stream:
        rows = [
            row
            for row in csv.DictReader(stream)
            if row["metric"] == "box AP50" and "8 images, measured on the same" in row["setting"]
        ]
    assert rows and all(float(row["median"]) > 0.5 for row in rows)
