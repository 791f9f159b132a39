"""Published accuracies of the methods, to put beside a run, and what keeps the two from being comparable.

All are ImageNet-1K validation figures of the papers and their repositories, none is a result of this project.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Published:
    """One published figure.

    Attributes:
        method: method name as in `METHODS`.
        arch: backbone.
        epochs: length of pre-training.
        top1: top-1 accuracy in percent.
        top5: top-5 accuracy in percent, None where it was not given.
        source: who reported it, and the variant where there are several.
        protocol: what was measured.
    """

    method: str
    arch: str
    epochs: int
    top1: float
    top5: float | None
    source: str
    protocol: str = "linear"


_CARE = "CARE repository"
_REGIONCL = "RegionCL paper"
_LEWEL = "LEWEL paper"

PUBLISHED: tuple[Published, ...] = (
    Published("moco-v2", "resnet50", 100, 64.5, 86.1, "LEWEL paper's reproduction"),
    Published("moco-v2", "resnet50", 100, 49.3, None, "RegionCL paper, table 9", "20-NN"),
    Published("moco-v2", "resnet50", 200, 67.5, 88.2, "MoCo v2; top-5 from RegionCL's paper"),
    Published("moco-v2", "resnet50", 800, 71.1, 90.2, "MoCo v2"),
    Published("moco-v2", "resnet50", 800, 72.3, None, "symmetric loss"),
    Published("regioncl-m", "resnet50", 100, 54.7, None, "RegionCL paper, table 9", "20-NN"),
    Published("regioncl-m", "resnet50", 200, 69.4, 89.6, _REGIONCL),
    Published("regioncl-m", "resnet50", 800, 73.1, 91.5, _REGIONCL),
    Published("regioncl-m", "resnet50", 800, 73.9, 92.0, "RegionCL paper, symmetric loss"),
    Published("densecl", "resnet50", 200, 63.6, 85.5, _REGIONCL),
    Published("regioncl-d", "resnet50", 200, 68.5, 89.0, _REGIONCL),
    Published("simsiam", "resnet50", 100, 68.1, 88.2, "SimSiam; top-5 from RegionCL's paper"),
    Published("simsiam", "resnet50", 200, 70.0, None, "SimSiam paper"),
    Published("simsiam", "resnet50", 400, 70.8, None, "SimSiam paper"),
    Published("simsiam", "resnet50", 800, 71.3, None, "SimSiam paper"),
    Published("regioncl-s", "resnet50", 100, 71.3, 90.4, _REGIONCL),
    Published("moco-v3", "resnet50", 100, 68.9, None, "MoCo v3 repository"),
    Published("moco-v3", "resnet50", 300, 72.8, None, "MoCo v3 repository"),
    Published("moco-v3", "resnet50", 1000, 74.6, None, "MoCo v3 repository"),
    Published("regioncl-m3", "resnet50", 1000, 75.4, 92.6, _REGIONCL),
    Published("moby", "swin-t", 100, 70.9, 89.7, _REGIONCL),
    Published("moby", "swin-t", 300, 75.3, 92.2, _REGIONCL),
    Published("regioncl-moby", "swin-t", 100, 73.9, 91.8, _REGIONCL),
    Published("regioncl-moby", "swin-t", 300, 77.0, 93.1, _REGIONCL),
    Published("byol", "resnet50", 100, 66.5, None, "SimSiam paper"),
    Published("byol", "resnet50", 100, 70.6, 89.9, "LEWEL paper's reproduction"),
    Published("byol", "resnet50", 200, 70.6, None, "SimSiam paper"),
    Published("byol", "resnet50", 200, 71.9, 90.4, "LEWEL paper's reproduction"),
    Published("byol", "resnet50", 400, 73.2, None, "SimSiam paper"),
    Published("byol", "resnet50", 800, 74.3, 91.7, "BYOL"),
    Published("care", "resnet50", 100, 72.02, 90.02, _CARE),
    Published("care", "resnet50", 200, 73.78, 91.50, _CARE),
    Published("care", "resnet50", 400, 74.68, 91.97, _CARE),
    Published("care", "resnet50", 800, 75.56, 92.32, _CARE),
    Published("care", "resnet50-2x", 100, 73.51, 91.66, _CARE),
    Published("care", "resnet50-2x", 200, 75.00, 92.22, _CARE),
    Published("care", "resnet50-2x", 400, 76.48, 92.99, _CARE),
    Published("care", "resnet50-2x", 800, 77.04, 93.22, _CARE),
    Published("care", "resnet101", 100, 73.54, 91.63, _CARE),
    Published("care", "resnet101", 200, 75.89, 92.70, _CARE),
    Published("care", "resnet101", 400, 76.85, 93.31, _CARE),
    Published("care", "resnet101", 800, 77.23, 93.52, _CARE),
    Published("care", "resnet152", 100, 74.59, 92.09, _CARE),
    Published("care", "resnet152", 200, 76.58, 93.63, _CARE),
    Published("care", "resnet152", 400, 77.40, 93.63, _CARE),
    Published("care", "resnet152", 800, 78.11, 93.81, _CARE),
    Published("lewel-m", "resnet50", 100, 66.1, 87.2, _LEWEL),
    Published("lewel-m", "resnet50", 200, 68.4, 88.6, _LEWEL),
    Published("lewel-b", "resnet50", 100, 71.9, 90.5, _LEWEL),
    Published("lewel-b", "resnet50", 200, 72.8, 91.0, _LEWEL),
    Published("lewel-b", "resnet50", 400, 73.8, None, _LEWEL),
)

# Global batch of each method's published runs, where one was used throughout.
REFERENCE_BATCH: dict[str, int] = {
    "moco-v2": 256,
    "regioncl-m": 1024,
    "densecl": 256,
    "simsiam": 512,
    "moco-v3": 4096,
    "regioncl-m3": 4096,
    "moby": 512,
    "regioncl-moby": 512,
    "care": 1024,
    "lewel-m": 256,
    "lewel-b": 1024,
}
_IMAGENET_IMAGES = 1_281_167


def candidates(method: str, arch: str, epochs: int) -> list[Published]:
    """The published figures nearest to a run: its backbone where there are any, then the nearest schedule.

    Args:
        method: method of the run.
        arch: backbone of the run.
        epochs: epochs of the run's recipe.

    Returns:
        All figures of that method, backbone and schedule; empty where nothing was published (as for a method of ours).
    """
    rows = [row for row in PUBLISHED if row.method == method]
    rows = [row for row in rows if row.arch == arch] or [row for row in rows if row.arch in ("resnet50", "swin-t")]
    if not rows:
        return []
    nearest = min({row.epochs for row in rows}, key=lambda schedule: (abs(schedule - epochs), schedule))
    return [row for row in rows if row.epochs == nearest]


def differences(row: Published, config: dict[str, Any], images: int | None, measured: str | None) -> list[str]:
    """What differs between a run and the protocol of a published figure, in words.

    Args:
        row: the published figure.
        config: the run's `config.json`.
        images: images in the run's data, None if unknown.
        measured: the run's own measurement, such as "20-NN"; None if it has none.
    """
    recipe = config.get("recipe", {})
    found = []
    if images is None or images != _IMAGENET_IMAGES:
        here = "an unknown number of images" if images is None else f"{images:,} images"
        found.append(f"data: ImageNet-1K there, {here} here")
    pairs: list[tuple[str, Any, Any]] = [
        ("backbone", row.arch, recipe.get("arch")),
        ("epochs", row.epochs, recipe.get("epochs")),
        ("image size", 224, recipe.get("image_size")),
        ("global batch", REFERENCE_BATCH.get(row.method), recipe.get("global_batch")),
    ]
    for name, there, ours in pairs:
        if there is not None and ours != there:
            found.append(f"{name}: {there} there, {ours} here")
    if measured != row.protocol:
        found.append(f"measured: {row.protocol} there, {measured or 'nothing yet'} here")
    return found
