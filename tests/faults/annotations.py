"""Damage annotations in every way that tools and hands damage them, and see that each is read right or refused.

`python -m tests.faults.annotations --mutations 5000 [--report FILE.txt]` is the long form; the short one runs in CI.
Each mutation of a small data set either gives the data that are still in it, or one line of refusal: never a
traceback, a hang, or memory without bound.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
import math
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from pipeline.listing import list_images
from pipeline.parquet import ParquetImages
from tests.faults.reports import publish
from tools.support.class_list import read_class_list
from tools.support.drawn_sets import coco_document, write_cityscapes, write_coco, write_voc
from train.errors import EXIT_USER_MISTAKE, run_to_exit_code
from train.eval.detection import rle
from train.eval.detection.coco_ap import coco_ap
from train.eval.detection.data import read_data
from train.eval.detection.proof import prove_images
from train.eval.detection.records import DetectionData
from train.eval.segmentation.labels import IGNORED, check_values, inspect_all, label_map, read_label
from train.eval.segmentation.layouts import read_layout
from train.eval.splits import read_list
from train.runtime import Runtime

LIMIT_S = 20
"""Seconds that one mutation may take."""
MOST_GROWTH_KIB = 1_500_000
"""What the peak of memory may grow over all mutations."""
ALONE = Runtime(0, 1, torch.device("cpu"), torch.float32, False)
HOSTILE: tuple[Any, ...] = (
    math.nan,
    math.inf,
    -math.inf,
    1e308,
    -1e30,
    10**30,
    10**400,
    2**63,
    -1,
    0,
    0.5,
    True,
    None,
    "",
    "x",
    "1",
    "\u0000",
    "\ud83d\ude00",
    [],
    {},
    [[]],
    [None],
    [1, [2]],
    {"a": 1},
)
"""Values that stand where others should."""

Mutate = Callable[[bytes, random.Random], bytes]


@dataclass(frozen=True)
class Format:
    """One kind of annotation.

    Attributes:
        write: makes a small whole data set in a folder.
        files: pattern of the files that are damaged.
        read: reads the folder as an evaluation does, and raises AssertionError where what was read is wrong.
        mutations: name -> what it makes of a file's bytes.
    """

    write: Callable[[Path], None]
    files: str
    read: Callable[[Path], None]
    mutations: dict[str, Mutate] = field(default_factory=dict)


# --- damage to any file ----------------------------------------------------------------------------------------------


def _flip(data: bytes, draw: random.Random) -> bytes:
    out = bytearray(data)
    for _ in range(draw.choice([1, 1, 3, 20]) if out else 0):
        out[draw.randrange(len(out))] ^= 1 << draw.randrange(8)
    return bytes(out)


def _line_twice(data: bytes, draw: random.Random) -> bytes:
    lines = data.split(b"\n")
    lines.insert(draw.randrange(len(lines) + 1), draw.choice(lines))
    return b"\n".join(lines)


def _as(encoding: str) -> Mutate:
    return lambda data, draw: data.decode("utf-8", "replace").encode(encoding, "replace")


BYTES: dict[str, Mutate] = {
    "flip": _flip,
    "cut": lambda data, draw: data[: draw.randrange(len(data) + 1)],
    "empty": lambda data, draw: b"",
    "zeros": lambda data, draw: bytes(len(data)),
    "append": lambda data, draw: data + draw.randbytes(draw.randrange(1, 300)),
    "noise": lambda data, draw: draw.randbytes(len(data)),
}
TEXT: dict[str, Mutate] = {
    **BYTES,
    "byte-order mark": lambda data, draw: b"\xef\xbb\xbf" + data,
    "utf-16": _as("utf-16"),
    "latin-1": lambda data, draw: data + b"\xe9\xff",
    "line ends": lambda data, draw: data.replace(b"\n", b"\r\n"),
    "line twice": _line_twice,
}

# --- JSON ------------------------------------------------------------------------------------------------------------


def _nodes(node: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) of a document."""
    entries = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in list(entries):
        yield node, key
        yield from _nodes(value)


