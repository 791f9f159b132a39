"""The analyses of backbones that `tools/analyze.py` draws, each a figure and the numbers in it."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from models.alignment import AlignmentHead
from models.methods.base import Method, StepInputs
from pipeline import augment
from pipeline.interface import Pipeline, PipelineConfig
from pipeline.loaders import build_pipeline
from train.backbone_io import LoadedBackbone, load
from train.build import build_method, feature_grid
from train.cards import refuse_without_code
from train.checkpoint import is_good, read_checkpoint
from train.config import Config
from train.errors import UserMistake
from train.eval import analysis
from train.eval.detection.coco_format import image_folder
from train.eval.linear import fit_logistic
from train.eval.splits import balanced_subset, class_names
from train.inputs import VIEWS, InputBuilder
from train.measure.features import center_view, extract_features, normalise
from train.record.run import CONFIG, read_config, read_run
from train.resolve import resolve
from train.runtime import Runtime

PROBE_L2 = 1e-3

_LEGEND_CLASSES = 10
"""As many as the colour map has colours."""


def _device() -> torch.device:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    refuse_without_code(device)
    return device


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError:
        raise UserMistake("pictures need matplotlib; run: bash tools/setup.sh --retry") from None
    # Pictures are only written, and a window system may be missing.
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


# ---------------------------------------------------------------------------------------------------------------------
# Images and features


def _pipeline(arguments: argparse.Namespace, data: str, population: np.ndarray | None = None) -> Pipeline:
    views = (center_view(arguments.image_size),)
    settings = PipelineConfig(
        data, views, 128, order="sequential", drop_last=False, population=population, device=_device()
    )
    return build_pipeline(arguments.loader, settings, quiet=True)


def _pixels(arguments: argparse.Namespace, data: str, index: np.ndarray) -> Tensor:
    """uint8 (n, 3, S, S) centre views of the samples `index`, in their order, on the CPU."""
    # A pipeline wants its population sorted; the result is put back into the caller's order below.
    order = np.argsort(index, kind="stable")
    pipeline = _pipeline(arguments, data, index[order])
    try:
        found = torch.cat([batch.views["center"].cpu() for batch in pipeline])
    finally:
        pipeline.close()
    return found[torch.from_numpy(np.argsort(order, kind="stable"))]


def _features(arguments: argparse.Namespace, encoder: nn.Module, data: str, population: np.ndarray) -> Tensor:
    pipeline = _pipeline(arguments, data, population)
    try:
        return extract_features(encoder, pipeline, _device()).features.cpu()
    finally:
        pipeline.close()


def _labels(arguments: argparse.Namespace, data: str) -> np.ndarray:
    return _labels_and_classes(arguments, data)[0]


def _labels_and_classes(arguments: argparse.Namespace, data: str) -> tuple[np.ndarray, tuple[str, ...]]:
    """(N,) int64 labels of the images, -1 where there is none, and class names by label where there are names."""
    pipeline = _pipeline(arguments, data)
    pipeline.close()
    return pipeline.labels, pipeline.classes


def _spread(total: int, wanted: int) -> np.ndarray:
    """About `wanted` indices spread evenly over range(total), none twice."""
    return np.unique(np.linspace(0, total - 1, min(wanted, total)).astype(np.int64))


def _backbones(arguments: argparse.Namespace) -> list[LoadedBackbone]:
    loaded = [load(path, arguments.arch) for path in arguments.checkpoint]
    for each in loaded:
        each.encoder.to(_device())
    return loaded


def _show(axis: Any, image: Tensor, title: str = "") -> None:
    axis.imshow(image.permute(1, 2, 0).numpy())
    axis.set_axis_off()
    axis.set_title(title, fontsize=7)


def _grid(rows: int, columns: int) -> tuple[Any, np.ndarray]:
    plt = _pyplot()
    return plt.subplots(rows, columns, figsize=(1.5 * columns, 1.6 * rows), squeeze=False, layout="constrained")


def _names(paths: Sequence[str]) -> list[str]:
    """Names of the backbones in pictures: their folder or file names, with the parent folder where two are equal."""
    short = [Path(path).resolve().name for path in paths]
    return short if len(set(short)) == len(short) else ["/".join(Path(path).resolve().parts[-2:]) for path in paths]


def _class(label: int, names: Sequence[str] | None) -> str:
    if label < 0:
        return ""
    return names[label] if names is not None and label < len(names) else f"class {label}"


# ---------------------------------------------------------------------------------------------------------------------
# Analyses: each draws a figure and returns the figures that go beside it


def gradcam(arguments: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """Grad-CAM of the right class's score under a linear probe, one column a backbone, one scale for all."""
    labels = _labels(arguments, arguments.data)
    if (labels < 0).any():
        raise UserMistake(f"--data {arguments.data}: the probe needs a label for every image; give class folders")
    chosen = _spread(len(labels), arguments.images)
    # The same share of each class, so that a rare class has a score as well.
    fraction = min(1.0, arguments.probe_images / len(labels))
    subset = balanced_subset(labels, fraction, arguments.seed)
    pixels = _pixels(arguments, arguments.data, chosen)
    classes, targets = int(labels.max()) + 1, torch.from_numpy(labels[subset])
    maps = []
    for each in _backbones(arguments):
        features = _features(arguments, each.encoder, arguments.data, subset)
        # One scale for all features, as in the linear protocol: the penalty would otherwise depend on units.
        mean, std = features.mean(dim=0), features.std(dim=0).clamp_min(1e-6)
        weight, bias = (
            part.float().to(_device()) for part in fit_logistic((features - mean) / std, targets, classes, PROBE_L2)
        )
        mean, std = mean.to(_device()), std.to(_device())

        # The values are bound as defaults, because the loop rebinds the names before the function's last call.
        def logits_of(
            pooled: Tensor, weight: Tensor = weight, bias: Tensor = bias, mean: Tensor = mean, std: Tensor = std
        ) -> Tensor:
            return ((pooled - mean) / std) @ weight.T + bias

        images = normalise(pixels.to(_device()))
        maps.append(analysis.grad_cam(each.encoder, logits_of, images, torch.from_numpy(labels[chosen]).to(_device())))
    # One scale over all backbones: a scale for each would make a weak response look as strong as a clear one.
    scaled = analysis.common_scale([each.cpu() for each in maps])
    names, classes_named = _names(arguments.checkpoint), class_names(arguments.data)
    figure, axes = _grid(len(chosen), 1 + len(maps))
    for row, image in enumerate(pixels):
        _show(axes[row][0], image, _class(int(labels[chosen[row]]), classes_named))
        for column, heats in enumerate(scaled):
            _show(axes[row][column + 1], image, names[column] if row == 0 else "")
            heat = analysis.upsample(heats[row : row + 1], arguments.image_size)[0].numpy()
            axes[row][column + 1].imshow(heat, cmap="jet", alpha=0.5, vmin=0, vmax=1)
    return figure, {"mean_activation": {p: float(s.mean()) for p, s in zip(arguments.checkpoint, scaled, strict=True)}}


