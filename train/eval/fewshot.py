"""Few-shot linear classification: the linear protocol on a small, class-balanced share of the training images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ..measure.features import center_view
from .linear import choose_recipe, probe, report
from .options import EvalConfig, FewshotConfig
from .session import Session, open_session, result_path
from .splits import balanced_subset, read_list, source_names, write_list


def labelled_subset(
    session: Session, config: EvalConfig, fraction: float, list_file: str
) -> tuple[np.ndarray, dict[str, Any]]:
    """Sorted indices of the labelled images, and what the result file says of them; a drawn list is saved beside it."""
    # Opened for its labels and number of images alone; nothing is decoded.
    pipeline = session.open(config.data, (center_view(session.image_size),))
    try:
        names = source_names(config.data)
        if list_file:
            chosen = read_list(list_file, names, pipeline.num_samples)
            share = len(chosen) / pipeline.num_samples
            return chosen, {"list": list_file, "share": share, "subset_images": len(chosen)}
        # From the seed alone, so that all ranks draw the same images.
        chosen = balanced_subset(pipeline.labels, fraction, config.seed)
    finally:
        pipeline.close()
    result = result_path(session)
    path = result.with_name(f"{result.stem}.list.txt")
    if session.runtime.is_main:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Kept beside the result: the figure depends on which images were drawn.
        write_list(Path(path), chosen, names)
        session.say(f"{len(chosen)} images, {fraction:g} of each class; their list: {path}")
    return chosen, {"fraction": fraction, "list": str(path), "subset_images": len(chosen)}


def run(config: FewshotConfig) -> int:
    """The `fewshot` command."""
    # Flags are refused here, before the backbone is loaded.
    choose_recipe(config, "")
    with open_session("fewshot", config) as session:
        population, facts = labelled_subset(session, config, config.fraction, config.list)
        records, more = probe(session, config, population)
        report(session, records, {**more, **facts})
    return 0
