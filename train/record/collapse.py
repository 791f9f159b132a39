"""Whether a network collapses, and the probable cause: rules over figures that were measured at one training step.

A collapsed network gives every image nearly one embedding, or is given nothing that it could learn from. The rules
read only measured figures (`Signs`); `train/measure/collapse.py` measures them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

KIND = "collapse"
"""Kind of the rows of `metrics.jsonl` that announce it."""
_ALIKE_STD, _ALIKE_RANK = 0.02, 1.1
"""Below these the embeddings are alike whatever the cause."""
_NEARLY_STD, _NEARLY_RANK = 0.2, 2.0
"""Below these a collapse may begin: healthy small runs pass through them too, so that a cause must be measured."""
_ONE_COLOUR = _ONE_PICTURE = _ONE_VIEW = 1e-3
_BLOWN_UP = 30.0
_AROUND_PREDICTOR = 1e-6
_IDENTITY = 1e-4
_NO_DISTANCE = 1e-7
_FLAT_NATS = 0.1
_SHARP = 1000.0
_FAR_ABOVE_CHANCE = 3.0


@dataclass(frozen=True)
class Signs:
    """What was measured at one step, on one rank's part of the batch.

    Attributes:
        pixels_apart: standard deviation within a view, mean over images; views are normalised, so about 1.
        images_apart: standard deviation of a pixel over the images of the batch, mean over pixels; about 1.
        views_apart: mean absolute difference between the two views of an image.
        part: module whose output is the least spread: the encoder (pooled), a projector or a predictor.
        embedding_std: `feature_std` of its output rows.
        embedding_rank: `effective_rank` of its output rows; the smallest of all modules.
        weight_scale: the largest root mean square of a layer's weights times the root of its inputs; 0.3 to 3 in a
            fresh network.
        target_distance: relative distance between online and momentum weights; None without a momentum network.
        predictor_effect: 1 minus the mean cosine between what a predictor is given and what it returns; None where
            there is no predictor of equal width.
        around_predictor: norm of the gradient that reaches the encoder with the predictors' inputs detached; None
            where there is no predictor, or where nothing asked for it.
        queue_std: `feature_std` of the queue's rows, the smallest of all queues; None without a queue.
        temperature: the method's, None where it has none.
        chance: loss of a guess among the positive and the queue, ln(K + 1); None without a queue.
        loss: newest mean of the instance loss, None where the method records none.
    """

    pixels_apart: float
    images_apart: float
    views_apart: float
    part: str
    embedding_std: float
    embedding_rank: float
    weight_scale: float
    target_distance: float | None = None
    predictor_effect: float | None = None
    around_predictor: float | None = None
    queue_std: float | None = None
    temperature: float | None = None
    chance: float | None = None
    loss: float | None = None


@dataclass(frozen=True)
class Collapse:
    """An announcement: what is wrong, why, and where to look.

    Attributes:
        what: the symptom with its figures.
        cause: the probable cause with the figure that tells it.
        look_at: the flag or place to change.
    """

    what: str
    cause: str
    look_at: str


def collapse(signs: Signs) -> Collapse | None:
    """The symptom with its probable cause; None for a network that learns from its images."""
    symptom = _symptom(signs)
    if not symptom:
        return None
    causes = [found for cause in _CAUSES if (found := cause(signs)) is not None]
    if not causes and not is_certain(signs):
        return None
    return Collapse(symptom, *(causes or [_UNKNOWN])[0])


def row(found: Collapse, signs: Signs) -> dict[str, Any]:
    """What a row of metrics says of a collapse: its three sentences, and every figure to four digits."""
    figures = {name: float(f"{value:.4g}") for name, value in asdict(signs).items() if isinstance(value, float)}
    return {**asdict(found), "part": signs.part, "measured": figures}


def may_be_alike(signs: Signs) -> bool:
    """Whether the embeddings of different images are near one vector or one line; healthy ones can be for a while."""
    return signs.embedding_std < _NEARLY_STD or signs.embedding_rank < _NEARLY_RANK


def is_certain(signs: Signs) -> bool:
    """Whether the embeddings of different images are one vector or on one line, as those of no healthy run are."""
    return signs.embedding_std < _ALIKE_STD or signs.embedding_rank < _ALIKE_RANK


def _symptom(signs: Signs) -> str:
    """What is wrong, empty where nothing is."""
    if signs.images_apart < _ONE_PICTURE:
        return f"the images of a batch are all alike (a pixel varies by {signs.images_apart:.2g} over them)"
    if signs.pixels_apart < _ONE_COLOUR:
        return f"every view is of a single colour (its pixels vary by {signs.pixels_apart:.2g})"
    if signs.views_apart < _ONE_VIEW:
        return f"both views of an image are one picture (they differ by {signs.views_apart:.2g})"
    if signs.queue_std is not None and signs.queue_std < _ALIKE_STD:
        return f"the keys of the queue are all alike (spread {signs.queue_std:.2g})"
    if told := _loss_symptom(signs):
        return told
    if may_be_alike(signs):
        return (
            f"all images are given nearly one embedding (spread {signs.embedding_std:.2g}, effective rank "
            f"{signs.embedding_rank:.1f}, in the {signs.part})"
        )
    return ""


def _loss_symptom(signs: Signs) -> str:
    if signs.chance is None or signs.temperature is None or signs.loss is None:
        return ""
    if 2 / signs.temperature < _FLAT_NATS and abs(signs.loss - signs.chance) <= 2 / signs.temperature:
        return f"the loss stays at chance ({signs.loss:.4f}, a guess has {signs.chance:.4f})"
    if signs.loss > _FAR_ABOVE_CHANCE * signs.chance:
        return f"the loss is far above chance ({signs.loss:.1f}, a guess has {signs.chance:.1f})"
    return ""


def _of_data(signs: Signs) -> tuple[str, str] | None:
    crops = "--augment.min-scale, and the pictures of --data"
    if signs.pixels_apart < _ONE_COLOUR:
        return "the images are of one colour, or each crop is a single pixel of its image", crops
    if signs.images_apart < _ONE_PICTURE:
        return "the data are copies of one picture", "--data"
    if signs.views_apart < _ONE_VIEW:
        return "nothing is cropped or changed, so there is nothing to become invariant to", "--augment.profile"
    return None


def _of_weights(signs: Signs) -> tuple[str, str] | None:
    if signs.weight_scale < _BLOWN_UP and math.isfinite(signs.weight_scale):
        return None
    # The gradient of a contrastive loss grows with the inverse of its temperature, and so do the steps.
    if signs.temperature is not None and 1 / signs.temperature >= _SHARP:
        return (
            f"a temperature of {signs.temperature:g} multiplies cosines and gradients by {1 / signs.temperature:g}; "
            f"the weights of a layer are {signs.weight_scale:.2g} in size, about 1 in a fresh one",
            "--temperature",
        )
    return (
        f"steps are far too large: the weights of a layer are {signs.weight_scale:.2g} in size, about 1 in a fresh one",
        "--optim.lr, --schedule.warmup-epochs",
    )


def _of_target(signs: Signs) -> tuple[str, str] | None:
    if signs.target_distance is None or signs.target_distance > _NO_DISTANCE:
        return None
    return (
        f"the target is the online network itself (their weights differ by {signs.target_distance:.2g})",
        "--ema.momentum",
    )


def _of_stop_gradient(signs: Signs) -> tuple[str, str] | None:
    if signs.around_predictor is None or signs.around_predictor < _AROUND_PREDICTOR:
        return None
    return (
        f"the target is not detached: a gradient of {signs.around_predictor:.2g} reaches the encoder around the "
        "predictor",
        "stop-gradient (.detach()) on the targets in the method's forward",
    )


def _of_predictor(signs: Signs) -> tuple[str, str] | None:
    if signs.predictor_effect is None or signs.predictor_effect > _IDENTITY:
        return None
    return (
        f"the predictor changes nothing (1 - cosine of its input and output is {signs.predictor_effect:.2g})",
        "the method's predictor, --predictor-hidden-dim",
    )


def _of_queue(signs: Signs) -> tuple[str, str] | None:
    # A queue of equal keys from equal embeddings is what a collapse leaves, not what made it.
    if signs.queue_std is None or signs.queue_std >= min(_ALIKE_STD, 0.25 * signs.embedding_std):
        return None
    return "one key fills the queue while the images' own keys differ", "what the method enqueues, --queue-size"


def _of_temperature(signs: Signs) -> tuple[str, str] | None:
    if signs.temperature is None or signs.chance is None or signs.loss is None:
        return None
    reach = 2 / signs.temperature
    if reach < _FLAT_NATS:
        return (
            f"a temperature of {signs.temperature:g} lets cosines move the loss by {reach:.2g} at most",
            "--temperature",
        )
    if signs.loss > _FAR_ABOVE_CHANCE * signs.chance:
        return (
            f"a temperature of {signs.temperature:g} multiplies cosines by {1 / signs.temperature:g}",
            "--temperature",
        )
    return None


_UNKNOWN = (
    "none of the known ones was measured (data, views, size of the weights, target, stop-gradient, predictor, queue, "
    "temperature)",
    "--optim.lr, --bn.group-size, --ema.momentum",
)
_CAUSES: tuple[Callable[[Signs], tuple[str, str] | None], ...] = (
    # Data first: what they lack no setting mends. Weights next, because after a divergence every other figure follows.
    _of_data,
    _of_weights,
    _of_stop_gradient,
    _of_target,
    _of_predictor,
    _of_temperature,
    _of_queue,
)