def neighbours(arguments: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """Some images and the nearest others, a block of rows for each backbone."""
    labels = _labels(arguments, arguments.data)
    everything = np.arange(len(labels))
    queries = _spread(len(labels), arguments.images)
    shown = min(arguments.neighbours, len(labels) - 1)
    if shown < 1:
        raise UserMistake(f"--data {arguments.data}: one image has no neighbours; give more")
    backbones = _backbones(arguments)
    figure, axes = _grid(len(queries) * len(backbones), shown + 1)
    shares: dict[str, float | None] = {}
    names, classes_named = _names(arguments.checkpoint), class_names(arguments.data)
    for block, each in enumerate(backbones):
        features = _features(arguments, each.encoder, arguments.data, everything)
        # One more than is shown, because an image's nearest neighbour is itself.
        index, cosine = analysis.nearest(features, features[queries], shown + 1)
        agree = []
        for row, query in enumerate(queries):
            others = [(int(i), float(c)) for i, c in zip(index[row], cosine[row], strict=True) if int(i) != query][
                :shown
            ]
            strip = axes[block * len(queries) + row]
            pictures = _pixels(arguments, arguments.data, np.array([query, *(i for i, _ in others)]))
            _show(strip[0], pictures[0], f"{names[block]} {_class(int(labels[query]), classes_named)}")
            for column, (i, c) in enumerate(others):
                _show(strip[column + 1], pictures[column + 1], f"{c:.2f} {_class(int(labels[i]), classes_named)}")
                agree.append(labels[i] == labels[query])
        # Without labels there is nothing to agree on.
        shares[arguments.checkpoint[block]] = float(np.mean(agree)) if (labels >= 0).all() else None
    return figure, {"neighbours_of_the_same_class": shares}


def embedding(arguments: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """Features in the plane, coloured by class, one panel a backbone."""
    labels, classes = _labels_and_classes(arguments, arguments.data)
    # Two axes need three points.
    chosen = _spread(len(labels), max(arguments.images, 3))
    figure, axes = _grid(1, len(arguments.checkpoint))
    figure.set_size_inches(5 * len(arguments.checkpoint), 5)
    for axis, name, each in zip(axes[0], _names(arguments.checkpoint), _backbones(arguments), strict=True):
        features = _features(arguments, each.encoder, arguments.data, chosen)
        points = _tsne(features, arguments.seed) if arguments.tsne else analysis.principal_plane(features).numpy()
        dots = axis.scatter(points[:, 0], points[:, 1], c=labels[chosen], cmap="tab10", s=6)
        _name_colours(axis, dots, labels[chosen], classes)
        axis.set_title(f"{name}: {'t-SNE' if arguments.tsne else 'principal axes'}", fontsize=8)
        axis.set_xticks([])
        axis.set_yticks([])
    return figure, {"images": len(chosen)}


def _name_colours(axis: Any, dots: Any, labels: np.ndarray, classes: Sequence[str]) -> None:
    """A legend of the classes, where there are few enough that each has a colour of its own."""
    present = np.unique(labels).tolist()
    if not 1 < len(present) <= _LEGEND_CLASSES or present[0] < 0:
        return
    named = [classes[label] if label < len(classes) else f"class {label}" for label in present]
    handles = [axis.plot([], [], "o", color=dots.cmap(dots.norm(label)), markersize=4)[0] for label in present]
    axis.legend(handles, [name[:24] for name in named], fontsize=6, loc="best")


def _tsne(features: Tensor, seed: int) -> np.ndarray:
    try:
        from sklearn.manifold import TSNE
    except ImportError:
        raise UserMistake("--tsne needs scikit-learn; run: bash tools/setup.sh --retry") from None
    rows = torch.nn.functional.normalize(features).numpy()
    # scikit-learn refuses a perplexity that is not below the number of points.
    points: np.ndarray = TSNE(perplexity=min(30, len(rows) / 4), init="pca", random_state=seed).fit_transform(rows)
    return points


# --- Analyses of a method, which need a run's checkpoint -------------------------------------------------------------


def _run_config(folder: str) -> Config:
    if not (Path(folder) / CONFIG).is_file():
        raise UserMistake(f"{folder} is not a run's folder; this analysis needs the method, not only its backbone")
    config = resolve(["--config", str(Path(folder) / CONFIG)])
    # A handful of images must do: they share one set of batch-norm statistics.
    recipe = dataclasses.replace(config.recipe, bn=dataclasses.replace(config.recipe.bn, group_size=0))
    # The checkpoint fills the method, so the file of --init need not exist any more.
    return dataclasses.replace(config, recipe=recipe, run=dataclasses.replace(config.run, init="", micro_batch=0))


def _checkpoints(folder: str) -> list[Path]:
    found = sorted(path for path in (Path(folder) / "checkpoints").glob("step_*") if is_good(path))
    if not found:
        raise UserMistake(f"{folder} has no whole checkpoint; train until the first one is written")
    return found


def _method(config: Config, checkpoint: Path) -> tuple[Method, Runtime]:
    # fp32, so that gradients of different runs compare whatever each was trained in.
    runtime = Runtime(0, 1, _device(), torch.float32, False)
    method = build_method(config, runtime)
    method.load_state_dict(read_checkpoint(checkpoint).model, strict=True)
    return method, runtime


def _boxed_images(arguments: argparse.Namespace) -> tuple[list[Path], list[list[tuple[float, float, float, float]]]]:
    """Images of a COCO file that have objects, and the boxes of these in shares of width and height; no crowds."""
    try:
        document = json.loads(Path(arguments.annotations).read_text())
        images = {image["id"]: image for image in document["images"]}
        boxes: dict[int, list[tuple[float, float, float, float]]] = {}
        for item in document["annotations"]:
            # A crowd's box covers many objects and what is between them.
            if not item.get("iscrowd"):
                width, height = images[item["image_id"]]["width"], images[item["image_id"]]["height"]
                x, y, w, h = item["bbox"]
                boxes.setdefault(item["image_id"], []).append(
                    (x / width, y / height, (x + w) / width, (y + h) / height)
                )
    except (OSError, ValueError, KeyError) as reason:
        raise UserMistake(f"--annotations {arguments.annotations}: {reason}; give a COCO instances file") from None
    chosen = sorted(boxes)[: arguments.images]
    names = [images[i]["file_name"] for i in chosen]
    folder = Path(arguments.data)
    if names and folder.is_dir() and not (folder / names[0]).exists():
        # The folder above the images, as `detect` takes it.
        folder = image_folder(Path(arguments.annotations), names[0])
    return [folder / name for name in names], [boxes[i] for i in chosen]


def _whole_views(files: Sequence[Path], size: int, seed: int) -> list[Tensor]:
    """Two uint8 views (n, 3, S, S) of whole images squeezed to the square: no crop and no flip, so that boxes hold."""
    try:
        pictures = [Image.open(file).convert("RGB").resize((size, size), Image.Resampling.BILINEAR) for file in files]
    except OSError as reason:
        raise UserMistake(f"--data: {reason}; give the folder that the annotations belong to") from None
    pixels = torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])).permute(0, 3, 1, 2).contiguous()
    # A flip would move objects out of their boxes.
    profile = dataclasses.replace(augment.get_profile("mocov2"), flip_probability=0.0)
    index = np.arange(len(files))
    return [augment.augment_view(pixels, profile, seed, 0, index, view) for view in (0, 1)]


