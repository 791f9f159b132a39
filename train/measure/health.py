"""Label-free figures that tell whether a backbone learns, and whether it has collapsed: cheap pure functions."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_RETRIEVAL_IMAGES = 500


def _rows(features: Tensor) -> Tensor:
    """Unit rows in fp64 on the CPU of (N, C) features.

    The tables are small, and eigenvalues of a nearly collapsed table need the digits.
    """
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"features of shape {tuple(features.shape)}; give a table of at least two rows")
    return F.normalize(features.detach().double().cpu(), dim=1, eps=1e-12)


def feature_std(features: Tensor) -> float:
    """Spread of L2-normalised features (N, C): sqrt(C) times the mean over channels of their standard deviation.

    About 1 when directions are spread evenly over the sphere, 0 when all images have one feature.

    Source: the collapse indicator of SimSiam (Chen & He 2021, section 4.1), which is 1/sqrt(C) for a spread output;
    here scaled by sqrt(C), so that backbones of different width compare.
    """
    rows = _rows(features)
    return float(rows.std(dim=0, correction=0).mean() * math.sqrt(rows.shape[1]))


def effective_rank(features: Tensor) -> float:
    """How many dimensions the centred features (N, C) use, from 1 to min(N - 1, C).

    Rows are L2-normalised, their mean is subtracted, and the singular values s of the table are turned into shares
    p = s / sum(s): the result is exp(-sum p ln p). It is 1 for features on a line and r for r equal singular values. A
    table whose rows are all equal to rounding (largest s below 1e-6 sqrt(N)) has none to speak of and gives 1.

    Source: Roy & Vetterli 2007, definition 1; RankMe (Garrido et al. 2023) uses it for self-supervised features,
    uncentred. Centred here, because after a ReLU and pooling the shared mean would dominate.
    """
    rows = _rows(features)
    rows = rows - rows.mean(dim=0)
    # Eigenvalues of the smaller Gram matrix are the squares of the singular values, at a fraction of an SVD's cost.
    gram = rows @ rows.T if rows.shape[0] <= rows.shape[1] else rows.T @ rows
    singular = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
    if float(singular[-1]) < 1e-6 * math.sqrt(len(rows)):
        return 1.0
    # Squaring loses what is below sqrt(eps) of the largest value; drop that noise instead of counting it.
    singular = singular[singular > 1e-7 * singular[-1]]
    shares = singular / singular.sum()
    return float(torch.exp(-(shares * shares.log()).sum()))


def view_retrieval(features1: Tensor, features2: Tensor) -> float:
    """Share of images whose second augmented view is nearest, by cosine, to their first among all second views.

    Args:
        features1: (N, C) features of the first views of up to 500 images, the backbone in eval mode; more
            rows than 500 are left out, so that figures of different runs compare.
        features2: (N, C) features of the second views, same rows.

    Returns:
        A share in [0, 1]; chance is 1 / N. When several second views are equally near (a collapsed backbone) the image
        counts by its chance, 1 / (number that tie), so collapse reads as chance and not as success.
    """
    if features1.shape != features2.shape:
        raise ValueError(f"views of shapes {tuple(features1.shape)} and {tuple(features2.shape)} must match")
    first = _rows(features1[:MAX_RETRIEVAL_IMAGES])
    second = _rows(features2[:MAX_RETRIEVAL_IMAGES])
    similarity = first @ second.T
    own = similarity.diagonal()[:, None]
    # Similarities closer than rounding are ties.
    nearer = (similarity > own + 1e-12).any(dim=1)
    ties = ((similarity - own).abs() <= 1e-12).sum(dim=1)
    return float(torch.where(nearer, 0.0, 1.0 / ties).mean())


def health(features1: Tensor, features2: Tensor) -> dict[str, float]:
    """The three figures of a `health` row: std and rank of the first views, retrieval between both (see above)."""
    return {
        "feature_std": feature_std(features1),
        "effective_rank": effective_rank(features1),
        "view_retrieval": view_retrieval(features1, features2),
    }