def _json(change: Callable[[Any, Any, random.Random], None]) -> Mutate:
    """A mutation of one place of a document, drawn evenly over the names of places so that long lists do not win."""

    def mutate(data: bytes, draw: random.Random) -> bytes:
        document = json.loads(data)
        places: dict[str, list[tuple[Any, Any]]] = {}
        for container, key in _nodes(document):
            places.setdefault(key if isinstance(key, str) else "an element", []).append((container, key))
        container, key = draw.choice(places[draw.choice(sorted(places))])
        change(container, key, draw)
        return json.dumps(document).encode()

    return mutate


def _hostile(container: Any, key: Any, draw: random.Random) -> None:
    container[key] = copy.deepcopy(draw.choice(HOSTILE))


def _removed(container: Any, key: Any, draw: random.Random) -> None:
    del container[key]


def _doubled(container: Any, key: Any, draw: random.Random) -> None:
    if isinstance(container, list):
        container.insert(key, copy.deepcopy(container[key]))
    else:
        container[key] = [container[key], container[key]]


def _shifted(container: Any, key: Any, draw: random.Random) -> None:
    value = container[key]
    if isinstance(value, int | float):
        container[key] = value + draw.choice([-1, 1, 0.5, -1000, 1000, 1e9])
    elif isinstance(value, str):
        container[key] = value[::-1] + "\u00e9"


def _run_lengths(data: bytes, draw: random.Random) -> bytes:
    """An outline becomes run lengths: right, cut, of exchanged sides, of another size, or of text that is none."""
    document = json.loads(data)
    entry = draw.choice(document["annotations"])
    mask = np.zeros((64, 80), np.uint8)
    x, y, w, h = (int(value) for value in entry["bbox"])
    mask[y : y + h, x : x + w] = 1
    outline = rle.encode(mask)
    runs = [x * 64 + y, h] + [64 - h, h] * (w - 1) + [80 * 64 - (x + w - 1) * 64 - y - h]
    entry["segmentation"] = draw.choice(
        [
            outline,
            {**outline, "size": [80, 64]},
            {**outline, "size": [8, 8]},
            {**outline, "size": [1 << 20, 1 << 20]},
            {**outline, "counts": outline["counts"][: draw.randrange(len(outline["counts"]))]},
            {**outline, "counts": outline["counts"] + "~~~"},
            {"size": [64, 80], "counts": runs},
            {"size": [64, 80], "counts": runs[:-1]},
            {"size": [64, 80], "counts": [*runs, 10**12]},
            {"size": [64, 80], "counts": [-5, 64 * 80 + 5]},
            {"size": [64, 80], "counts": []},
            {"counts": runs},
        ]
    )
    return json.dumps(document).encode()


JSON: dict[str, Mutate] = {
    **TEXT,
    "hostile value": _json(_hostile),
    "removed": _json(_removed),
    "doubled": _json(_doubled),
    "shifted": _json(_shifted),
    "deep nesting": lambda data, draw: b"[" * 200_000 + b"]" * 200_000,
    "deep inside": lambda data, draw: data.replace(b"[[", b"[" * 50_000, 1),
    "huge number": lambda data, draw: data.replace(b"10", b"1" * 6_000, 1),
}

# --- XML -------------------------------------------------------------------------------------------------------------

LAUGHS = (
    '<?xml version="1.0"?><!DOCTYPE a [<!ENTITY l0 "ha">'
    + "".join(f'<!ENTITY l{n} "{f"&l{n - 1};" * 10}">' for n in range(1, 12))
    + "]>"
)


def _xml(change: Callable[[ElementTree.Element, random.Random], None]) -> Mutate:
    def mutate(data: bytes, draw: random.Random) -> bytes:
        root = ElementTree.fromstring(data)
        change(draw.choice(list(root.iter())), draw)
        return ElementTree.tostring(root)

    return mutate


def _text(node: ElementTree.Element, draw: random.Random) -> None:
    node.text = draw.choice(["nan", "inf", "-1", "1e400", "10" * 200, "", " 7 ", "7.9", "cat", "\u00e9", "0x10", None])


def _childless(node: ElementTree.Element, draw: random.Random) -> None:
    for child in list(node)[: draw.randrange(1, 3)]:
        node.remove(child)


