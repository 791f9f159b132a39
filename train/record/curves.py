"""The curves of a page: runs of one configuration as a mean with a band, each configuration in its colour."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

from train.record.charts import Series, line_chart
from train.record.comparison import standard_error
from train.record.groups import Curve, Group, counts_epochs, epochs_at
from train.record.run import Row, Run, chance_level

_PERCENT = 100.0
_Draw = Callable[..., str]


def curves(groups: Sequence[Group]) -> str:
    """Every curve that the runs have values for; a sentence where there are none."""
    runs = [run for group in groups for run in group.runs]
    axis = "epoch" if counts_epochs(runs) else "step"
    draw = partial(line_chart, x_label=axis)
    at = _at(axis)
    drawn = "".join(
        [
            *_learning(groups, draw, at),
            *_health(groups, draw, at),
            *_speed(groups, draw, at),
            *_schedule(groups, draw, at),
        ]
    )
    if not drawn:
        return '<p class="note">No step has been recorded yet.</p>'
    return f'<p class="note">{_about_bands(groups)}</p><div class="charts">{drawn}</div>'


def _about_bands(groups: Sequence[Group]) -> str:
    """What the bands mean, for the numbers of runs that there are."""
    counts = sorted({len(group.runs) for group in groups})
    said = ["Bands: k-NN of a single run ± one standard error of the images that were classified"]
    if 2 in counts:
        said.append("two seeds: their range")
    if counts[-1] > 2:
        said.append("three seeds and more: 95% confidence of the mean (Student's t)")
    return "; ".join(said) + "."


def _at(axis: str) -> Callable[[Run, Row], float]:
    return epochs_at if axis == "epoch" else lambda run, row: float(row["step"])


def _of_group(group: Group, kind: str, name: str, at: Callable[[Run, Row], float], scale: float = 1.0) -> Series:
    curve = group.curve(kind, name, at)
    low, high = (None if ends is None else [scale * value for value in ends] for ends in (curve.low, curve.high))
    return Series(group.name, curve.x, [scale * value for value in curve.y], group.colour, low=low, high=high)


def _per_group(
    groups: Sequence[Group], kind: str, name: str, at: Callable[[Run, Row], float], scale: float = 1.0
) -> list[Series]:
    return [_of_group(group, kind, name, at, scale) for group in groups]


def _accuracy(group: Group, at: Callable[[Run, Row], float]) -> Series:
    """k-NN top-1 in percent; of a single run with the standard error of the images that were classified."""
    found = _of_group(group, "knn", "top1", at, _PERCENT)
    if len(group.runs) > 1:
        return found
    images = [
        row.get("val_images", 0) for row in group.first.of_kind("knn") if isinstance(row.get("top1"), float | int)
    ]
    # A figure on few images moves by chance; without the band one image more looks like progress.
    errors = [standard_error(share, count) or math.nan for share, count in zip(found.y, images, strict=False)]
    if len(errors) != len(found.y):
        return found
    low, high = ([y + sign * error for y, error in zip(found.y, errors, strict=True)] for sign in (-1, 1))
    return Series(found.label, found.x, found.y, found.colour, low=low, high=high)


def _loss_terms(groups: Sequence[Group], at: Callable[[Run, Row], float]) -> list[Series]:
    """Every term of a single configuration; of several the instance loss, which all contrastive methods have."""
    if len(groups) > 1:
        return _per_group(groups, "train", "loss/ins", at)
    (group,) = groups
    names = dict.fromkeys(name for row in group.first.of_kind("train") for name in row if name.startswith("loss/"))
    found = []
    for colour, name in enumerate(names):
        curve: Curve = group.curve("train", name, at)
        found.append(Series(name, curve.x, curve.y, colour, low=curve.low, high=curve.high))
    return found


def _learning(groups: Sequence[Group], draw: _Draw, at: Callable[[Run, Row], float]) -> list[str]:
    # Runs with queues of one size share a line.
    levels = {round(level, 4): level for group in groups if (level := chance_level(group.first)) is not None}
    references = [(f"chance, ln(K+1) = {level:.2f}", level) for level in levels.values()]
    return [
        draw(
            "k-NN top-1, percent",
            "Labelled images told apart by their nearest neighbours; the first point is the untrained backbone.",
            [_accuracy(group, at) for group in groups],
        ),
        draw(
            "Linear probe top-1, percent",
            "The same images told apart by a linear classifier on the frozen features, with --probe.",
            _per_group(groups, "probe", "top1", at, _PERCENT),
        ),
        draw(
            "Loss",
            "The sum of all terms, as the method weighs them; losses of different methods do not compare.",
            _per_group(groups, "train", "loss", at),
        ),
        draw(
            "Loss by term" if len(groups) == 1 else "Instance loss",
            "With a queue the first values are low because its keys are still random; compare later ones with chance.",
            _loss_terms(groups, at),
            references=references,
        ),
    ]


def _health(groups: Sequence[Group], draw: _Draw, at: Callable[[Run, Row], float]) -> list[str]:
    return [
        draw(
            "View retrieval, percent",
            "Share of images whose second view is nearest to their first; needs no labels, and rises while the "
            "backbone learns. The images are trained on, unless there are --val-data or a --holdout.",
            _per_group(groups, "health", "view_retrieval", at, _PERCENT),
            zero=True,
        ),
        draw(
            "Effective rank",
            "How many directions the features use; a fall to a few means collapse.",
            _per_group(groups, "health", "effective_rank", at),
            zero=True,
        ),
        draw(
            "Feature spread",
            "Standard deviation of unit features, about 1 when spread evenly; near 0 means collapse.",
            _per_group(groups, "health", "feature_std", at),
            zero=True,
        ),
    ]


def _speed(groups: Sequence[Group], draw: _Draw, at: Callable[[Run, Row], float]) -> list[str]:
    return [
        line_chart(
            "Source images per second",
            "Each image counts once, however many views are cut from it; over the hours that the run has taken.",
            [_over_hours(group) for group in groups],
            x_label="hours",
            zero=True,
        ),
        draw(
            "Waiting for data, percent of the time",
            "Above a few percent the loader limits the run: see tools/doctor.py for what to change.",
            _per_group(groups, "train", "data_wait_share", at, _PERCENT),
            zero=True,
        ),
        draw(
            "Batches ready",
            "Batches that were waiting when the step asked for one, 2 at most in our own loaders; near 0 the loader "
            "limits the run.",
            _per_group(groups, "train", "batches_ready", at),
            zero=True,
        ),
    ]


def _over_hours(group: Group) -> Series:
    """Images per second of the first run of a group: runs of other machines took other hours, which have no mean."""
    run = group.first
    placed = [
        (seconds / 3600, row["images_per_s"])
        for row, seconds in zip(run.rows, run.elapsed(), strict=True)
        if row["kind"] == "train" and isinstance(row.get("images_per_s"), float | int)
    ]
    return Series(run.name, [x for x, _ in placed], [y for _, y in placed], group.colour)


def _schedule(groups: Sequence[Group], draw: _Draw, at: Callable[[Run, Row], float]) -> list[str]:
    return [
        draw("Gradient norm", "Before clipping.", _per_group(groups, "train", "grad_norm", at), zero=True),
        draw("Learning rate", "As the schedule gives it.", _per_group(groups, "train", "lr", at), zero=True),
        draw(
            "EMA coefficient",
            "How much of itself the momentum network keeps at each step.",
            _per_group(groups, "train", "ema_momentum", at),
        ),
    ]
