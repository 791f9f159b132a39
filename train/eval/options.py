"""Flags of the evaluation protocols as frozen dataclasses, and how arguments become one.

Nothing here imports PyTorch: a command line is checked, and `--help` printed, before the seconds that PyTorch takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from models.options import option

from ..errors import UserMistake
from ..fields import check, flatten, unflatten
from ..flags import OneLineParser, add_leaf, parse_fields
from ..measure import DEFAULT_KS, DEFAULT_TEMPERATURE, MAX_BAD
from .linear_recipes import LINEAR_RECIPES

MaskNorm = Literal["protocol", "batch", "none"]
DetectorName = Literal["faster-rcnn-c4", "mask-rcnn-c4", "faster-rcnn-fpn", "mask-rcnn-fpn", "retinanet"]
ANCHOR_SIZES = (32.0, 64.0, 128.0, 256.0, 512.0)


@dataclass(frozen=True)
class ProtocolConfig:
    """Flags that every protocol has which trains or evaluates a network."""

    checkpoint: str = option("", "a run's folder, our backbone file, or a torchvision or timm checkpoint")
    arch: str = option("", "backbone architecture; empty finds it out from the checkpoint")
    untrained: bool = option(
        False,
        "evaluate a fresh backbone of the checkpoint's architecture instead, as a baseline; its weights follow "
        "from --seed",
    )
    data: str = option("", "training images with their labels")
    val_data: str = option("", "validation images with the same classes")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = option(
        "auto", "of the network; auto: bf16 from Ampere on, fp16 before, fp32 on CPU"
    )
    deterministic: bool = option(False, "deterministic kernels, for byte-identical runs on CUDA; the CPU needs no flag")
    device: Literal["auto", "cpu", "cuda"] = option("auto", "where to compute")
    workers: int = option(0, "decoding threads of this process; 0 follows from the cores it may use", least=0)
    seed: int = option(0, "every random draw follows from it", least=0)
    output: str = option("", "result file; empty is eval-PROTOCOL.json beside the checkpoint")


@dataclass(frozen=True)
class EvalConfig(ProtocolConfig):
    """Flags that every classification protocol has."""

    data: str = option("", "labelled training images: packed file, folder, list or shard pattern")
    loader: Literal["auto", "ffcv", "dali", "webdataset", "folder", "reference", "synthetic"] = option(
        "auto", "where images come from; for synthetic, --data and --val-data are numbers of images"
    )
    image_size: int = option(0, "side of the evaluated square in pixels; 0 is the run's own, or 224", least=0)
    max_bad: float = option(
        MAX_BAD,
        "share of the images that may be unreadable; figures are over the others, and the result counts them",
        least=0,
        most=1,
    )


@dataclass(frozen=True)
class KnnConfig(EvalConfig):
    """Flags of the k-NN protocol."""

    k: tuple[int, ...] = option(DEFAULT_KS, "how many neighbours vote, comma-separated", least=1)
    temperature: float = option(
        DEFAULT_TEMPERATURE, "the weighted vote of a neighbour is exp(cosine / temperature)", above=0
    )
    block: int = option(
        512, "validation images compared with all training images at a time; only memory depends on it", least=1
    )
    real_labels: str = option("", "ImageNet-ReaL label file (real.json), for its top-1")


@dataclass(frozen=True)
class LinearConfig(EvalConfig):
    """Flags of the linear protocol."""

    recipe: str = option("", "one of " + ", ".join(LINEAR_RECIPES) + "; empty: the pre-training method's, else moco-v2")
    lrs: tuple[float, ...] = option(
        (),
        "peak learning rates trained side by side, comma-separated (L2 strengths for logistic); empty: the recipe's",
        above=0,
    )
    epochs: int = option(0, "passes over the training images; 0: the recipe's. Milestones move in proportion", least=0)
    global_batch: int = option(
        0, "images of a step over all ranks; 0: the recipe's, or all where there are fewer", least=0
    )
    weight_decay: float = option(-1.0, "L2 coupled to the gradient; negative: the recipe's")
    head_bn: Literal["recipe", "yes", "no"] = option("recipe", "BatchNorm1d after the linear layer")
    eval_every: int = option(1, "epochs between validations; the last epoch always has one", least=1)
    real_labels: str = option("", "ImageNet-ReaL label file (real.json), for its top-1")
    resume: Literal["auto", "never"] = option(
        "auto", "auto continues a run that was stopped from its last whole epoch, kept beside the result"
    )


@dataclass(frozen=True)
class FewshotConfig(LinearConfig):
    """Flags of the few-shot protocol.

    Source: RegionCL (arXiv 2111.12309), table 3. Differs: its hyper-parameters are in a supplement that is not
    available, so the linear protocol's recipes are used; tune `--lrs` on the baseline.
    """

    fraction: float = option(0.01, "share of each class's training images: 0.01 or 0.1 in the paper")
    list: str = option("", "text file with one training image a line, instead of --fraction")


@dataclass(frozen=True)
class SemiConfig(EvalConfig):
    """Flags of the semi-supervised protocol.

    Source: LEWEL (arXiv 2203.14898) section 4.2 and its code: SGD 0.9, weight decay 1e-4, batch 256, 50 epochs, x0.1
    at 30 and 40. Differs: batch norm spans the global batch by default, so that the number of devices changes nothing.
    """

    fraction: float = option(0.01, "share of each class's training images: 0.01 or 0.1 in the paper")
    list: str = option(
        "", "text file with one training image a line (as SimCLR's 1percent.txt), instead of a drawn one"
    )
    lr_backbone: float = option(0.0, "peak learning rate of the backbone; 0: the recipe's for 1% or 10%", least=0)
    lr_head: float = option(0.0, "peak learning rate of the classifier; 0: the recipe's for 1% or 10%", least=0)
    weight_decay: float = option(1e-4, "L2 coupled to the gradient", least=0)
    epochs: int = option(50, "passes over the labelled images; milestones move in proportion", least=1)
    global_batch: int = option(
        0, "images of a step over all ranks; 0: 256, or fewer where there are fewer images", least=0
    )
    bn: Literal["sync", "plain"] = option("sync", "batch norm over the global batch, or over each rank's part")
    eval_every: int = option(10, "epochs between validations; the last epoch always has one", least=1)
    resume: Literal["auto", "never"] = option(
        "auto", "auto continues a run that was stopped from its last whole epoch, kept beside the result"
    )


@dataclass(frozen=True)
class DetectConfig(ProtocolConfig):
    """Flags of the detection protocol; a value of 0 or an empty one is the published protocol's."""

    data: str = option(
        "",
        "training images: COCO's folder or instances JSON; VOCdevkit, VOC2007 or lists of ImageSets/Main, apart by "
        "commas; Cityscapes' folder",
    )
    val_data: str = option("", "validation images of the same format and classes; the same folder may serve for both")
    detector: DetectorName = option("mask-rcnn-fpn", "what is built on the backbone")
    schedule: Literal["", "1x", "2x", "24k", "12k"] = option(
        "", "published length: 1x is 90k steps of 16 images, 2x twice that; empty: 1x for COCO, else 24k"
    )
    norm: Literal["sync", "plain", "frozen"] = option(
        "sync",
        "batch norm, in the new layers too, over the global batch or each rank's part; or constant in the "
        "backbone and none elsewhere",
    )
    box_head: Literal["2fc", "4conv1fc"] = option("2fc", "box head of the FPN detectors; 4conv1fc is LEWEL's")
    mask_norm: MaskNorm = option(
        "protocol",
        "batch norm in mask-rcnn-fpn's mask head; protocol: with LEWEL's 4conv1fc box head, none with 2fc (RegionCL)",
    )
    steps: int = option(0, "optimizer steps, milestones and warm-up move in proportion; 0: the schedule's", least=0)
    global_batch: int = option(0, "images of a step over all ranks; 0: the schedule's", least=0)
    lr: float = option(0.0, "peak learning rate at this batch; 0: the schedule's, in proportion to the batch", least=0)
    weight_decay: float = option(1e-4, "L2 coupled to the gradient, of all but norm layers", least=0)
    train_sides: tuple[int, ...] = option(
        (),
        "short edges of training images in pixels, one drawn for each image; empty: the data's published ones",
        least=1,
    )
    test_side: int = option(0, "short edge of validation images in pixels; 0: the data's published one", least=0)
    longest_side: int = option(
        0,
        "the most a long edge may have in training, in pixels; 0: the data's published one; RegionCL's C4 detectors "
        "have 1200",
        least=0,
    )
    test_longest_side: int = option(
        0, "the most a long edge may have at test, in pixels; 0: the data's published one", least=0
    )
    anchor_sizes: tuple[float, ...] = option(
        ANCHOR_SIZES, "sides of anchors in pixels, one a level of a pyramid", least=1
    )
    regions: int = option(512, "proposals that an image is trained on (not RetinaNet)", least=1)
    precise_bn_steps: int = option(
        200, "training batches for the batch-norm statistics used at test; 0: running ones", least=0
    )
    checkpoint_every: int = option(1000, "steps between checkpoints; the last step always has one", least=1)
    log_every: int = option(20, "steps between lines and rows of losses", least=1)
    resume: Literal["auto", "never"] = option(
        "auto", "auto continues from the newest good checkpoint beside the result"
    )