def boxes(arguments: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """Mean gradient magnitude inside object boxes at every checkpoint, the same views for all runs, and their k-NN."""
    if not arguments.annotations:
        raise UserMistake("--annotations is needed: a COCO instances file whose images are in --data")
    files, members = _boxed_images(arguments)
    # Read before any drawing: the number of panels depends on whether a run has such figures.
    knn = [_knn_curve(folder) for folder in arguments.checkpoint]
    figure, axes = _grid(1, 2 if any(steps for steps, _ in knn) else 1)
    figure.set_size_inches(6 * axes.shape[1], 4)
    curves: dict[str, list[dict[str, float]]] = {}
    for name, folder, (knn_steps, top1) in zip(_names(arguments.checkpoint), arguments.checkpoint, knn, strict=True):
        curves[folder] = rows = _box_gradients(arguments, folder, files, members)
        axes[0][0].plot([row["step"] for row in rows], [row["inside"] for row in rows], marker="o", label=name)
        if axes.shape[1] > 1:
            axes[0][1].plot(knn_steps, top1, marker="o", label=name)
    for axis, label in zip(axes[0], ("mean |d loss / d pixel| inside boxes", "k-NN top-1, percent"), strict=False):
        axis.set_xlabel("optimizer step")
        axis.set_ylabel(label)
        axis.legend()
    return figure, {"images": len(files), "curves": curves}


def _knn_curve(folder: str) -> tuple[list[int], list[float]]:
    """Steps and percents of a run's online k-NN; empty where it had no validation images."""
    steps, shares = read_run(Path(folder), partial=True).values("knn", "top1")
    return [int(step) for step in steps], [100 * share for share in shares]


def _box_gradients(
    arguments: argparse.Namespace,
    folder: str,
    files: Sequence[Path],
    members: list[list[tuple[float, float, float, float]]],
) -> list[dict[str, float]]:
    """One row for each checkpoint of a run: step, mean magnitude inside and outside the boxes."""
    config = _run_config(folder)
    size = config.recipe.image_size
    # Made once, so that every checkpoint sees the same views.
    views = [view.to(_device()) for view in _whole_views(files, size, arguments.seed)]
    mask = analysis.box_mask(members, size)
    rows = []
    for path in _checkpoints(folder):
        # A fresh method for each checkpoint: in training mode the forward pass moves its running statistics.
        method, runtime = _method(config, path)
        gradient = analysis.input_gradient(method.train(), views[0], _inputs_of(config, method, runtime, views[1]))
        try:
            inside, outside = analysis.inside_outside(gradient.cpu(), mask)
        except ValueError as reason:
            raise UserMistake(f"--annotations {arguments.annotations}: {reason}") from None
        rows.append({"step": int(path.name.removeprefix("step_")), "inside": inside, "outside": outside})
    return rows


def _inputs_of(config: Config, method: Method, runtime: Runtime, view2: Tensor) -> Callable[[Tensor], StepInputs]:
    builder = InputBuilder(config, method, runtime, feature_grid(method, config.recipe.image_size))
    # Both views show the whole image.
    whole = np.full((len(view2), 6), config.recipe.image_size, dtype=np.float32)
    whole[:, :2] = 0
    boxes = {name: whole for name in VIEWS} if method.reads_crop_boxes else {}
    return lambda view1: builder.step_inputs({"view1": view1, "view2": view2}, 0, 0, 1, crop_boxes=boxes)


def align(arguments: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """Some images and some of their alignment maps, spread over the groups, each on its own scale; a block a run."""
    methods = [_aligned_method(folder) for folder in arguments.checkpoint]
    total = len(_labels(arguments, arguments.data))
    pixels = _pixels(arguments, arguments.data, _spread(total, arguments.images))
    maps = [_maps_of(*parts, pixels) for parts in methods]
    columns = [_spread(each.shape[1], arguments.maps) for each in maps]
    figure, axes = _grid(len(pixels) * len(maps), 1 + max(map(len, columns)))
    # Runs may have different numbers of maps, which leaves some panels empty.
    for axis in axes.flat:
        axis.set_axis_off()
    ratios = {}
    for block, (name, folder) in enumerate(zip(_names(arguments.checkpoint), arguments.checkpoint, strict=True)):
        for row, image in enumerate(pixels):
            strip = axes[block * len(pixels) + row]
            _show(strip[0], image, name if row == 0 else "")
            for axis, number in zip(strip[1:], columns[block], strict=False):
                _show(axis, image, f"map {number}" if row == 0 else "")
                heat = analysis.upsample(maps[block][row, number][None], arguments.image_size)[0].numpy()
                axis.imshow(heat, cmap="jet", alpha=0.5)
        ratios[folder] = float((maps[block].amax(dim=(2, 3)) / maps[block].amin(dim=(2, 3))).mean())
    return figure, {"maps": int(maps[0].shape[1]), "mean_ratio_of_largest_to_smallest": ratios}


def _aligned_method(folder: str) -> tuple[nn.Module, AlignmentHead]:
    """Encoder and alignment head of a run's newest checkpoint."""
    config = _run_config(folder)
    method, _ = _method(config, _checkpoints(folder)[-1])
    head = next((module for module in method.children() if isinstance(module, AlignmentHead)), None)
    if head is None:
        raise UserMistake(
            f"{folder} was trained with {config.run.method}, which has no alignment maps; give a LEWEL run"
        )
    return method.encoder, head


def _maps_of(encoder: nn.Module, head: AlignmentHead, pixels: Tensor) -> Tensor:
    """Alignment maps (B, d, H, W) of uint8 images (B, 3, S, S), on the CPU."""
    return analysis.lewel_maps(encoder, head, normalise(pixels.to(_device()))).cpu()


@dataclass(frozen=True)
class Analysis:
    """One analysis: who draws it, its title in a report, and how to read it."""

    draw: Callable[[argparse.Namespace], tuple[Any, dict[str, Any]]]
    title: str
    note: str


ANALYSES: dict[str, Analysis] = {
    "gradcam": Analysis(
        gradcam,
        "Grad-CAM",
        "Where the right class's score under a linear probe comes from; all maps on one scale, red is the largest.",
    ),
    "boxes": Analysis(
        boxes,
        "Gradient inside object boxes",
        "Mean magnitude of the pre-training loss's gradient by the pixels inside object boxes, at each checkpoint.",
    ),
    "align": Analysis(
        align, "Alignment maps", "Where LEWEL's maps look, some of them for some images; each map on its own scale."
    ),
    "neighbours": Analysis(
        neighbours, "Nearest neighbours", "Each row: an image, then those with the largest cosine of features."
    ),
    "embedding": Analysis(
        embedding, "Features in the plane", "One dot an image, coloured by class where there are labels."
    ),
}


def write(arguments: argparse.Namespace) -> None:
    """Draw the analysis that was asked for; write the picture and a JSON of its figures beside it.

    Args:
        arguments: those of `tools/analyze.py`, `out` with a suffix of ".png".

    Raises:
        UserMistake: runs, data or the place of the picture cannot be used.
    """
    # A backbone is looked at in the size it was trained at.
    arguments.image_size = arguments.image_size or _own_image_size(arguments.checkpoint[0])
    figure, figures = ANALYSES[arguments.analysis].draw(arguments)
    _write(Path(arguments.out), figure, arguments, figures)


def _own_image_size(checkpoint: str) -> int:
    """The image size that a run was trained at; 224 for a file."""
    return int(read_config(Path(checkpoint)).get("recipe", {}).get("image_size", 224))


def _write(out: Path, figure: Any, arguments: argparse.Namespace, figures: dict[str, Any]) -> None:
    kind = ANALYSES[arguments.analysis]
    about = {
        "analysis": arguments.analysis,
        "title": kind.title,
        "note": kind.note,
        "checkpoints": arguments.checkpoint,
        "data": arguments.data,
        **figures,
    }
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out, dpi=130)
        out.with_suffix(".json").write_text(json.dumps(about, indent=1) + "\n")
    except OSError as reason:
        raise UserMistake(f"--out {out}: {reason.strerror or reason}; choose a place that can be written") from None
    finally:
        # matplotlib keeps every figure until it is closed.
        _pyplot().close(figure)
