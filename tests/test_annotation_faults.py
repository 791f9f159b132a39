"""The short form of the damaged annotations: every format with every mutation once, and what each of them showed."""

from __future__ import annotations

import json
import re
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from tests.faults import annotations
from tests.faults.annotations import FORMATS, attack
from tools.support.drawn_sets import coco_document, write_coco, write_voc
from train.errors import UserMistake
from train.eval.detection.coco_checks import run_lengths
from train.eval.detection.data import read_data
from train.eval.segmentation.layouts import read_layout
from train.eval.splits import read_list


def test_every_reader_survives_damaged_annotations(monkeypatch: pytest.MonkeyPatch) -> None:
    if find_spec("pyarrow") is None:
        # The reader of tables is an extra; the others are attacked without it.
        monkeypatch.delitem(FORMATS, "parquet")
    count = sum(len(kind.mutations) for kind in FORMATS.values())
    tally, faults = attack(count)
    assert not faults, "\n".join(faults)
    assert tally.total() == count
    for name in FORMATS:
        outcomes = {outcome for kind, _, outcome in tally if kind == name}
        assert outcomes == {"read", "refused"}, (name, outcomes)


def test_a_traceback_and_a_wrong_reading_are_faults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pyarrow")
    kind = FORMATS["parquet"]
    kind.write(tmp_path)
    whole = (tmp_path / "images.parquet").read_bytes()

    def careless(folder: Path) -> None:
        content = (folder / "images.parquet").read_bytes()
        if not content:
            raise KeyError("as a reader that was not meant for this")
        assert content == whole, "read as if nothing were the matter"

    other = annotations.Format(kind.write, kind.files, careless, kind.mutations)
    monkeypatch.setitem(annotations.FORMATS, "parquet", other)
    tally, faults = attack(len(kind.mutations), only="parquet")
    assert tally["parquet", "empty", "FAULT"] == tally["parquet", "cut", "FAULT"] == 1
    assert any("KeyError" in fault for fault in faults) and any("AssertionError" in fault for fault in faults)


def refusal(folder: Path, part: str = "train", masks: bool = False) -> str:
    with pytest.raises(UserMistake) as caught:
        read_data(str(folder), part, masks, 1)
    return str(caught.value)


def test_numbers_that_no_tool_can_hold_are_refused(tmp_path: Path) -> None:
    document = coco_document(2)
    document["annotations"][0]["bbox"][0] = 10**400
    write_coco(tmp_path / "long", coco_document(2)).write_text(json.dumps(document))
    assert "must be four finite numbers" in refusal(tmp_path / "long")
    document = coco_document(2)
    document["images"][0]["id"] = 10**30
    write_coco(tmp_path / "id", coco_document(2)).write_text(json.dumps(document))
    assert "has no whole number as id" in refusal(tmp_path / "id")
    assert run_lengths([10**30, 1]) is None
    size = "<size><width>1e300</width><height>50</height></size>"
    write_voc(tmp_path, "VOC2007", "trainval", {"a": []})
    (tmp_path / "VOC2007/Annotations/a.xml").write_text(f"<annotation>{size}</annotation>")
    assert "width is 1e+300" in refusal(tmp_path / "VOC2007")


def test_run_lengths_whose_sum_wraps_around_are_refused(tmp_path: Path) -> None:
    document = coco_document(1)
    runs = [2**62] * 4 + [80 * 64]
    assert np.array(runs, dtype=np.int64).sum() == 80 * 64
    document["annotations"][0]["segmentation"] = {"size": [64, 80], "counts": runs}
    write_coco(tmp_path, coco_document(1)).write_text(json.dumps(document))
    assert "run lengths that are damaged" in refusal(tmp_path, masks=True)


def test_lists_of_another_encoding_have_a_line_of_their_own(tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    names = ["a/1.jpg", "a/2.jpg"]
    path.write_bytes("a/1.jpg\n".encode("utf-8-sig"))
    assert read_list(str(path), names, 2).tolist() == [0]
    for content, told in (
        ("a/1.jpg\n".encode("utf-16"), "zero bytes"),
        (b"a/1.jpg\n\xe9.jpg\n", "not in the data"),
        (b"9" * 6000, "but the data has 2 images"),
        ("\u00b2".encode(), "not in the data"),
    ):
        path.write_bytes(content)
        with pytest.raises(UserMistake, match=told):
            read_list(str(path), names, 2)
    write_voc(tmp_path, "VOC2007", "trainval", {"a": []})
    (tmp_path / "VOC2007/ImageSets/Main/trainval.txt").write_bytes(b"caf\xe9\n")
    assert "no UTF-8 text" in refusal(tmp_path / "VOC2007")


def test_names_of_classes_with_infinite_numbers_are_refused(tmp_path: Path) -> None:
    annotations.FORMATS["segmentation classes"].write(tmp_path)
    for content in ('{"classes": ["a"], "ignore_index": Infinity}', "[" * 100_000):
        (tmp_path / "classes.json").write_text(content)
        with pytest.raises(UserMistake, match=re.escape("classes.json cannot be used")):
            read_layout(str(tmp_path), "train")


@pytest.mark.parametrize("labels", [[0.0, np.nan, 1.0, 0.0], [None, 1, -7, 0], [2**40, 0, 0, 0]])
def test_labels_of_a_table_are_classes_or_refused(tmp_path: Path, labels: list[object]) -> None:
    from pipeline.parquet import ParquetImages

    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "t.parquet"
    parquet.write_table(pyarrow.table({"image": [b"x"] * 4, "label": labels}), path)
    if labels[0] == 0.0:
        assert ParquetImages([path]).labels.tolist() == [0, -1, 1, 0], "a table that held empty cells has floats"
        return
    with pytest.raises(ValueError, match=re.escape("has the label")):
        ParquetImages([path])
