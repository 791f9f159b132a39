"""The `knn` command: exact nearest neighbours over centre views, weighted and majority votes."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..errors import UserMistake
from ..measure.knn import predict_over_ranks
from .accuracy import read_real_labels, real_accuracy
from .options import KnnConfig
from .session import class_count, open_session, percent, table
from .splits import source_names

_BLOCKS = 8


def run(config: KnnConfig) -> int:
    """The `knn` command."""
    if not config.k:
        raise UserMistake("--k needs a number of neighbours, as 20 or 10,20")
    with open_session("knn", config) as session:
        # ImageNet in half precision is 5 GB of each GPU; the memory of a host holds the table with all digits.
        compact = session.runtime.device.type != "cpu"
        bank, data_hash = session.features_of(config.data, compact=compact)
        queries, val_hash = session.features_of(config.val_data, compact=compact)
        # Classes that do not fit are refused before the search.
        classes = class_count(bank.labels.numpy(), queries.labels.numpy())
        real = None
        if config.real_labels:
            names = source_names(config.val_data)
            every = read_real_labels(config.real_labels, names, len(queries.labels) + queries.bad, classes)
            real = [every[sample] for sample in queries.samples.tolist()]
        ks = _that_vote(config.k, len(bank.features))
        for k in config.k:
            if k not in ks:
                session.say(f"--k {k}: --data has {len(bank.features)} images that can be read, which all vote")
        runtime = session.runtime
        predict = predict_over_ranks(runtime.rank, runtime.world_size, runtime.gather_objects)
        # In pieces whose borders are those of the blocks that `predict` makes of a rank's share: the same sums.
        pieces = queries.features.split(_BLOCKS * config.block * runtime.world_size)
        found = []
        with session.progress("search", len(pieces), "pieces") as progress:
            for piece in pieces:
                found.append(predict(bank.features, bank.labels, piece, ks, config.temperature, classes, config.block))
                progress.step()
        predictions = {k: tuple(map(torch.cat, zip(*(each[k] for each in found), strict=True))) for k in ks}
        rows = []
        for k, (weighted, majority) in predictions.items():
            row = {"k": k, "top1": _share(weighted, queries.labels), "top1_majority": _share(majority, queries.labels)}
            rows.append(row if real is None else {**row, "real_top1": real_accuracy(weighted.numpy(), real)})
        header = ["k", "weighted top-1", "majority top-1", "ReaL (weighted)"]
        session.say(
            table(
                header,
                [
                    [str(row["k"]), percent(row["top1"]), percent(row["top1_majority"]), percent(row.get("real_top1"))]
                    for row in rows
                ],
            )
        )
        session.write(
            {
                "data_hash": data_hash,
                "val_data_hash": val_hash,
                "train_images": len(bank.labels),
                "val_images": len(queries.labels),
                "classes": classes,
                "results": rows,
                "top1": rows[0]["top1"],
                "k": rows[0]["k"],
            }
        )
    return 0


def _that_vote(ks: Sequence[int], images: int) -> tuple[int, ...]:
    """The numbers of neighbours that can vote, without repetition: the result must not claim more than there are."""
    return tuple(dict.fromkeys(min(k, images) for k in ks))


def _share(predicted: object, labels: object) -> float:
    return float((predicted == labels).double().mean())  # type: ignore[attr-defined]
