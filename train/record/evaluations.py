"""What was measured on a backbone: the result files of `train/evaluate.py`, beside published figures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from train.record.published import Published
from train.record.run import METRICS, Run

NAMES = {
    "top1": "top-1",
    "top5": "top-5",
    "real_top1": "ReaL top-1",
    "best_top1": "best epoch's top-1",
    "top1_majority": "majority top-1",
    "box_ap": "box AP",
    "box_ap50": "box AP50",
    "box_ap75": "box AP75",
    "mask_ap": "mask AP",
    "mask_ap50": "mask AP50",
    "mask_ap75": "mask AP75",
    "miou": "mIoU",
    "pixel_accuracy": "pixel accuracy",
    "mean_class_accuracy": "class accuracy",
}
"""Shares that a result file may hold, and what they are called."""
PROTOCOLS = ("linear", "knn", "fewshot", "semi", "detect", "segment")
_IMAGENET_VAL = 50_000


@dataclass(frozen=True)
class Measurement:
    """One result.

    Attributes:
        protocol: of `train/evaluate.py`.
        task: its variant as in `Published`: neighbours, share of the labels, or data set and model.
        figures: name -> percent.
        facts: the result file.
        file: its name.
    """

    protocol: str
    task: str
    figures: dict[str, float]
    facts: dict[str, Any]
    file: str

    @property
    def untrained(self) -> bool:
        """Whether a fresh backbone was measured, as a baseline."""
        return bool(self.facts.get("untrained"))


def measurements(file: str, facts: dict[str, Any]) -> list[Measurement]:
    """The results in one file: k-NN has one for each k."""
    protocol = facts["protocol"]
    # Published figures are for one number of neighbours each.
    if protocol == "knn" and isinstance(facts.get("results"), list):
        return [Measurement(protocol, f"{row['k']}-NN", _figures(row), facts, file) for row in facts["results"]]
    figures = _figures(facts.get("best", {})) | _figures(facts.get("metrics", {})) | _figures(facts)
    return [Measurement(protocol, _task(facts), figures, facts, file)]


def results(run: Run) -> list[Measurement]:
    """Everything that was measured on a run's backbone, the online k-NN included unless it was measured again since."""
    found = [each for name, facts in run.scores.items() for each in measurements(name, facts)]
    rows = run.of_kind("knn")
    if rows:
        # A measurement by `train/evaluate.py` replaces the online one of the same kind.
        again = {(each.task, each.untrained) for each in found if each.protocol == "knn"}
        for row, untrained in ((rows[-1], False), (rows[0], True)):
            task = f"{row['k']}-NN"
            # A run may have only one row, which is then its first and its last.
            if (task, untrained) not in again and (row["step"] == 0) == untrained:
                facts = {**row, "protocol": "knn", "untrained": untrained}
                found.append(Measurement("knn", task, {"top1": 100 * row["top1"]}, facts, METRICS))
    return found


def place(key: tuple[str, str]) -> tuple[int, int, str]:
    """Where a (protocol, task) stands in a table; numbers in tasks count as numbers."""
    protocol, task = key
    digits = "".join(character for character in task if character.isdigit())
    known = PROTOCOLS.index(protocol) if protocol in PROTOCOLS else len(PROTOCOLS)
    return known, int(digits or 0), f"{protocol} {task}"


def _figures(values: dict[str, Any]) -> dict[str, float]:
    return {name: 100 * values[name] for name in NAMES if isinstance(values.get(name), int | float)}


def _task(facts: dict[str, Any]) -> str:
    if facts["protocol"] not in ("fewshot", "semi"):
        return str(facts.get("task", ""))
    # A drawn list names its fraction; a given list has only the share it came to.
    share = facts.get("fraction", facts.get("share"))
    return "" if share is None else f"{100 * share:.2g}%"


def unread(facts: Mapping[str, Any]) -> str:
    """What a result says of validation images that could not be read: " without 3 unreadable ones", or nothing."""
    # An online k-NN row has its own field; older result files have none.
    count = facts.get("bad_images", {}).get("--val-data", 0) or facts.get("val_bad", 0)
    return f" without {count} unreadable ones" if count else ""


def describe(figures: Mapping[str, float]) -> str:
    """Figures in words, in the order of `NAMES`."""
    return ", ".join(f"{label} {figures[name]:.1f}" for name, label in NAMES.items() if name in figures)


def differences(row: Published, measured: Measurement) -> list[str]:
    """Differences between the evaluation of a published figure and ours, in words."""
    facts = measured.facts
    found = [] if row.task == measured.task else [f"task: {row.task} there, {measured.task} here"]
    images = facts.get("val_images")
    if row.protocol in ("linear", "knn", "fewshot", "semi") and images != _IMAGENET_VAL:
        ours = f"{images or '?'} other images{unread(facts)}"
        found.append(f"measured on: {row.data}'s validation images there, {ours} here")
    if row.protocol == "knn":
        found.append("vote: not stated there, weighted by exp(cosine / 0.07) here")
    found += _classifier_differences(row, facts) if row.protocol in ("linear", "fewshot") else []
    if row.protocol == "semi":
        pairs = (("epochs", 50), ("global_batch", 256))
        found += [
            f"fine-tuning {name.replace('_', ' ')}: {there} there, {facts[name]} here"
            for name, there in pairs
            if facts.get(name, there) != there
        ]
        if "fraction" in facts:
            found.append("labelled images: SimCLR's list there, a drawn one here")
    return found


def _classifier_differences(row: Published, facts: dict[str, Any]) -> list[str]:
    # Imported here, because only linear results need it.
    from train.eval.linear import LINEAR_RECIPES, RECIPE_OF_METHOD

    name, own = facts.get("recipe"), RECIPE_OF_METHOD.get(row.method)
    if name != own or own is None:
        return [f"classifier: recipe {own} is the method's own, {name} here"]
    recipe = LINEAR_RECIPES[own]
    settings = (("epochs", recipe.epochs), ("global_batch", recipe.global_batch), ("batch_norm", recipe.batch_norm))
    return [
        f"classifier's {name.replace('_', ' ')}: {there} there, {facts[name]} here"
        for name, there in settings
        if facts.get(name, there) != there
    ]
