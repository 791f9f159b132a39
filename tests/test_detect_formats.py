"""Reading COCO, VOC and Cityscapes: what is trained on, what is ground truth, what is refused by name."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tools.support.drawn_sets import coco_document, rectangle, write_cityscapes, write_coco, write_voc
from train.errors import UserMistake
from train.eval.detection import proof, rle
from train.eval.detection.coco_ap import coco_ap
from train.eval.detection.coco_checks import run_lengths
from train.eval.detection.data import format_of, read_data
from train.eval.detection.feed import read_image
from train.eval.detection.records import check_same_classes, trainable
from train.eval.detection.voc_format import read_objects
from train.runtime import Runtime

ALONE = Runtime(0, 1, torch.device("cpu"), torch.float32, False)


@pytest.fixture
def coco(tmp_path: Path) -> Callable[..., Any]:
    """`coco(change, part, masks)`: the data read after `change(document)`."""

    def read(change: Callable[..., object] = lambda _: None, part: str = "train", masks: bool = True) -> Any:
        document = coco_document(3)
        change(document)
        write_coco(tmp_path, document, part)
        return read_data(str(tmp_path), part, masks, 1)

    return read


def test_classes_boxes_and_outlines_of_coco(coco: Callable[..., Any]) -> None:
    data = coco()
    assert data.category_ids == (3, 7, 8) and data.names == ("class 3", "class 7", "class 8")
    assert [record.image_id for record in data.records] == [10, 11, 12]
    first = data.records[0]
    np.testing.assert_array_equal(first.boxes, [[4, 8, 32, 44], [38, 8, 66, 44]])
    assert first.labels.tolist() == [0, 1] and len(first.outlines) == 2
    assert data.ground_truth == {}, "training keeps no second copy of a large document"
    mask = rle.outline_mask(first.outlines[0], (64, 80), (64, 80), flip=False)
    assert mask.sum() == 28 * 36 and mask[8:44, 4:32].all()


def test_crowds_are_ground_truth_but_not_trained_on(coco: Callable[..., Any]) -> None:
    def crowd(document: dict[str, Any]) -> None:
        entry = document["annotations"][0]
        entry["iscrowd"], entry["segmentation"] = 1, {"size": [64, 80], "counts": [0, 64 * 80]}

    assert len(coco(crowd).records[0].labels) == 1
    assert coco(crowd).notes == ("1 crowds are not trained on",)
    assert sum(entry["iscrowd"] for entry in coco(crowd, "val").ground_truth["annotations"]) == 1


def test_images_without_objects_are_evaluated_but_not_trained_on(coco: Callable[..., Any]) -> None:
    def empty(document: dict[str, Any]) -> None:
        document["annotations"] = document["annotations"][2:]

    assert len(coco(empty).records) == 3 and [r.image_id for r in trainable(coco(empty))] == [11, 12]
    with pytest.raises(UserMistake, match="no image with an object"):
        trainable(coco(lambda document: document["annotations"].clear()))


def test_objects_without_area_or_drawable_mask_are_left_out(coco: Callable[..., Any]) -> None:
    def odd(document: dict[str, Any]) -> None:
        entries = document["annotations"]
        entries[0]["segmentation"] = [[1.0, 2.0, 3.0, 4.0]]
        entries[1]["bbox"] = [5.0, 5.0, 0.0, 9.0]
        entries[2]["bbox"] = [200.0, 5.0, 10.0, 9.0]  # outside the image
        entries[3]["segmentation"] = [[1.0, 2.0, 3.0, 4.0], rectangle(41, 10, 28, 36), [0.0] * 7]
        entries[4]["bbox"] = [70.0, 50.0, 30.0, 30.0]  # beyond the edge

    data = coco(odd)
    assert [len(record.labels) for record in data.records] == [0, 1, 2]
    assert data.notes == (
        "1 objects without a drawable mask are not trained on",
        "2 objects without area are not trained on",
    )
    assert len(data.records[1].outlines[0]) == 1, "of an object's polygons those of two points are left out"
    np.testing.assert_array_equal(data.records[2].boxes[0], [70, 50, 80, 64])
    assert [len(record.labels) for record in coco(odd, masks=False).records] == [1, 1, 2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["annotations"][3].update(category_id=99), "annotation 4 has category 99"),
        (lambda d: d["annotations"][3].update(image_id=99), "annotation 4 belongs to image 99"),
        (lambda d: d["annotations"][3].update(bbox=[1, 2, float("nan"), 4]), "annotation 4 has the box"),
        (lambda d: d["annotations"][3].update(bbox=[1, 2, 3]), "annotation 4 has the box"),
        (lambda d: d["annotations"][3].pop("bbox"), "annotation 4 has the box None"),
        (lambda d: d["annotations"][3].update(bbox=[30, 9, -20, 9]), "annotation 4 has the box .* of negative size"),
        (lambda d: d["annotations"][3].update(segmentation=[[1, 2, 3, 4]]), "annotation 4 has no polygon"),
        (lambda d: d["annotations"][3].update(segmentation=[]), "annotation 4 has no polygon"),
        (lambda d: d["annotations"][3].pop("area"), "annotation 4 lacks area"),
        (lambda d: d["images"].append(dict(d["images"][0])), "image id 10 occurs twice"),
        (lambda d: d["categories"].append(dict(d["categories"][0])), "category id 3 occurs twice"),
        (lambda d: d["annotations"][3].update(area=float("nan")), "annotation 4 lacks area"),
        (lambda d: d["annotations"][3].update(iscrowd=None), "annotation 4 lacks area or iscrowd"),
        (lambda d: d["annotations"][3].update(iscrowd="no"), "annotation 4 has iscrowd 'no'"),
        (lambda d: d["annotations"][3].update(image_id=[10]), r"annotation 4 belongs to image \[10\]"),
        (lambda d: d["annotations"].insert(1, None), "annotation at place 1 of the list is no JSON object"),
        (
            lambda d: d["annotations"][3].update(segmentation=[[1, 2, 3, 4, 5, float("nan")]]),
            "4 has a polygon with a co",
        ),
        (
            lambda d: d["annotations"][3].update(segmentation=[[1, 2, 3, 4, 5, None]]),
            "4 has a polygon with a coordinate",
        ),
        (
            lambda d: d["annotations"][3].update(segmentation=[[1, 2, 3, 4, 5, "6"]]),
            "4 has a polygon with a coordinate",
        ),
        (
            lambda d: d["annotations"][3].update(segmentation=[[1, 2, 3, 4, [5], 6]]),
            "4 has a polygon with a coordinate",
        ),
        (lambda d: d["annotations"][3].update(segmentation=[1, 2, 3, 4, 5, 6]), "has 1 where a polygon should be"),
        (lambda d: d["annotations"][3].update(segmentation=[[1, 2, 3, 4, 5, 1e9]]), "a polygon far outside its image"),
        (lambda d: d["annotations"][3].update(segmentation="M 1 2"), "neither polygons nor run lengths"),
        (lambda d: d["annotations"][3].update(segmentation=runs([80, 64], [5120])), "run lengths of size"),
        (lambda d: d["annotations"][3].update(segmentation=runs([64.0, 80.0], [5120])), r"size \[64.0, 80.0\], its"),
        (lambda d: d["annotations"][3].update(segmentation=runs([64, 80], [5119])), "cover 5119 pixels"),
        (
            lambda d: d["annotations"][3].update(segmentation=runs([64, 80], [6000, -880])),
            "run lengths that are damaged",
        ),
        (lambda d: d["annotations"][3].update(segmentation=runs([64, 80], "abc\x7f")), "run lengths that are damaged"),
        (lambda d: d["images"][0].update(width=0), "image 10 has width 0"),
        (lambda d: d["images"][0].update(height=10**9), "image 10 has width 80 and height 1000000000"),
        (lambda d: d["images"][0].pop("file_name"), "image 10 has no file_name"),
        (lambda d: d["images"][0].update(id="10"), "image 0 of the list has no whole number as id"),
        (lambda d: d["categories"][0].update(name=None), "category 3 has no name"),
        (lambda d: d.pop("categories"), "lacks images, annotations, categories"),
        (lambda d: d["categories"].clear(), "no images or no categories|has category"),
    ],
)
def test_broken_ground_truth_is_refused_by_name(tmp_path: Path, change: Callable[[Any], object], message: str) -> None:
    file = write_coco(tmp_path, coco_document(3), "val")
    document = json.loads(file.read_text())
    change(document)
    file.write_text(json.dumps(document))
    with pytest.raises(UserMistake, match=message):
        read_data(str(file), "val", True, 1)


def runs(size: Sequence[float], counts: object) -> dict[str, Any]:
    return {"size": size, "counts": counts}


def test_run_lengths_are_read_as_the_compiled_routines_read_them() -> None:
    random = np.random.default_rng(0)
    for share in (0.0, 0.02, 0.5, 1.0):
        for height, width in ((1, 1), (3, 7), (64, 80), (301, 997)):
            mask = random.random((height, width)) < share
            mask[: height // 2] = mask[0, 0]  # long runs need several groups of bits
            found = run_lengths(rle.encode(mask)["counts"])
            assert found is not None and found.sum() == height * width
            values = np.repeat(np.arange(len(found)) % 2, found)
            np.testing.assert_array_equal(values.reshape(width, height).T, mask)


def test_every_cut_of_run_lengths_is_seen(tmp_path: Path) -> None:
    document = coco_document(1)
    mask = np.random.default_rng(1).random((64, 80)) < 0.3
    encoded = rle.encode(mask)
    for length in range(0, len(encoded["counts"]), 97):
        document["annotations"][0]["segmentation"] = {**encoded, "counts": encoded["counts"][:length]}
        with pytest.raises(UserMistake, match="annotation 1 has run lengths that"):
            read_data(str(write_coco(tmp_path, document)), "train", True, 1)


NUMBERINGS: dict[str, Callable[[int, int], object]] = {
    "from zero": lambda place, _: place,
    "anew in each image": lambda _, seen: seen,
    "all alike": lambda *_: 1,
    "null": lambda *_: None,
    "downwards from zero": lambda place, _: -place,
    "text": lambda place, _: str(place),
    "beyond 64 bits": lambda place, _: 2**70 + place,
}


@pytest.mark.parametrize("numbering", [*NUMBERINGS, "none"])
def test_annotation_ids_do_not_change_the_ap(tmp_path: Path, numbering: str) -> None:
    document = coco_document(3)
    seen: Counter[int] = Counter()
    for place, entry in enumerate(document["annotations"]):
        seen[entry["image_id"]] += 1
        entry.pop("id")
        if numbering in NUMBERINGS:
            entry["id"] = NUMBERINGS[numbering](place, seen[entry["image_id"]])
    data = read_data(str(write_coco(tmp_path, document, "val")), "val", False, 1)
    found = [
        {
            "image_id": entry["image_id"],
            "category_id": entry["category_id"],
            "bbox": entry["bbox"],
            "score": 0.9 - 0.01 * place,
        }
        for place, entry in enumerate(document["annotations"])
    ]
    assert coco_ap(data.ground_truth, found, "bbox")["AP"] == pytest.approx(1.0)


def test_deeply_nested_json_is_refused(tmp_path: Path) -> None:
    file = write_coco(tmp_path, coco_document(1))
    file.write_text("[" * 200_000)
    with pytest.raises(UserMistake, match="cannot be read as COCO's JSON"):
        read_data(str(file), "train", False, 1)


def test_pycocotools_cannot_use_a_two_point_polygon_either(tmp_path: Path) -> None:
    tools = pytest.importorskip("pycocotools.mask")
    with pytest.raises((TypeError, IndexError)):
        tools.frPyObjects([[1.0, 2.0, 3.0, 4.0]], 64, 80)
    # Where it is not the first it is drawn as nothing, by them as by us.
    for polygons in ([rectangle(3, 4, 10, 12), [1.0, 2.0, 30.0, 40.0]], [[10.0, 10, 30, 10, 30, 30, 7]]):
        theirs = tools.decode(tools.merge(tools.frPyObjects(polygons, 64, 80)))
        ours = rle.draw(tuple(np.array(polygon) for polygon in polygons), 64, 80)
        np.testing.assert_array_equal(ours, theirs)


def test_missing_images_and_wrong_sizes_are_refused(tmp_path: Path, coco: Callable[..., Any]) -> None:
    data = coco()
    (tmp_path / "images" / "1.png").unlink()
    with pytest.raises(UserMistake, match=r"1.png cannot be read"):
        read_image(data.records[1])
    with pytest.raises(UserMistake, match="80 x 64 pixels, annotated as 90 x 64"):
        read_image(dataclasses.replace(data.records[0], width=90))
    with pytest.raises(UserMistake, match="first image 0.png is in none of"):
        (tmp_path / "images" / "0.png").unlink()
        read_data(str(tmp_path), "train", False, 1)


def test_train_and_val_must_agree_on_categories(tmp_path: Path) -> None:
    train = read_data(str(write_coco(tmp_path / "a", coco_document(2))), "train", True, 1)
    other = coco_document(2)
    other["categories"][1]["name"] = "another"
    val = read_data(str(write_coco(tmp_path / "b", other, "val")), "val", True, 1)
    check_same_classes(train, train)
    with pytest.raises(UserMistake, match="disagree on category 7"):
        check_same_classes(train, val)


def test_masks_follow_resizing_and_mirroring(coco: Callable[..., Any]) -> None:
    outline = coco().records[0].outlines[0]
    encoded = rle.encode(rle.outline_mask(outline, (64, 80), (64, 80), flip=False))
    for shape in (outline, encoded):
        mask = rle.outline_mask(shape, (128, 160), (64, 80), flip=True)
        columns, rows = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
        assert (columns[0], columns[-1] + 1, rows[0], rows[-1] + 1) == (160 - 64, 160 - 8, 16, 88)


def test_plain_counts_are_decoded_column_by_column() -> None:
    mask = rle.decode({"size": [3, 2], "counts": [1, 2, 1, 2]})
    np.testing.assert_array_equal(mask, [[0, 0], [1, 1], [1, 1]])
    np.testing.assert_array_equal(rle.decode(rle.encode(mask)), mask)


# --- VOC ---

VOC = {"000001": [("dog", (5, 6, 30, 40), 0), ("cat", (1, 1, 60, 50), 1)], "000002": []}


def test_voc_boxes_are_zero_based_and_difficult_objects_trained_on(tmp_path: Path) -> None:
    write_voc(tmp_path, "VOC2007", "trainval", VOC)
    write_voc(tmp_path, "VOC2012", "trainval", {"2012_1": [("person", (2, 2, 9, 9), 0)]})
    write_voc(tmp_path, "VOC2007", "test", {"000003": VOC["000001"]})
    train = read_data(str(tmp_path), "train", False, 1)
    assert [record.path.stem for record in train.records] == ["000001", "000002", "2012_1"] and len(train.names) == 20
    np.testing.assert_array_equal(train.records[0].boxes, [[4, 5, 30, 40], [0, 0, 60, 50]])
    assert [train.names[label] for label in train.records[0].labels] == ["dog", "cat"] and train.rule == "area"
    val = read_data(str(tmp_path / "VOC2007"), "val", False, 1)
    assert val.rule == "11 points" and [record.path.stem for record in val.records] == ["000003"]
    assert [entry["iscrowd"] for entry in val.ground_truth["annotations"]] == [0, 1]
    assert val.ground_truth["annotations"][0]["bbox"] == [4, 5, 26, 35]
    listed = read_data(str(tmp_path / "VOC2007/ImageSets/Main/test.txt"), "train", False, 1)
    assert listed.data_hash == val.data_hash


def test_voc_refusals(tmp_path: Path) -> None:
    write_voc(tmp_path, "VOC2007", "trainval", {"a": [("unicorn", (1, 1, 5, 5), 0)]})
    with pytest.raises(UserMistake, match="class 'unicorn' is none of VOC's"):
        read_data(str(tmp_path / "VOC2007"), "train", False, 1)
    with pytest.raises(UserMistake, match=re.escape("VOC2012/ImageSets/Main/trainval.txt")):
        read_data(str(tmp_path), "train", False, 1)
    with pytest.raises(UserMistake, match="which has no masks"):
        read_data(str(tmp_path), "train", True, 1)
    (tmp_path / "VOC2007/Annotations/a.xml").write_text("<annotation><object/></annotation>")
    with pytest.raises(UserMistake, match=r"a.xml cannot be read as a VOC annotation: no width"):
        read_data(str(tmp_path / "VOC2007"), "train", False, 1)


@pytest.mark.parametrize(
    ("mark", "difficult"),
    [(" 1 ", True), ("1", True), ("true", True), ("0", False), ("", False), ("Unspecified", False), (None, False)],
)
def test_difficult_as_tools_write_it(tmp_path: Path, mark: str | None, difficult: bool) -> None:
    write_voc(tmp_path, "VOC2007", "trainval", VOC)
    path = tmp_path / "VOC2007/Annotations/000001.xml"
    text = re.sub(
        "<difficult>.*?</difficult>", "" if mark is None else f"<difficult>{mark}</difficult>", path.read_text()
    )
    path.write_text(text)
    assert [entry.difficult for entry in read_objects(path)[2]] == [difficult] * 2


@pytest.mark.parametrize("value", ["nan", "inf", "", "5 6"])
def test_a_voc_corner_that_is_no_number_is_refused(tmp_path: Path, value: str) -> None:
    write_voc(tmp_path, "VOC2007", "trainval", VOC)
    path = tmp_path / "VOC2007/Annotations/000001.xml"
    path.write_text(re.sub("<xmin>.*?</xmin>", f"<xmin>{value}</xmin>", path.read_text(), count=1))
    with pytest.raises(UserMistake, match="000001.xml cannot be read"):
        read_objects(path)


def test_a_voc_box_that_was_drawn_from_right_to_left_is_refused(tmp_path: Path) -> None:
    write_voc(tmp_path, "VOC2007", "trainval", VOC)
    path = tmp_path / "VOC2007/Annotations/000001.xml"
    path.write_text(re.sub("<xmin>5</xmin>", "<xmin>35</xmin>", path.read_text()))
    with pytest.raises(UserMistake, match=r"000001.xml .* box 35, 6, 30, 40 of dog ends before it begins"):
        read_objects(path)


def test_voc_names_with_blanks_numbers_and_other_endings(tmp_path: Path) -> None:
    names = {"my photo 1": VOC["000001"], "plain": [], "scan": [], "with.ending": [], "a.png": []}
    write_voc(tmp_path, "VOC2007", "trainval", names)
    folder = tmp_path / "VOC2007"
    (folder / "JPEGImages/plain.jpg").rename(folder / "JPEGImages/plain.JPG")
    (folder / "JPEGImages/scan.jpg").rename(folder / "JPEGImages/scan.png")
    (folder / "ImageSets/Main/trainval.txt").write_text(
        "my photo 1  \r\nplain -1\r\nscan  1\r\n\r\nwith.ending.jpg 0\nscan.png\na.png\n"
    )
    data = read_data(str(folder), "train", False, 1)
    expected = ["my photo 1.jpg", "plain.JPG", "scan.png", "with.ending.jpg", "scan.png", "a.png.jpg"]
    assert [record.path.name for record in data.records] == expected
    assert all(read_image(record).size == (record.width, record.height) for record in data.records)


# --- Cityscapes ---


def instance_map() -> np.ndarray:
    """Two cars, a group of persons, a caravan, road and void."""
    ids = np.full((40, 60), 7)
    ids[:5] = 1
    ids[10:20, 5:25], ids[12:22, 30:50] = 26000, 26001
    ids[30:38, 2:12], ids[30:38, 20:30] = 24, 29000
    return ids


def test_cityscapes_instances_groups_and_other_labels(tmp_path: Path) -> None:
    write_cityscapes(tmp_path, "val", {"ulm_000001": instance_map(), "ulm_000002": np.full((40, 60), 7)})
    data = read_data(str(tmp_path), "val", True, 2)
    assert data.names == ("person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle")
    assert [len(record.labels) for record in data.records] == [2, 0] and len(trainable(data)) == 1
    np.testing.assert_array_equal(data.records[0].boxes, [[5, 10, 25, 20], [30, 12, 50, 22]])
    assert [data.names[label] for label in data.records[0].labels] == ["car", "car"]
    assert [(e["category_id"], e["iscrowd"]) for e in data.ground_truth["annotations"]] == [(24, 1), (26, 0), (26, 0)]
    np.testing.assert_array_equal(rle.decode(data.records[0].outlines[1]), instance_map() == 26001)


def test_cityscapes_refusals(tmp_path: Path) -> None:
    write_cityscapes(tmp_path, "val", {"ulm_000001": instance_map()})
    with pytest.raises(UserMistake, match="has no leftImg8bit/train"):
        read_data(str(tmp_path), "train", True, 1)
    next(tmp_path.glob("gtFine/val/ulm/*")).unlink()
    with pytest.raises(UserMistake, match="unpack gtFine beside leftImg8bit"):
        read_data(str(tmp_path), "val", True, 1)


def test_formats_are_told_apart_or_refused(tmp_path: Path) -> None:
    with pytest.raises(UserMistake, match="does not exist"):
        format_of(str(tmp_path / "nowhere"))
    with pytest.raises(UserMistake, match="in no known format"):
        format_of(str(tmp_path))
    file = write_coco(tmp_path / "coco", copy.deepcopy(coco_document(1)))
    assert format_of(str(file)) == format_of(str(tmp_path / "coco")) == "coco"
    with pytest.raises(UserMistake, match="should hold one"):
        read_data(str(tmp_path / "coco"), "val", False, 1)


def test_the_real_sample_reads_as_described(unpack: Callable[..., Path]) -> None:
    root = unpack("detection-sample", lambda name: name.endswith(".json") or name.endswith(("0009.jpg", "0034.jpg")))
    train = read_data(str(root), "train", True, 1)
    val = read_data(str(root), "val", True, 1)
    assert (len(train.records), len(val.records), len(train.names)) == (96, 32, 80)
    assert train.notes == ("8 crowds are not trained on",)
    assert sum(len(record.labels) for record in train.records) == 725 - 8
    assert len(trainable(train)) == 94 and len(val.ground_truth["annotations"]) == 214


# --- proof before training ---


def test_every_image_is_looked_at_and_a_bounded_number_decoded(
    coco: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = coco().records
    assert proof.prove_images(records, ALONE, 2) == 3
    damaged = records[2].path
    damaged.write_bytes(damaged.read_bytes()[:-30])
    with pytest.raises(UserMistake, match=f"{damaged.name} cannot be read"):
        proof.prove_images(records, ALONE, 2)
    damaged.unlink()
    monkeypatch.setattr(proof, "MOST_DECODED", 1)
    with pytest.raises(UserMistake, match=f"{damaged.name} does not exist"):
        proof.prove_images(records, ALONE, 2)


@pytest.mark.parametrize("orientation", [3, 5, 6, 8])
def test_a_photo_is_as_large_as_its_exif_says(coco: Callable[..., Any], orientation: int) -> None:
    """Boxes of the upright photo fit; boxes of the unturned pixels would lie in the wrong place."""
    record = coco().records[0]
    exif = Image.Exif()
    exif[0x0112] = orientation
    with Image.open(record.path) as image:
        image.load()
        image.save(record.path, exif=exif)
    if orientation >= 5:
        with pytest.raises(UserMistake, match="64 x 80 pixels, annotated as 80 x 64"):
            proof.prove_images([record], ALONE, 1)
        record = dataclasses.replace(record, width=64, height=80)
    assert proof.prove_images([record], ALONE, 1) == 1


def test_decoded_images_are_spread_over_the_part() -> None:
    assert proof._spread(10, 3) == {0, 4, 9} and proof._spread(2, 5) == {0, 1} and not proof._spread(0, 5)