def _twins(node: ElementTree.Element, draw: random.Random) -> None:
    node.extend([copy.deepcopy(child) for child in node])


def _renamed(node: ElementTree.Element, draw: random.Random) -> None:
    node.tag = draw.choice(["object", "size", "bndbox", "name", "x"])


XML: dict[str, Mutate] = {
    **TEXT,
    "text": _xml(_text),
    "childless": _xml(_childless),
    "twins": _xml(_twins),
    "renamed": _xml(_renamed),
    "billion laughs": lambda data, draw: LAUGHS.encode() + data.replace(b"<name>", b"<name>&l11;", 1),
    "outside entity": lambda data, draw: (
        b'<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/hostname">]>' + data.replace(b"<name>", b"<name>&x;", 1)
    ),
    "deep nesting": lambda data, draw: b"<a>" * 100_000 + b"</a>" * 100_000,
}

# --- label images ----------------------------------------------------------------------------------------------------


def _image(change: Callable[[Image.Image, random.Random], Image.Image], form: str = "PNG") -> Mutate:
    def mutate(data: bytes, draw: random.Random) -> bytes:
        out = io.BytesIO()
        change(Image.open(io.BytesIO(data)), draw).save(out, form)
        return out.getvalue()

    return mutate


def _values(image: Image.Image, draw: random.Random) -> Image.Image:
    values = np.array(image)
    values[: draw.randrange(1, values.shape[0])] = draw.choice([1, 2, 9, 200, 254, 255])
    return Image.fromarray(values)


def _palette(image: Image.Image, draw: random.Random) -> Image.Image:
    values = Image.fromarray(np.array(image).astype(np.uint8), "P")
    values.putpalette(draw.randbytes(3 * draw.choice([2, 16, 256])))
    return values


MASK: dict[str, Mutate] = {
    **BYTES,
    "other size": _image(lambda image, draw: image.resize((draw.randrange(1, 90), draw.randrange(1, 90)))),
    "turned": _image(lambda image, draw: image.transpose(Image.Transpose.ROTATE_90)),
    "values": _image(_values),
    "palette": _image(_palette),
    "colours": _image(lambda image, draw: Image.fromarray(np.array(image).astype(np.uint8)).convert("RGB")),
    "alpha": _image(lambda image, draw: Image.fromarray(np.array(image).astype(np.uint8)).convert("LA")),
    "one bit": _image(lambda image, draw: Image.fromarray(np.array(image) > 0)),
    "16 bits": _image(lambda image, draw: Image.fromarray(np.array(image).astype(np.uint16) * 257)),
    "jpeg inside": _image(lambda image, draw: Image.fromarray(np.array(image).astype(np.uint8)), "JPEG"),
    "many frames": _image(lambda image, draw: Image.fromarray(np.array(image).astype(np.uint8)), "GIF"),
}

# --- parquet ---------------------------------------------------------------------------------------------------------


def _table(change: Callable[[dict[str, list[Any]], random.Random], None]) -> Mutate:
    def mutate(data: bytes, draw: random.Random) -> bytes:
        import pyarrow
        import pyarrow.parquet

        columns: dict[str, list[Any]] = {
            "image": [{"bytes": b"\xff\xd8", "path": f"{number}.jpg"} for number in range(4)],
            "label": [0, 1, 0, 1],
        }
        change(columns, draw)
        out = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.table(columns), out)
        return out.getvalue()

    return mutate


def _labels(columns: dict[str, list[Any]], draw: random.Random) -> None:
    columns["label"] = draw.choice(
        [
            [0.0, math.nan, 1.0, math.inf],
            [None, 1, None, 0],
            [-7, 1, 0, 1],
            [2**62, 1, 0, 1],
            ["cat", None, "dog", ""],
            [[0], [1], [0], [1]],
            [True, False, True, False],
            [{"a": 1}, {"a": 2}, {"a": 3}, {"a": 4}],
            [b"cat", b"dog", b"cat", b"dog"],
            [None, None, None, None],
        ]
    )


