"""The figures of a run's `health`, `knn` and `probe` rows: the backbone measured on the run's own pipelines."""

from __future__ import annotations

import torch

from models.methods.base import Method

from ..data import RunData
from ..errors import NonFinite
from ..inputs import VIEWS
from ..runtime import Runtime
from .features import Features, evaluation_mode, extract_features
from .health import health
from .knn import knn_classify, predict_over_ranks
from .probe import epochs_for, probe_top1

KNN_NEIGHBOURS = 20


@torch.no_grad()
def health_figures(method: Method, data: RunData, runtime: Runtime) -> dict[str, float | str]:
    """Label-free figures of the backbone on images of `data.health`, the same two views of each every time.

    Returns:
        The three figures, and as `source` where their images are from.

    Raises:
        NonFinite: when the features are not finite, which no figure could tell.
    """
    features: dict[str, list[torch.Tensor]] = {name: [] for name in VIEWS}
    samples: list[torch.Tensor] = []
    data.health.set_epoch(0)
    with evaluation_mode(method.encoder):
        for batch in data.health:
            samples.append(batch.index)
            for name in VIEWS:
                with runtime.autocast():
                    features[name].append(method.features(batch.views[name]).float().cpu())
    # Where an image cannot be read another one is delivered, which would be there twice.
    bad = torch.tensor(list(data.health.stats().bad_records), dtype=torch.int64)
    kept = ~torch.isin(torch.cat(samples), bad)
    first, second = (torch.cat(features[name])[kept] for name in VIEWS)
    if not (first.isfinite().all() and second.isfinite().all()):
        raise NonFinite(
            "features are not finite: the backbone has diverged; lower --optim.lr, or use "
            "--precision bf16 or fp32, and go on from the last checkpoint or start over with --resume never"
        )
    return {**health(first, second), "source": data.health_source}


def labelled_features(method: Method, data: RunData, runtime: Runtime) -> tuple[Features, Features]:
    """Features of all training images, and of `--val-data`, on every rank."""
    assert data.bank is not None and data.queries is not None
    autocast_dtype = None if runtime.dtype is torch.float32 else runtime.dtype
    bank, queries = (
        # On the CPU, whose memory holds it, the table keeps all digits.
        extract_features(method.encoder, pipeline, runtime.device, autocast_dtype, compact=runtime.device.type != "cpu")
        for pipeline in (data.bank, data.queries)
    )
    return bank, queries


def probe_figures(tables: tuple[Features, Features], seed: int) -> dict[str, float | int]:
    """Top-1 on the second table of a linear classifier trained on the first; see `measure/probe.py`."""
    bank, queries = tables
    top1 = probe_top1(bank.features, bank.labels, queries.features, queries.labels, seed)
    counts = {"train_images": len(bank.features), "val_images": len(queries.features)}
    return {"top1": top1, "epochs": epochs_for(len(bank.features)), **counts}


def knn_figures(tables: tuple[Features, Features], runtime: Runtime) -> dict[str, float | int]:
    """20-NN top-1 of the backbone, of the two tables of `labelled_features`: the first is the bank of the second.

    Images that cannot be read are left out and counted as `train_bad` and `val_bad`.
    """
    bank, queries = tables
    predict = predict_over_ranks(runtime.rank, runtime.world_size, runtime.gather_objects)
    k = min(KNN_NEIGHBOURS, len(bank.features))
    weighted, majority = knn_classify(
        bank.features, bank.labels, queries.features, queries.labels, [k], predict=predict
    )[k]
    return {
        "top1": weighted,
        "top1_majority": majority,
        "k": k,
        "train_images": len(bank.features),
        "val_images": len(queries.features),
        **{name: found.bad for name, found in (("train_bad", bank), ("val_bad", queries)) if found.bad},
    }
