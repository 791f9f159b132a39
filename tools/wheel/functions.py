"""The commands as functions: the same code, with the flags as keyword arguments and errors as `ValueError`."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from train.callbacks import Callback as Callback
from train.errors import EXIT_REQUEUE, Stopped
from train.keywords import arguments_of
from train.measure.embedding import Embedding, check_out, own_image_size
from train.measure.embedding import embed as measure
from train.record.run import Run, read_run
from train.stop import handlers_kept


def train(
    *,
    data: str | Path,
    out: str | Path,
    method: str,
    arch: str | None = None,
    callbacks: Sequence[Callback] = (),
    **options: Any,
) -> Run:
    """Pre-train a backbone without labels; a run in `out` that was stopped goes on.

    Args:
        data: a packed file, folder, list of files or shard pattern.
        out: folder of the run: `backbone.safetensors`, `metrics.jsonl`, `report.html`, `checkpoints/`.
        method: name of the method, a key of `regatta.methods`.
        arch: backbone; None takes the recipe's.
        callbacks: told what happens in the run, derived from `regatta.Callback`.
        options: every other flag of `regatta train`, with underscores; nested ones as a dict, `optim={"lr": 0.1}`.

    Returns:
        The run: configuration, rows and results.

    Raises:
        ValueError: an option, path or data set that cannot be used; the message names the remedy.
        Stopped: a signal or an interrupt ended the run after saving; the same call goes on.
    """
    from train.main import run

    more = options if arch is None else {"arch": arch, **options}
    with handlers_kept():
        code = run(arguments_of({"method": method, "data": data, "run_dir": out, **more}), callbacks)
    if code == EXIT_REQUEUE:
        raise Stopped(f"stopped and saved in {out}; the same call goes on from here")
    if code:
        raise RuntimeError(f"the processes of the run ended with code {code}; what they said stands above")
    return read_run(Path(out))


def embed(
    data: str | Path,
    *,
    checkpoint: str | Path | None = None,
    out: str | Path | None = None,
    method: str = "regioncl-m",
    **options: Any,
) -> Embedding:
    """The features of every image, from a backbone that is there or from one that is first pre-trained on these images.

    Args:
        data: a packed file, folder, list of files or shard pattern.
        checkpoint: a run's folder, our backbone file, or torchvision or timm weights. None pre-trains with `method` and
            the defaults that follow from the number of images, in the folder OUT.run, where a stopped call goes on.
        out: file to write, .npz or .npy; None writes none and keeps no run.
        method: name of the method, where there is no `checkpoint`.
        options: every other keyword of `train.measure.embedding.embed`: `arch`, `image_size`, `batch_size`, `device`,
            `workers`, `loader`. The last three, and `arch`, hold for the pre-training too.

    Returns:
        The features with labels and names.

    Raises:
        ValueError: checkpoint or data cannot be used; the message names the remedy.
    """
    # Before the work of hours, not after it.
    path = None if out is None else check_out(out)
    if checkpoint is not None:
        return measure(data, checkpoint=checkpoint, out=path, **options)
    shared = {name: options[name] for name in ("arch", "device", "workers", "loader") if options.get(name)}
    with contextlib.ExitStack() as kept:
        if path is None:
            run = Path(kept.enter_context(tempfile.TemporaryDirectory(prefix="regatta-embed-")), "run")
        else:
            run = path.with_suffix(".run")
        train(data=data, out=run, method=method, **shared)
        return measure(data, checkpoint=run, out=path, **options)


def evaluate(
    protocol: str, *, checkpoint: str | Path, data: str | Path, val_data: str | Path, **options: Any
) -> dict[str, Any]:
    """Evaluate a backbone.

    Args:
        protocol: "knn", "linear", "fewshot", "semi", "detect" or "segment".
        checkpoint: a run's folder, our backbone file, or torchvision or timm weights.
        data: training images with their labels.
        val_data: validation images with the same classes.
        options: every other flag of `regatta evaluate PROTOCOL`; `output` is the result file, without which nothing
            stays on disk and a stopped evaluation starts over.

    Returns:
        The result file's content: the figures, and the settings they belong to.

    Raises:
        ValueError: an option, path or data set that cannot be used; the message names the remedy.
    """
    from train.evaluate import run

    asked = {"checkpoint": checkpoint, "data": data, "val_data": val_data, **options}
    with tempfile.TemporaryDirectory(prefix="regatta-eval-") as folder, handlers_kept():
        asked.setdefault("output", Path(folder, "result.json"))
        run([protocol, *arguments_of(asked)])
        result: dict[str, Any] = json.loads(Path(asked["output"]).read_text())
    return result


def export(
    source: str | Path, out: str | Path, *, format: str, arch: str = "", image_size: int = 0, overwrite: bool = False
) -> Path:
    """Take a backbone to another library.

    Args:
        source: a run's folder, our backbone file, or torchvision or timm weights.
        out: file to write; a folder for "hf".
        format: "torchvision", "timm", "detectron2", "hf" or "onnx".
        arch: architecture; empty finds it out.
        image_size: for onnx and Swin; 0 is the run's own, or 224.
        overwrite: replace what is there.

    Returns:
        The model card that was written beside the export.

    Raises:
        ValueError: source or place cannot be used; the message names the remedy.
    """
    from tools.support.exports import TARGETS
    from tools.support.exports import export as write
    from train.backbone_io import load
    from train.errors import UserMistake

    if format not in TARGETS:
        raise UserMistake(f"format {format}: choose from {', '.join(TARGETS)}")
    loaded = load(str(source), arch)
    return write(loaded, Path(out), format, own_image_size(loaded, image_size), overwrite)