def _cells(columns: dict[str, list[Any]], draw: random.Random) -> None:
    columns["image"] = draw.choice(
        [
            [None, *columns["image"][1:]],
            [{"bytes": None, "path": "a"}, *columns["image"][1:]],
            [{"bytes": b"x", "path": None}] * 4,
            ["text"] * 4,
            [1, 2, 3, 4],
            [b"", b"x", b"y", b"z"],
            [{"path": "a"}] * 4,
            [{"bytes": "text", "path": "a"}] * 4,
            [{"bytes": [1, 2], "path": "a"}] * 4,
        ]
    )


def _without(columns: dict[str, list[Any]], draw: random.Random) -> None:
    del columns[draw.choice(sorted(columns))]


def _no_rows(columns: dict[str, list[Any]], draw: random.Random) -> None:
    columns.update(label=[], image=[])


PARQUET: dict[str, Mutate] = {
    **BYTES,
    "labels": _table(_labels),
    "cells": _table(_cells),
    "without a column": _table(_without),
    "no rows": _table(_no_rows),
}

# --- what is read must be right --------------------------------------------------------------------------------------


def check_detection(data: DetectionData, masks: bool) -> None:
    """Boxes are finite, inside and not empty, labels are classes, and every outline can be drawn.

    Raises:
        AssertionError: one is not.
    """
    for record in data.records:
        boxes, limits = record.boxes, np.array([record.width, record.height] * 2)
        assert np.isfinite(boxes).all() and (boxes >= 0).all() and (boxes <= limits).all(), boxes
        assert (boxes[:, 2:] > boxes[:, :2]).all() and len(record.labels) == len(boxes)
        assert all(0 <= label < len(data.names) for label in record.labels)
        assert len(record.outlines) == (len(boxes) if masks else 0)
        for outline in record.outlines:
            size = (record.height, record.width)
            assert rle.outline_mask(outline, size, size, flip=False).shape == size


def check_perfect(data: DetectionData) -> None:
    """Detections equal to the ground truth have an AP of 1 for each size of object that there is.

    Raises:
        AssertionError: the evaluator reads the document otherwise than it is meant.
    """
    truth = data.ground_truth["annotations"]
    found = [
        {**{name: entry[name] for name in ("image_id", "category_id", "bbox")}, "score": 1.0}
        for entry in truth
        if not entry["iscrowd"] and min(entry["bbox"][2:]) > 0
    ]
    if not found or len(found) != sum(not entry["iscrowd"] for entry in truth):
        return
    # More than a hundred objects of an image count as a hundred, and equal boxes may be matched in any order.
    figure = coco_ap(data.ground_truth, found, "bbox")["AP"]
    assert figure is None or figure > 0.999, f"AP of perfect detections is {figure}"


def read_coco_folder(folder: Path) -> None:
    """COCO as a detector with masks reads it, training and validation."""
    for part in ("train", "val"):
        for masks in (True, False):
            data = read_data(str(folder), part, masks, 1)
            check_detection(data, masks)
        prove_images(data.records, ALONE, 1)
        if part == "train":
            document = json.loads((folder / "annotations" / "instances_train.json").read_bytes())
            expected = sum(not entry.get("iscrowd") for entry in document["annotations"])
            left = sum(int(note.split()[0]) for note in data.notes if "crowds" not in note)
            assert sum(len(record.labels) for record in data.records) == expected - left, "objects are lost"
        else:
            check_perfect(data)


def read_voc_folder(folder: Path) -> None:
    """VOC as a detector reads it."""
    for part in ("train", "val"):
        data = read_data(str(folder / "VOC2007"), part, False, 1)
        check_detection(data, False)
        prove_images(data.records, ALONE, 1)
    check_perfect(data)


def read_cityscapes_folder(folder: Path) -> None:
    """Cityscapes' instances as a detector with masks reads them."""
    for part in ("train", "val"):
        data = read_data(str(folder), part, True, 1)
        check_detection(data, True)
        prove_images(data.records, ALONE, 1)
    check_perfect(data)


def read_segmentation(folder: Path) -> None:
    """Images and labels as a segmenter reads them: every pixel is a class or ignored."""
    data = read_layout(str(folder), "train")
    inspection = inspect_all(data.pairs, ALONE, 1)
    names = data.names or {value: str(value) for value in range(max(inspection.present) + 1)}
    labels = label_map(names, data.ignored)
    check_values(data.pairs, inspection, labels)
    for pair in data.pairs:
        classes = read_label(pair.label, labels)
        with Image.open(pair.image) as image:
            assert classes.shape == image.size[::-1]
        assert ((classes < labels.classes) | (classes == IGNORED)).all()