@dataclass(frozen=True)
class SegmentConfig(ProtocolConfig):
    """Flags of the segmentation protocol.

    Source: LEWEL (arXiv 2203.14898) and RegionCL (arXiv 2111.12309), both by mmsegmentation: SGD 0.9, learning rate
    0.01 (LEWEL searches it), weight decay 5e-4 on everything, batch 16, polynomial decay.
    """

    data: str = option("", "VOC2012, Cityscapes, or a folder with images and labels (or train/images and train/labels)")
    val_data: str = option("", "the same for validation; may be the same folder where it has both splits")
    model: Literal["fcn", "upernet"] = option("fcn", "dilated FCN (VOC12 of LEWEL) or UPerNet (Cityscapes of RegionCL)")
    schedule: Literal["protocol", "20k", "40k", "80k"] = option(
        "protocol", "optimizer steps; protocol: 20k for fcn, 40k for upernet"
    )
    steps: int = option(0, "optimizer steps, another number than the schedules'; 0: the schedule's", least=0)
    global_batch: int = option(16, "images of a step over all ranks", least=1)
    lr: float = option(0.01, "initial learning rate, falls by (1 - step / steps)^0.9 to 1e-4", above=0)
    weight_decay: float = option(5e-4, "L2 coupled to the gradient, on all parameters", least=0)
    crop: tuple[int, ...] = option((), "height,width of training crops; empty: 512,512 for fcn, 512,1024 for upernet")
    scale: tuple[int, ...] = option(
        (),
        "long,short edge that images are made to fit into; 0,0 keeps their size; empty: 2048,512 for fcn, "
        "2048,1024 for upernet",
    )
    ratio: tuple[float, ...] = option((0.5, 2.0), "limits of the random factor on the scale in training")
    channels: int = option(0, "width of the head, half of it in the auxiliary head; 0: 512", least=0)
    bn: Literal["sync", "plain"] = option("sync", "batch norm over the global batch, or over each rank's part")
    test: Literal["whole", "slide"] = option("whole", "validate images in one pass or by sliding windows")
    window: tuple[int, ...] = option((), "height,width of sliding windows; empty: the crop")
    stride: tuple[int, ...] = option((), "height,width between sliding windows; empty: two thirds of the window")
    classes: int = option(0, "number of classes of plain folders without classes.json; 0: highest label + 1", least=0)
    ignore_index: int = option(-1, "label value that does not count; -1: that of classes.json, else 255", least=-1)
    train_split: str = option("", "list or folder of --data; empty: train, in VOC trainaug where there is such a list")
    val_split: str = option("", "list or folder of --val-data; empty: val")
    eval_every: int = option(0, "steps between validations; 0: only after the last step", least=0)
    checkpoint_every: int = option(2000, "steps between checkpoints; the last step always has one", least=1)
    resume: Literal["auto", "never"] = option(
        "auto", "auto continues from the newest good checkpoint beside the result"
    )
    log_every: int = option(50, "steps between lines of loss and learning rate", least=1)


