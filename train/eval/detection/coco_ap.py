"""COCO's average precision, through faster-coco-eval."""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from ...errors import UserMistake
from .inference import Detections

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")


def coco_results(
    detections: Sequence[Detections], category_ids: Sequence[int], kind: Literal["bbox", "segm"]
) -> list[dict[str, Any]]:
    """Detections as COCO's result format has them.

    For masks the box is left out: COCO's tools would take the object's size from it rather than from the mask.
    """
    results = []
    for found in detections:
        for row in range(len(found.scores)):
            x0, y0, x1, y1 = found.boxes[row].tolist()
            shape = {"bbox": [x0, y0, x1 - x0, y1 - y0]} if kind == "bbox" else {"segmentation": found.masks[row]}
            results.append(
                {
                    "image_id": found.image_id,
                    "category_id": category_ids[found.labels[row]],
                    "score": float(found.scores[row]),
                    **shape,
                }
            )
    return results


def coco_ap(
    ground_truth: dict[str, Any], results: Sequence[dict[str, Any]], kind: Literal["bbox", "segm"]
) -> dict[str, float | None]:
    """COCO's six average precisions in [0, 1]; None where the ground truth has no object of that size.

    Args:
        ground_truth: COCO document.
        results: COCO results, boxes or masks.
        kind: what is compared.

    Raises:
        UserMistake: the evaluation package is missing.
    """
    try:
        from faster_coco_eval import COCO, COCOeval_faster
    except ImportError:
        raise UserMistake("detection needs faster-coco-eval; run: bash tools/setup.sh --retry") from None
    # The tools write into what they are given, and print.
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(copy.deepcopy(ground_truth))
        evaluation = COCOeval_faster(truth, truth.loadRes(copy.deepcopy(list(results))), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    figures = np.asarray(evaluation.stats[: len(METRICS)], dtype=np.float64)
    # The tools write -1 where there is nothing of that size.
    return {name: None if value < 0 else float(value) for name, value in zip(METRICS, figures, strict=True)}
