"""Drawn data sets for the tiny scale: pictures with classes, COCO, VOC and Cityscapes, and a classifier's weights."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save
from torchvision.models import resnet18

from pipeline.atomic import replacing
from tools.bench.shapes import SIDE, write_pictures
from tools.reproduction.scales import Sources
from tools.support.drawn_sets import coco_document, draw_image, write_cityscapes, write_coco, write_voc

_CAR, _PERSON, _ROAD, _SKY = 26, 24, 7, 23  # label ids of Cityscapes


def drawn_sources(folder: Path) -> Sources:
    """The sources of the tiny scale; what is not there yet is drawn into `folder`."""
    if not folder.is_dir():
        # A folder with its final name is whole, so a killed run does not leave half a data set.
        with replacing(folder, durable=False) as place:
            _draw(place)
    pictures = (str(folder / "pictures" / "train"), str(folder / "pictures" / "val"))
    return Sources(
        imagenet=pictures,
        imagenet100=pictures,
        coco=str(folder / "coco"),
        voc=str(folder / "VOCdevkit"),
        cityscapes=str(folder / "cityscapes"),
        supervised=str(folder / "supervised-resnet18.safetensors"),
        boxes=str(folder / "boxes.json"),
    )


def _draw(folder: Path) -> None:
    folder.mkdir(parents=True)
    # More than a hundred, since Tables 9 and 10 let a hundred neighbours vote.
    write_pictures(folder / "pictures" / "train", 9, seed=0)
    write_pictures(folder / "pictures" / "val", 2, seed=1)
    _draw_boxes(folder / "pictures" / "train", folder / "boxes.json")
    # One picture to measure on: a mask head on a CPU takes a second for the hundred detections of each.
    for part, images in (("train2017", 2), ("val2017", 1)):
        write_coco(folder / "coco", coco_document(images), part)
    _draw_voc(folder / "VOCdevkit")
    _draw_cityscapes(folder / "cityscapes")
    # Weights that were never trained: they stand in for a supervised classifier's.
    torch.manual_seed(0)
    (folder / "supervised-resnet18.safetensors").write_bytes(save(resnet18().state_dict()))


def _draw_boxes(pictures: Path, file: Path) -> None:
    """COCO-format boxes of the pictures, as a detector would give them: the middle of each."""
    names = sorted(path.relative_to(pictures).as_posix() for path in pictures.rglob("*.jpg"))
    quarter, half = SIDE // 4, SIDE // 2
    numbered = list(enumerate(names, 1))
    box = {"bbox": [quarter, quarter, half, half], "area": half * half, "category_id": 1, "iscrowd": 0}
    document = {
        "images": [{"id": n, "file_name": name, "width": SIDE, "height": SIDE} for n, name in numbered],
        "annotations": [{**box, "id": n, "image_id": n} for n, _ in numbered],
        "categories": [{"id": 1, "name": "object"}],
    }
    file.write_text(json.dumps(document))


def _draw_voc(root: Path) -> None:
    for year, split in (("VOC2007", "trainval"), ("VOC2012", "trainval"), ("VOC2007", "test")):
        names = [f"{year[-2:]}{split}{number}" for number in range(4)]
        objects: list[list[tuple[str, tuple[int, ...], int]]] = [
            [("cat", (5, 5, 30, 40), 0)],
            [("dog", (10, 8, 50, 45), 0)],
        ] * 2
        write_voc(root, year, split, dict(zip(names, objects, strict=True)))
    lists = root / "VOC2012" / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    for split in ("train", "val"):
        names = [f"{split}{number}" for number in range(4)]
        (lists / f"{split}.txt").write_text("".join(f"{name}\n" for name in names))
        for number, name in enumerate(names):
            draw_image(root / "VOC2012" / "JPEGImages" / f"{name}.jpg", (60, 50), [(0, (5, 5, 25, 30))], number)
            _save_labels(root / "VOC2012" / "SegmentationClass" / f"{name}.png", (50, 60), 8, 0)


def _draw_cityscapes(root: Path) -> None:
    for part, images in (("train", 2), ("val", 1)):
        names = [f"ulm_{number:06d}_000019" for number in range(images)]
        ids = np.full((64, 96), _ROAD)
        ids[10:50, 10:40], ids[20:60, 50:80] = _CAR * 1000, _PERSON * 1000
        write_cityscapes(root, part, {name: ids for name in names})
        for name in names:
            _save_labels(root / "gtFine" / part / "ulm" / f"{name}_gtFine_labelIds.png", (64, 96), _ROAD, _SKY)


def _save_labels(path: Path, shape: tuple[int, int], inside: int, outside: int) -> None:
    """A label file (H, W) with one value in a rectangle and another around it."""
    labels = np.full(shape, outside, np.uint8)
    labels[5:35, 5:30] = inside
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(labels).save(path)
