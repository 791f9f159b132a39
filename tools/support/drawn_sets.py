"""Small annotated data sets of rectangles, drawn in the formats of COCO, PASCAL VOC and Cityscapes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

COLOURS = ((200, 40, 40), (40, 200, 40), (40, 40, 200))


def rectangle(x: int, y: int, w: int, h: int) -> list[float]:
    """COCO polygon of a rectangle, its corners in turn."""
    return [float(v) for v in (x, y, x + w, y, x + w, y + h, x, y + h)]


def draw_image(path: Path, size: tuple[int, ...], boxes: list[tuple[int, tuple[int, ...]]], seed: int) -> None:
    """A noisy grey image with a filled rectangle of its class's colour for each (class, x y w h)."""
    pixels = np.random.default_rng(seed).integers(90, 140, (size[1], size[0], 3), dtype=np.uint8)
    for label, (x, y, w, h) in boxes:
        # Noise here as well: in a flat area one rounding error can switch the same unit everywhere.
        pixels[y : y + h, x : x + w] = pixels[y : y + h, x : x + w] // 2 - 57 + np.array(COLOURS[label])
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def coco_document(images: int, size: tuple[int, int] = (80, 64)) -> dict[str, Any]:
    """Images of two rectangles each, of three classes with ids 3, 7 and 8."""
    document: dict[str, Any] = {
        "images": [],
        "annotations": [],
        "categories": [{"id": number, "name": f"class {number}"} for number in (3, 7, 8)],
    }
    for number in range(images):
        document["images"].append(
            {"id": 10 + number, "file_name": f"{number}.png", "width": size[0], "height": size[1]}
        )
        for part in range(2):
            box = (4 + 3 * number + 34 * part, 8 + 2 * number, 28, 36)
            document["annotations"].append(
                {
                    "id": len(document["annotations"]) + 1,
                    "image_id": 10 + number,
                    "category_id": (3, 7, 8)[(number + part) % 3],
                    "bbox": [float(v) for v in box],
                    "iscrowd": 0,
                    "area": float(box[2] * box[3]),
                    "segmentation": [rectangle(*box)],
                }
            )
    return document


def write_coco(root: Path, document: dict[str, Any], part: str = "train") -> Path:
    """COCO's folder with the document's images; returns the annotation file."""
    ids = [category["id"] for category in document["categories"]]
    for number, image in enumerate(document["images"]):
        own = [
            (ids.index(entry["category_id"]), tuple(int(v) for v in entry["bbox"]))
            for entry in document["annotations"]
            if entry["image_id"] == image["id"] and not entry["iscrowd"] and entry["category_id"] in ids
        ]
        draw_image(root / "images" / image["file_name"], (image["width"], image["height"]), own, number)
    file = root / "annotations" / f"instances_{part}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(document))
    return file


def write_voc(root: Path, year: str, split: str, images: dict[str, list[tuple[str, tuple[int, ...], int]]]) -> None:
    """VOC's folder: image name -> (class, xmin ymin xmax ymax, difficult) objects, 60 x 50 pixels each."""
    base = root / year
    (base / "ImageSets" / "Main").mkdir(parents=True, exist_ok=True)
    (base / "Annotations").mkdir(exist_ok=True)
    listing = base / "ImageSets" / "Main" / f"{split}.txt"
    listing.write_text("".join(f"{name}\n" for name in images))
    for name, objects in images.items():
        draw_image(base / "JPEGImages" / f"{name}.jpg", (60, 50), [], 0)
        text = "".join(
            f"<object><name>{label}</name><difficult>{difficult}</difficult><bndbox><xmin>{box[0]}</xmin>"
            f"<ymin>{box[1]}</ymin><xmax>{box[2]}</xmax><ymax>{box[3]}</ymax></bndbox></object>"
            for label, box, difficult in objects
        )
        size = "<size><width>60</width><height>50</height><depth>3</depth></size>"
        (base / "Annotations" / f"{name}.xml").write_text(f"<annotation>{size}{text}</annotation>")


def write_cityscapes(root: Path, part: str, maps: dict[str, np.ndarray]) -> None:
    """Cityscapes' folder: image name -> instance map (H, W)."""
    for name, ids in maps.items():
        draw_image(root / "leftImg8bit" / part / "ulm" / f"{name}_leftImg8bit.png", ids.shape[::-1], [], 0)
        folder = root / "gtFine" / part / "ulm"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(ids.astype(np.uint16)).save(folder / f"{name}_gtFine_instanceIds.png")
