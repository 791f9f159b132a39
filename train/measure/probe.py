"""A linear classifier on the frozen features of a moment of a run: how far its classes can be told apart by planes.

It is trained anew at each evaluation, from zeros and with draws of its own, on the features that k-NN has computed. So
it touches neither gradients nor random state of the run, and there is nothing to save for a run that goes on. Figures
of two moments differ by the backbone alone.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

BATCH = 1024
LEAST_STEPS = 400
_LEAST_EPOCHS, _MOST_EPOCHS = 3, 100
_LR = 3e-3


def epochs_for(images: int) -> int:
    """Passes over the features: enough for `LEAST_STEPS` where there are few, a few where there are many."""
    steps = -(-images // BATCH)
    return min(max(-(-LEAST_STEPS // steps), _LEAST_EPOCHS), _MOST_EPOCHS)


def fit_probe(features: Tensor, labels: Tensor, classes: int, seed: int) -> tuple[Tensor, Tensor]:
    """Weight (classes, C) and bias (classes,), fp32, by cross-entropy; the same for the same arguments on one device.

    It is trained on channels of mean 0 and deviation 1; the result is for features as they are given.

    Args:
        features: (N, C), any float dtype.
        labels: (N,) int64 on any device.
        classes: number of classes.
        seed: of the order of the images, drawn from a generator of its own.
    """
    device, count = features.device, len(features)
    labels = labels.to(device)
    mean, scale = _mean_and_scale(features)
    draw = torch.Generator().manual_seed(seed)
    weight = torch.zeros(classes, features.shape[1], device=device, requires_grad=True)
    bias = torch.zeros(classes, device=device, requires_grad=True)
    optimizer = torch.optim.Adam([weight, bias], lr=_LR)
    total, step = epochs_for(count) * -(-count // BATCH), 0
    # Evaluations run without gradients, and under the caller's autocast a product would have three digits.
    with torch.enable_grad(), torch.autocast(device.type, enabled=False):
        for _ in range(epochs_for(count)):
            for chosen in torch.randperm(count, generator=draw).to(device).split(BATCH):
                optimizer.param_groups[0]["lr"] = 0.5 * _LR * (1 + math.cos(math.pi * step / total))
                loss = F.cross_entropy(
                    F.linear((features[chosen].float() - mean) / scale, weight, bias), labels[chosen]
                )
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                step += 1
    weight = (weight / scale).detach()
    return weight, bias.detach() - weight @ mean


def _mean_and_scale(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (C,) of each channel, fp32."""
    mean = features.mean(dim=0, dtype=torch.float32)
    # In pieces: a table in half precision must not become one of twice the size.
    spread = torch.stack([(piece.float() - mean).square().sum(dim=0) for piece in features.split(1 << 16)]).sum(dim=0)
    return mean, (spread / len(features)).sqrt().clamp_min(1e-6)


@torch.no_grad()
def probe_top1(bank: Tensor, labels: Tensor, queries: Tensor, query_labels: Tensor, seed: int) -> float:
    """Share of the queries whose class the probe names.

    Args:
        bank: (N, C) features to train on, any float dtype.
        labels: (N,) int64.
        queries: (Q, C) features to classify, on the same device.
        query_labels: (Q,) int64; a negative one is left out.
        seed: of the probe.
    """
    weight, bias = fit_probe(bank, labels, int(labels.max()) + 1, seed)
    known = query_labels >= 0
    with torch.autocast(bank.device.type, enabled=False):
        logits = F.linear(queries[known.to(queries.device)].float(), weight, bias)
    return float((logits.argmax(dim=1).cpu() == query_labels[known].cpu()).double().mean())