def read_image_list(folder: Path) -> None:
    """A list of labelled images and a list of paths, as semi-supervised evaluations and loaders read them."""
    listed = list_images(folder / "paths.txt")
    assert len(listed.files) == len(listed.labels) == len(listed.names)
    names = [f"class{number % 2}/{number}.jpg" for number in range(8)]
    found = read_list(str(folder / "labelled.txt"), names, len(names))
    assert len(found) and (np.diff(found) > 0).all() and 0 <= found[0] and found[-1] < len(names)


def read_classes(folder: Path) -> None:
    """A list of classes, as the packers read it."""
    wanted = read_class_list(folder / "classes.txt")
    found, missing = wanted.found_in(["n01", "n02", "caf\u00e9"])
    assert found or missing or all(line.startswith("#") for line in wanted.lines)


def read_parquet(folder: Path) -> None:
    """A table of images and labels, as the packers and the loaders read it."""
    images = ParquetImages([folder / "images.parquet"])
    assert len(images.names) == len(images.labels) == len(images)
    assert all(isinstance(name, str) for name in images.names)
    assert (images.labels >= -1).all()
    assert not images.classes or images.labels.max(initial=-1) < len(images.classes)
    for number in range(len(images)):
        with contextlib.suppress(OSError):
            assert isinstance(images.read(number), bytes)


# --- data sets -------------------------------------------------------------------------------------------------------


def _write_coco(folder: Path) -> None:
    for part in ("train", "val"):
        write_coco(folder, coco_document(3), part)


def _write_voc(folder: Path) -> None:
    for split in ("trainval", "test"):
        images = {f"{split}{number}": [("cat", (5, 6, 30, 40), 0), ("dog", (1, 1, 60, 50), 1)] for number in range(2)}
        write_voc(folder, "VOC2007", split, images)


def _write_cityscapes(folder: Path) -> None:
    ids = np.full((48, 64), 7, np.uint16)
    ids[4:20, 6:30], ids[25:40, 30:60], ids[0:3, 0:3] = 26_001, 24_000, 24
    for part in ("train", "val"):
        write_cityscapes(folder, part, {"a": ids, "b": ids.T[:48, :48].copy()})


def _write_segmentation(folder: Path) -> None:
    values = np.arange(48 * 64).reshape(48, 64) // 1024
    for number in range(2):
        for name, pixels in (("images", np.full((48, 64, 3), 90, np.uint8)), ("labels", values.astype(np.uint8))):
            (folder / name).mkdir(exist_ok=True)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    (folder / "classes.json").write_text(json.dumps({"classes": {"0": "a", "1": "b", "2": "c"}, "ignore_index": 255}))


def _write_lists(folder: Path) -> None:
    names = [f"class{number % 2}/{number}.jpg" for number in range(8)]
    (folder / "paths.txt").write_text("\n".join(names))
    (folder / "labelled.txt").write_text("# by hand\n" + "\n".join(names[::3]) + "\n")


def _write_classes(folder: Path) -> None:
    (folder / "classes.txt").write_text("n01 tench\n# not this\nn02\ncaf\u00e9\n", encoding="utf-8")


def _write_parquet(folder: Path) -> None:
    (folder / "images.parquet").write_bytes(_table(lambda columns, draw: None)(b"", random.Random(0)))


FORMATS: dict[str, Format] = {
    "coco": Format(_write_coco, "annotations/*.json", read_coco_folder, {**JSON, "run lengths": _run_lengths}),
    "voc": Format(_write_voc, "VOC2007/Annotations/*.xml", read_voc_folder, XML),
    "voc list": Format(_write_voc, "VOC2007/ImageSets/Main/*.txt", read_voc_folder, TEXT),
    "cityscapes": Format(_write_cityscapes, "gtFine/*/ulm/*.png", read_cityscapes_folder, MASK),
    "segmentation labels": Format(_write_segmentation, "labels/*.png", read_segmentation, MASK),
    "segmentation classes": Format(_write_segmentation, "classes.json", read_segmentation, JSON),
    "lists": Format(_write_lists, "*.txt", read_image_list, TEXT),
    "classes": Format(_write_classes, "classes.txt", read_classes, TEXT),
    "parquet": Format(_write_parquet, "images.parquet", read_parquet, PARQUET),
}