@dataclass(frozen=True)
class Protocol:
    """What `train/evaluate.py` knows of a protocol before it imports it.

    Attributes:
        module: module of `train.eval` with its `run(config) -> exit code`.
        summary: line in the list of protocols.
        description: first line of its own help.
        default: its flags at their defaults.
    """

    module: str
    summary: str
    description: str
    default: ProtocolConfig


PROTOCOLS: dict[str, Protocol] = {
    "knn": Protocol(
        "knn_protocol",
        "k nearest neighbours on frozen features",
        "k-nearest neighbours on frozen features.",
        KnnConfig(),
    ),
    "linear": Protocol(
        "linear",
        "linear classification on the frozen backbone",
        "Linear classification on the frozen backbone.",
        LinearConfig(),
    ),
    "fewshot": Protocol(
        "fewshot",
        "the same on a small share of the training images",
        "Linear classification on a small share of the training images.",
        FewshotConfig(),
    ),
    "semi": Protocol(
        "semi",
        "the whole network fine-tuned on 1% or 10% of the labels",
        "Fine-tune the whole network on a share of the labels.",
        SemiConfig(),
    ),
    "segment": Protocol(
        "segment",
        "semantic segmentation by a fine-tuned FCN or UPerNet",
        "Fine-tune the backbone inside a dilated FCN or UPerNet for semantic segmentation.",
        SegmentConfig(),
    ),
    "detect": Protocol(
        "detect",
        "Faster and Mask R-CNN and RetinaNet, fine-tuned",
        "Fine-tune a detector on the backbone and measure its AP.",
        DetectConfig(),
    ),
}
"""The protocols by the name that the command takes."""


def parse(name: str, argv: Sequence[str]) -> Any:
    """The configuration of a protocol that a command line asks for, of the class of its default.

    Raises:
        UserMistake: an unknown flag, a value that does not fit, or one of the three paths missing.
    """
    protocol = PROTOCOLS[name]
    parser = OneLineParser(prog=f"train/evaluate.py {name}", description=protocol.description)
    fields = flatten(protocol.default)
    for leaf in fields.values():
        add_leaf(parser, leaf)
    config = unflatten(protocol.default, parse_fields(parser, argv, fields))
    # No default can serve for these three, and argparse's own message for a missing flag names no remedy.
    for name, what in (
        ("checkpoint", "a run's folder or a file"),
        ("data", "labelled images"),
        ("val_data", "labelled validation images"),
    ):
        if not getattr(config, name):
            raise UserMistake(f"--{name.replace('_', '-')} is needed: give {what}")
    check(config)
    return config
