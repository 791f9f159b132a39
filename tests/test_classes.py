"""Two data sets meet by class name in every store: a class that one side lacks shifts no other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.classes import renumbered
from pipeline.interface import PipelineConfig, ViewSpec
from pipeline.loaders import build_pipeline
from tests.small_stores import pack
from tools import make_webdataset
from train.errors import UserMistake
from train.eval import splits

TRAIN, VAL = ("ant", "bee", "cat", "dog"), ("ant", "cat", "dog")


def test_labels_follow_the_names() -> None:
    labels = np.array([2, 0, 1, -1, 2])
    assert renumbered(labels, VAL, TRAIN).tolist() == [3, 0, 2, -1, 3]
    assert renumbered(labels, VAL, VAL).tolist() == labels.tolist()


def test_a_class_that_the_other_lacks_is_refused_where_an_image_has_it() -> None:
    with pytest.raises(ValueError, match="class bee and 1 more is not among the 2 classes"):
        renumbered(np.array([0, 1, 2]), ("ant", "bee", "cat"), ("ant", "dog"))
    assert renumbered(np.array([0, 2]), ("ant", "bee", "cat"), ("ant", "cat")).tolist() == [0, 1]


def test_an_accent_apart_from_its_letter_is_the_same_name() -> None:
    assert renumbered(np.array([0]), ("caf\u0065\u0301",), ("x", "caf\u00e9")).tolist() == [1]


def folder(root: Path, classes: tuple[str, ...]) -> Path:
    for name in classes:
        (root / name).mkdir(parents=True)
        for number in range(2):
            Image.new("RGB", (40, 40), (10 * number, 50, 90)).save(root / name / f"{number}.jpg")
    return root


def as_folder(source: Path, out: Path) -> str:
    return str(source)


def as_list(source: Path, out: Path) -> str:
    out.with_suffix(".txt").write_text("".join(f"{path}\n" for path in sorted(source.rglob("*.jpg"))))
    return str(out.with_suffix(".txt"))


def as_packed(source: Path, out: Path) -> str:
    pack(source, out.with_suffix(".beton"))
    return str(out.with_suffix(".beton"))


def as_shards(source: Path, out: Path) -> str:
    assert make_webdataset.main([str(source), str(out)]) == 0
    return str(out)


@pytest.mark.parametrize("store", [as_folder, as_list, as_packed, as_shards])
def test_every_store_numbers_its_labels_by_the_names_of_another(
    store: Callable[[Path, Path], str], tmp_path: Path
) -> None:
    val = store(folder(tmp_path / "val", VAL), tmp_path / "stored")
    assert splits.class_names(val) == list(VAL)
    config = PipelineConfig(data=val, views=(ViewSpec("v", 32, "center"),), global_batch=2, order="sequential")
    for classes, expected in (((), [0, 0, 1, 1, 2, 2]), (TRAIN, [0, 0, 2, 2, 3, 3])):
        pipeline = build_pipeline("auto", PipelineConfig(**{**vars(config), "classes": classes}), quiet=True)
        try:
            assert pipeline.labels.tolist() == expected
            assert torch_labels(pipeline) == expected, "batches carry the same numbers"
            assert pipeline.classes == (classes or VAL)
        finally:
            pipeline.close()
    with pytest.raises(ValueError, match="class cat"):
        build_pipeline("auto", PipelineConfig(**{**vars(config), "classes": ("ant", "dog")}), quiet=True)


def torch_labels(pipeline: object) -> list[int]:
    pipeline.set_epoch(0)  # type: ignore[attr-defined]
    return [label for batch in pipeline for label in batch.label.tolist()]  # type: ignore[attr-defined]


def test_validation_images_of_an_unknown_class_are_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    train, val = folder(tmp_path / "train", VAL), folder(tmp_path / "val", TRAIN)
    with pytest.raises(UserMistake, match="for example in bee"):
        splits.check_classes(str(train), str(val))