# --- the attack ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _time_limit() -> Iterator[None]:
    def stop(number: int, frame: object) -> None:
        raise AssertionError(f"takes longer than {LIMIT_S} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(LIMIT_S)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def verdict(kind: Format, folder: Path) -> str:
    """What reading a folder ends in: "read" or "refused".

    Raises:
        AssertionError: what was read is wrong, or the refusal is not one line with exit code 2.
        Exception: a traceback that a user would see.
    """

    def read() -> int:
        kind.read(folder)
        return 0

    said = io.StringIO()
    with _time_limit(), contextlib.redirect_stderr(said):
        code = run_to_exit_code(read)
    if code == 0:
        return "read"
    lines = said.getvalue().splitlines()
    assert code == EXIT_USER_MISTAKE and len(lines) == 1 and len(lines[0]) > 30, (code, lines)
    assert len(lines[0]) < 3_000, f"the line has {len(lines[0])} characters"
    return "refused"


def attack(count: int, seed: int = 0, only: str = "") -> tuple[Counter[tuple[str, str, str]], list[str]]:
    """Outcomes of `count` mutations by (format, mutation, outcome), all pairs in turn; and every fault, in words."""
    draw = random.Random(seed)
    pairs = [(name, mutation) for name in FORMATS if only in name for mutation in FORMATS[name].mutations]
    tally: Counter[tuple[str, str, str]] = Counter()
    faults: list[str] = []
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with tempfile.TemporaryDirectory() as place:
        whole = {name: Path(place) / "whole" / name for name in FORMATS}
        for name, folder in whole.items():
            folder.mkdir(parents=True)
            FORMATS[name].write(folder)
            assert verdict(FORMATS[name], folder) == "read", name
        for number in range(count):
            name, mutation = pairs[number % len(pairs)]
            folder = Path(place) / "damaged"
            shutil.copytree(whole[name], folder)
            file = draw.choice(sorted(folder.glob(FORMATS[name].files)))
            file.write_bytes(FORMATS[name].mutations[mutation](file.read_bytes(), draw))
            started = time.monotonic()
            try:
                outcome = verdict(FORMATS[name], folder)
            except Exception as fault:  # any at all: that is what is looked for
                outcome = "FAULT"
                where = traceback.extract_tb(fault.__traceback__)[-1]
                faults.append(
                    f"mutation {number} (seed {seed}), {name}, {mutation}: {type(fault).__name__}: "
                    f"{str(fault)[:200]} at {Path(where.filename).name}:{where.lineno}"
                )
            if time.monotonic() - started > LIMIT_S:
                faults.append(f"mutation {number} (seed {seed}), {name}, {mutation}: takes longer than {LIMIT_S} s")
            tally[name, mutation, outcome] += 1
            shutil.rmtree(folder)
    growth = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    if growth > MOST_GROWTH_KIB:
        faults.append(f"memory grew by {growth} KiB")
    return tally, faults


def main(argv: list[str]) -> int:
    """The long form; prints a table and writes it where `--report` says."""
    parser = argparse.ArgumentParser(description="Read damaged annotations by every reader.")
    parser.add_argument("--mutations", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="formats whose name holds this")
    parser.add_argument("--report", type=Path, help="text file to write")
    arguments = parser.parse_args(argv)
    tally, faults = attack(arguments.mutations, arguments.seed, arguments.only)
    lines = [f"python -m tests.faults.annotations --mutations {arguments.mutations} --seed {arguments.seed}"]
    lines += [f"{name}  {mutation}  {outcome}  {count}" for (name, mutation, outcome), count in sorted(tally.items())]
    lines += faults
    lines.append(f"{tally.total()} mutations, {len(faults)} faults: each other one was read right or refused in a line")
    publish(lines, arguments.report)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
