"""Images that cannot be read: figures are over the others; they are counted, told at once, refused above a share."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.interface import PipelineConfig
from pipeline.loaders import build_pipeline
from pipeline.refusal import TooManyBad
from tests.small_stores import damage_packed, pack
from train.backbone_io import build_encoder, save_backbone
from train.data import RunData
from train.evaluate import main
from train.main import main as train
from train.measure.features import center_view, extract_features
from train.measure.online import health_figures, knn_figures, labelled_features
from train.pretrain import _unreadable
from train.record.evaluations import measurements, unread
from train.record.run import read_run
from train.runtime import Runtime

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12345\n"
CPU = torch.device("cpu")
RUNTIME = Runtime(0, 1, CPU, torch.float32, False)


def picture(seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (5, 5, 3)).astype(np.uint8)
    return Image.fromarray(pixels).resize((48, 48))


@pytest.fixture
def photos(tmp_path) -> Path:
    """Four classes of six photos, each unlike the others."""
    for number in range(24):
        path = tmp_path / "photos" / f"class{number % 4}" / f"{number:02d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(number).save(path)
    return tmp_path / "photos"


@pytest.fixture(scope="module")
def backbone(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("backbone") / "b.safetensors"
    save_backbone(build_encoder("resnet18"), path, arch="resnet18", method="moco-v2")
    return path


def spoil(folder: Path, every: int, data: bytes = POINTER) -> int:
    files = sorted(folder.rglob("*.jpg"))[::every]
    for file in files:
        file.write_bytes(data)
    return len(files)


def copy(folder: Path, to: Path) -> Path:
    for file in folder.rglob("*.jpg"):
        (to / file.parent.name).mkdir(parents=True, exist_ok=True)
        (to / file.parent.name / file.name).write_bytes(file.read_bytes())
    return to


def opened(data: Path, size: int = 32):
    config = PipelineConfig(str(data), (center_view(size),), 5, order="sequential", drop_last=False)
    return build_pipeline("folder", config, quiet=True)


@pytest.mark.parametrize("kind", ["pointer", "empty", "cut", "page", "packed"])
def test_features_are_of_what_can_be_read(photos, tmp_path, kind, capfd) -> None:
    encoder = build_encoder("resnet18")
    whole = extract_features(encoder, opened(photos), CPU)
    if kind == "packed":
        data = tmp_path / "p.beton"
        pack(photos, data)
        damage_packed(data, 3)
        damage_packed(data, 10)
        bad = [3, 10]
    else:
        data = copy(photos, tmp_path / "copy")
        cut = sorted(data.rglob("*.jpg"))[0].read_bytes()[:400]
        spoil(data, 5, {"pointer": POINTER, "empty": b"", "cut": cut, "page": b"<!DOCTYPE html><p>gone"}[kind])
        bad = list(range(0, 24, 5))
    found = extract_features(encoder, opened(data), CPU)
    kept = [number for number in range(24) if number not in bad]
    assert found.bad == len(bad) and found.samples.tolist() == kept
    assert torch.equal(found.labels, whole.labels[kept]) and torch.allclose(found.features, whole.features[kept])
    assert capfd.readouterr().err.count("cannot be used: ") == 1, "told once, when the first appears"
    with pytest.raises(TooManyBad, match=f"{len(bad)} of 24 images cannot be read, more than a share of 0.05"):
        extract_features(encoder, opened(data), CPU, max_bad=0.05)


@pytest.mark.parametrize("protocol", ["knn", "linear", "semi"])
def test_a_protocol_measures_what_can_be_read(photos, backbone, tmp_path, protocol, capfd) -> None:
    val = copy(photos, tmp_path / "val")
    bad = spoil(val, 5)
    output = tmp_path / "o.json"
    flags = ["--checkpoint", str(backbone), "--data", str(photos), "--val-data", str(val), "--image-size", "32"]
    own = {
        "knn": ["--k", "1"],
        "linear": ["--recipe", "logistic", "--lrs", "1e-9"],
        "semi": ["--fraction", "1", "--epochs", "1", "--global-batch", "12"],
    }[protocol]
    assert main([protocol, *flags, *own, "--output", str(output)]) == 0
    result = json.loads(output.read_text())
    assert result["bad_images"] == {"--val-data": bad} and result["val_images"] == 24 - bad
    if protocol == "knn":
        assert result["top1"] == 1.0, "of those that can be read each finds itself"
        measured = measurements("eval-knn.json", result)[0]
        assert unread(measured.facts) == f" without {bad} unreadable ones"
    said = capfd.readouterr()
    assert f"{bad} images cannot be read and are left out" in said.out and said.err.count("git lfs pull") == 1
    if protocol != "knn":
        return
    assert main([protocol, *flags, *own, "--output", str(output), "--max-bad", "0.2"]) == 3
    assert "5 of 24 images cannot be read" in capfd.readouterr().err.splitlines()[-1]


def test_a_data_set_of_pointers_is_one_line(photos, backbone, tmp_path, capfd) -> None:
    spoil(photos, 1)
    flags = ["--checkpoint", str(backbone), "--data", str(photos), "--val-data", str(photos), "--image-size", "32"]
    assert main(["knn", *flags, "--output", str(tmp_path / "o.json")]) == 3
    assert "64 others" in capfd.readouterr().err.splitlines()[-1] and not (tmp_path / "o.json").exists()


def test_a_probe_learns_the_label_of_the_picture_it_is_shown(photos, tmp_path) -> None:
    from train.eval.session import labels_of_pixels, linear_views

    spoil(photos, 3)
    config = PipelineConfig(str(photos), linear_views(32), 6, order="global", augment="linear")
    pipeline = build_pipeline("auto", config, quiet=True)
    replaced = 0
    for epoch in (0, 1):
        pipeline.set_epoch(epoch)
        for batch in pipeline:
            labels = labels_of_pixels(pipeline, epoch, batch)
            shown = pipeline.shown(epoch, batch.index.numpy())
            bad = pipeline.stats().bad_records
            assert not set(shown.tolist()) & set(bad)
            replaced += int((torch.from_numpy(shown) != batch.index).sum())
            assert labels.tolist() == pipeline.labels[shown].tolist()
            assert batch.label.tolist() == pipeline.labels[batch.index].tolist()
    assert replaced == 16
    pipeline.close()


def test_the_figures_of_training_leave_bad_images_out_and_count_them(photos, tmp_path) -> None:
    val = copy(photos, tmp_path / "val")
    spoil(val, 4)
    torch.manual_seed(0)
    encoder = build_encoder("resnet18")
    method = SimpleNamespace(encoder=encoder, features=lambda images: encoder(images.float()).mean((2, 3)))
    views = tuple(center_view(32, name) for name in ("view1", "view2"))
    health = PipelineConfig(str(val), views, 5, order="sequential", drop_last=False)
    bank, queries, pair = opened(photos), opened(val), build_pipeline("auto", health, quiet=True)
    data = RunData(bank, pair, "validation", bank, queries, np.arange(24))
    figures = knn_figures(labelled_features(method, data, RUNTIME), RUNTIME)  # type: ignore[arg-type]
    assert (figures["train_images"], figures["val_images"], figures["val_bad"]) == (24, 18, 6)
    assert "train_bad" not in figures and unread(figures) == " without 6 unreadable ones"
    # Two equal views of 18 images are each other's nearest; another picture in an unreadable one's place would be there
    # twice.
    assert health_figures(method, data, RUNTIME)["view_retrieval"] == 1.0  # type: ignore[arg-type]
    data.close()


TRAINING = (
    "--method moco-v2 --recipe moco-v2-small --arch resnet10-w16 --image-size 32 --queue-size 8 --bn.group-size 4 "
    "--no-report --holdout 0 --device cpu --global-batch 8"
).split()


def test_training_on_pointers_alone_ends_in_one_line(photos, tmp_path, capfd) -> None:
    spoil(photos, 1)
    assert train([*TRAINING, "--data", str(photos), "--run-dir", str(tmp_path / "run"), "--max-steps", "2"]) == 3
    assert "64 others" in capfd.readouterr().err.splitlines()[-1]


def test_training_on_pointers_by_half_is_refused_unless_asked_for(photos, tmp_path, capfd) -> None:
    spoil(photos, 2)
    flags = [*TRAINING, "--data", str(photos), "--run-dir", str(tmp_path / "run"), "--max-steps", "3"]
    assert train(flags) == 3
    line = capfd.readouterr().err.splitlines()[-1]
    assert "cannot be used, for example" in line and "git lfs pull; --max-bad 0.25 allows no more" in line
    assert train([*flags, "--max-bad", "0.5"]) == 0
    ends = [row for row in read_run(tmp_path / "run").rows if row["kind"] == "end"]
    assert [row["bad_records"] for row in ends] == [12]


@pytest.mark.parametrize(("every", "limit", "images"), [(2, 0.25, 15), (4, 0.25, None), (4, 0.2, 20), (24, 0.0, 5)])
def test_a_share_is_judged_where_enough_images_have_come(photos, every, limit, images) -> None:
    """After one pass, or before its end as soon as the rest could no longer change the judgement."""
    spoil(photos, every)
    config = PipelineConfig(str(photos), (center_view(32),), 5, order="sequential", drop_last=False, max_bad=limit)
    pipeline = build_pipeline("folder", config, quiet=True)
    if images is None:
        assert sum(len(batch.index) for batch in pipeline) == 24
    else:
        with pytest.raises(TooManyBad, match=f"of {images} images of .* cannot be used"):
            list(pipeline)
    pipeline.close()


def test_what_a_folder_holds_beside_images_is_told_before_training(photos) -> None:
    for name in ("class0/._00.jpg", "@eaDir/00.jpg", "class1/clip.mp4"):
        (photos / name).parent.mkdir(exist_ok=True)
        (photos / name).write_bytes(b"x")
    train = opened(photos)
    found = RunData(train, train, "training", None, None, np.arange(24)).text()
    assert found == "data: 24 images of 4 classes, all trained on; passed over 2 system files, 1 .mp4"
    train.close()


def test_the_bad_images_of_all_ranks_are_counted() -> None:
    own = SimpleNamespace(pipeline=SimpleNamespace(stats=lambda: SimpleNamespace(bad_records={3: "cut"})))
    job = SimpleNamespace(
        stream=own, runtime=SimpleNamespace(gather_objects=lambda mine: [mine, {7: "gone", 3: "cut"}])
    )
    assert _unreadable(job) == {3: "cut", 7: "gone"}  # type: ignore[arg-type]
