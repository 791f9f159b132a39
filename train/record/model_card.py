"""The model card beside an exported backbone: what it is, how it was trained, what it scored, how to load it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from train.backbone_io import LoadedBackbone, version
from train.record.evaluations import Measurement, describe, measurements, unread
from train.record.run import Run, read_results, read_run

_LIBRARIES = {
    "torchvision": "torchvision",
    "timm": "timm",
    "detectron2": "detectron2",
    "hf": "transformers",
    "onnx": "onnx",
}
"""Export format -> what the hub calls the library that reads it."""


def evaluations(loaded: LoadedBackbone) -> list[Measurement]:
    """Results of `train/evaluate.py`, read from the result files beside a checkpoint."""
    if loaded.source.folder is not None:
        results = read_results(loaded.source.folder.glob("eval-*.json"))
    else:
        origin = Path(loaded.source.origin)
        results = read_results(origin.parent.glob(f"{origin.stem}.eval-*.json"))
    return [each for name, facts in results.items() for each in measurements(name, facts)]


def _flat(values: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for name, value in values.items():
        if isinstance(value, dict):
            found += _flat(value, f"{prefix}{name}.")
        else:
            found.append((prefix + name, value))
    return found


def _score_lines(loaded: LoadedBackbone, run: Run | None) -> list[str]:
    lines = []
    for each in evaluations(loaded):
        facts = each.facts
        name = f"{each.protocol} {each.task}".strip() + (" (untrained baseline)" if each.untrained else "")
        recipe = f", recipe {facts['recipe']}" if "recipe" in facts else ""
        where = f"{facts['val_images']} images{unread(facts)}, " if "val_images" in facts else ""
        lines.append(
            f"| {name}{recipe} | {describe(each.figures) or f'see {each.file}'} | {where}data "
            f"{str(facts.get('val_data_hash', '?'))[:12]} |"
        )
    if run is not None and (row := run.last("knn")) is not None:
        lines.append(f"| {row['k']}-NN during training | top-1 {100 * row['top1']:.2f}% | {row['val_images']} images |")
    if run is not None and (row := run.last("health")) is not None:
        figures = ", ".join(f"{name} {row[name]:.3f}" for name in ("feature_std", "effective_rank", "view_retrieval"))
        lines.append(f"| label-free health at step {row['step']} | {figures} | |")
    return lines


def _front_matter(arch: str, method: str, target: str) -> list[str]:
    """What the Hugging Face hub reads at the head of a README, as YAML: the library that loads it, and tags."""
    # JSON's strings are YAML's too, and a name from a foreign file may hold any sign.
    tags = ["self-supervised-learning", "regatta", method, arch]
    return [
        "---",
        f"library_name: {_LIBRARIES[target]}",
        "pipeline_tag: image-feature-extraction",
        "tags:",
        *[f"- {json.dumps(tag)}" for tag in tags],
        "---",
        "",
    ]


def model_card(loaded: LoadedBackbone, target: str, usage: str, images: str, parameters: int) -> str:
    """Markdown text of the card.

    Args:
        loaded: the backbone that was exported.
        target: export format.
        usage: code that loads the exported file.
        images: what images it takes.
        parameters: trainable parameters of the backbone.
    """
    recorded = None if loaded.source.folder is None else read_run(loaded.source.folder, partial=True)
    run = {} if recorded is None else recorded.config
    method = run.get("run", {}).get("method") or loaded.source.metadata.get("method") or "not known"
    facts = [
        ("method", method),
        ("architecture", f"{loaded.arch}, {parameters:,} parameters, no classifier"),
        ("recipe", run.get("run", {}).get("recipe", "not known")),
        ("data hash", run.get("data_hash", "not known")),
        ("images", run.get("data_images", "not known")),
        ("commit", run.get("versions", {}).get("commit") or "not known"),
        ("exported with", f"regatta {version()}"),
    ]
    saved = None if recorded is None else recorded.last("checkpoint")
    if saved is not None:
        facts.append(("optimizer steps taken", saved["step"]))
    scores = _score_lines(loaded, recorded)
    settings = _flat(run.get("recipe", {})) + _flat(run.get("model", {}))
    parts = [
        *_front_matter(loaded.arch, method, target),
        f"# {loaded.arch} backbone, {method}",
        "",
        "Trained without labels; the output is a feature map or its global average, not class scores.",
        "",
        *[f"- {name}: {value}" for name, value in facts],
        "",
        f"## Use ({target})",
        "",
        "```python",
        usage.strip(),
        "```",
        "",
        f"Input: {images}",
        "",
        "## Scores",
        "",
        *(["| what | figure | on |", "|---|---|---|", *scores] if scores else ["None were measured."]),
        "",
        "## Recipe",
        "",
        *([f"- {name}: {value}" for name, value in settings] or ["Not recorded in the checkpoint."]),
        "",
    ]
    return "\n".join(parts)
