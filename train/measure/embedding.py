"""Features of any images from any backbone, as arrays and as a file."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from pipeline.atomic import write_atomically
from pipeline.interface import Pipeline, PipelineConfig
from pipeline.loaders import build_pipeline
from pipeline.stores import FileStore, TableStore

from ..backbone_io import LoadedBackbone, load
from ..cards import refuse_without_code
from ..errors import UserMistake
from ..eval.splits import source_names
from ..record.run import read_config
from .features import center_view, extract_features

SUFFIXES = (".npz", ".npy")


@dataclass(frozen=True)
class Embedding:
    """Features of N images in the order in which they are stored; images that cannot be read are left out.

    Attributes:
        features: (N, C) float32.
        labels: (N,) int64, -1 where there is none.
        names: (N,) text, the source file of each image; its number where the data keep no names.
        bad: images that could not be read.
    """

    features: np.ndarray
    labels: np.ndarray
    names: np.ndarray
    bad: int

    def write(self, path: Path) -> None:
        """Write the file whole or not at all: .npz with features, labels and names, or .npy with the features alone."""
        held = io.BytesIO()
        if path.suffix == ".npy":
            np.save(held, self.features)
        else:
            np.savez(held, features=self.features, labels=self.labels, names=self.names)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, held.getvalue())


def check_out(out: str | Path) -> Path:
    """The file to write.

    Raises:
        UserMistake: its ending is none that can be written.
    """
    path = Path(out)
    if path.suffix not in SUFFIXES:
        raise UserMistake(f"OUT {out}: features are written to {' or '.join(SUFFIXES)}; for example {path.stem}.npz")
    return path


def own_image_size(loaded: LoadedBackbone, wanted: int) -> int:
    """Side of a backbone's images in pixels: `wanted`, or where that is 0 the one of its run, or 224."""
    if wanted or loaded.source.folder is None:
        return wanted or 224
    return int(read_config(loaded.source.folder).get("recipe", {}).get("image_size", 224))


def _names(data: str, pipeline: Pipeline, loader: str) -> list[str]:
    """What each image is called: by the packer's manifest, by its path or cell, by its number where nobody knows."""
    store = getattr(pipeline, "store", None)
    # Parquet files and lists of files: the store alone knows their names.
    if isinstance(store, FileStore | TableStore) and not Path(data).is_dir():
        return [store.name(number) for number in range(pipeline.num_samples)]
    names = None if loader == "synthetic" else source_names(data)
    return names if names is not None else [str(number) for number in range(pipeline.num_samples)]


def embed(
    data: str | Path,
    *,
    checkpoint: str | Path,
    out: str | Path | None = None,
    arch: str = "",
    image_size: int = 0,
    batch_size: int = 256,
    device: str = "auto",
    workers: int = 0,
    loader: str = "auto",
) -> Embedding:
    """The features of every image: the backbone's last feature map, averaged over its positions.

    Args:
        data: a packed file, folder, list of files or shard pattern.
        checkpoint: a run's folder, our backbone file, or torchvision or timm weights.
        out: file to write, .npz or .npy; None writes none.
        arch: architecture; empty finds it out.
        image_size: side of the centre square in pixels; 0 is the run's own, or 224.
        batch_size: images at a time; only memory depends on it.
        device: "auto", "cpu" or "cuda".
        workers: decoding threads; 0 follows from the cores that the process may use.
        loader: where images come from.

    Returns:
        The features with labels and names.

    Raises:
        ValueError: checkpoint or data cannot be used; the message names the remedy.
    """
    # Before the work of hours, not after it.
    path = None if out is None else check_out(out)
    loaded = load(str(checkpoint), arch)
    where = torch.device(device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    refuse_without_code(where)
    encoder = loaded.encoder.to(where).to(memory_format=torch.channels_last)
    settings = PipelineConfig(
        data=str(data),
        views=(center_view(own_image_size(loaded, image_size)),),
        global_batch=batch_size,
        workers=workers,
        device=where,
        order="sequential",
        drop_last=False,
    )
    pipeline = build_pipeline(loader, settings, quiet=True)
    try:
        found = extract_features(encoder, pipeline, where)
    finally:
        pipeline.close()
    every = np.array(_names(str(data), pipeline, loader))
    samples = found.samples.numpy()
    embedding = Embedding(found.features.cpu().numpy(), found.labels.numpy(), every[samples], found.bad)
    if path is not None:
        embedding.write(path)
    return embedding
