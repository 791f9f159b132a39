"""The tables and figures of the three papers, each as rows of backbones and what is measured on them.

Figures that were published come from `train/record/published.csv`; a table only says which of those rows are its own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from train.record.published import PUBLISHED, Published


@dataclass(frozen=True)
class Backbone:
    """What is pre-trained for a row.

    Attributes:
        method: name in `METHODS`, or "supervised" for a classifier's weights that the user gives.
        arch: backbone.
        epochs: length of pre-training.
        data: "ImageNet-1K" or "ImageNet-100".
        settings: name -> value of the settings that make this row, as in `published.csv`.
    """

    method: str
    arch: str
    epochs: int
    data: str
    settings: tuple[tuple[str, tuple[str, ...]], ...] = ()


@dataclass(frozen=True)
class Cell:
    """One measurement of a row.

    Attributes:
        protocol: protocol of `train/evaluate.py`, or "analyze" for a picture of `tools/analyze.py`.
        task: its variant, as in `published.csv`; the analysis for "analyze".
        figures: name -> percent that the paper reports; empty where it only draws a curve.
    """

    protocol: str
    task: str
    figures: Mapping[str, float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The stem of its result file."""
        return "-".join(filter(None, [self.protocol, re.sub(r"[^a-z0-9]+", "-", self.task.lower()).strip("-")]))


@dataclass(frozen=True)
class Row:
    """A backbone and what the table measures on it; several may belong to one line of the printed table."""

    backbone: Backbone
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Pick:
    """Which published figures a table has: those that fit every member that is not empty.

    Attributes:
        protocol: protocol of `train/evaluate.py`.
        backbones: (method, epochs) pairs.
        archs: backbones.
        tasks: regular expression that the task contains.
        source: regular expression that the source contains.
    """

    protocol: str
    backbones: tuple[tuple[str, int], ...] = ()
    archs: tuple[str, ...] = ()
    tasks: str = ""
    source: str = ""

    def takes(self, row: Published) -> bool:
        """Whether a published figure is one of these."""
        return (
            row.protocol == self.protocol
            and (not self.backbones or (row.method, row.epochs) in self.backbones)
            and (not self.archs or row.arch in self.archs)
            and re.search(self.tasks, row.task) is not None
            and re.search(self.source, row.source) is not None
        )


@dataclass(frozen=True)
class Table:
    """A table or figure of a paper.

    Attributes:
        title: what it shows.
        picks: its published figures.
        extra: rows that the paper has without a figure that can be read, or only as a curve.
        recipes: method -> recipe that this table's baseline was trained with, where that is not the method's own.
        flags: method -> flags that this table's runs of the method have beside its recipe.
        note: what a reader must know to compare.
        costs: whether the paper has columns of parameters and operations.
    """

    title: str
    picks: tuple[Pick, ...] = ()
    extra: tuple[Row, ...] = ()
    recipes: Mapping[str, str] = field(default_factory=dict)
    flags: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    note: str = ""
    costs: bool = False

    def rows(self) -> list[Row]:
        """The published figures in the order of `published.csv`, then the rows without figures."""
        published = [
            Row(
                Backbone(row.method, row.arch, row.epochs, row.data, tuple(row.flags.items())),
                (Cell(row.protocol, row.task, row.figures),),
            )
            for pick in self.picks
            for row in filter(pick.takes, PUBLISHED)
        ]
        return [*published, *self.extra]


def _ablations(method: str, epochs: int, name: str, values: Sequence[str], cells: Sequence[Cell]) -> tuple[Row, ...]:
    """A row on ImageNet-100 for each value of one setting."""
    return tuple(
        Row(Backbone(method, "resnet50", epochs, "ImageNet-100", ((name, (value,)),)), tuple(cells)) for value in values
    )


def _row(method: str, epochs: int, data: str, settings: Mapping[str, str], cells: Sequence[Cell]) -> Row:
    fixed = tuple((name, (value,)) for name, value in settings.items())
    return Row(Backbone(method, "resnet50", epochs, data, fixed), tuple(cells))


_REGIONCL_METHODS = (
    ("supervised", 0),
    ("moco-v2", 200),
    ("regioncl-m", 200),
    ("densecl", 200),
    ("regioncl-d", 200),
    ("simsiam", 100),
    ("regioncl-s", 100),
)
_REGIONCL = "RegionCL paper|RegionCL's paper"
_SAME_SETTING = ("--global-batch", "1024", "--optim.lr", "0.0375", "--bn.group-size", "128")
"""RegionCL-M's own batch, rate and BN groups for its baseline in Tables 9 and 10."""
_LEWEL_CELLS = (Cell("linear", ""), Cell("segment", "VOC12 FCN"))
_COUPLED = {"global_loss": "true", "aligned_loss": "true", "coupled": "true"}
_CARE_BYOL = {"byol": "byol-paper"}
"""CARE cites and repeats BYOL with BYOL's own settings, LEWEL with those of its code base (EMAN)."""
_REPEATED = (("simclr", 200), ("swav", 200))
"""Baselines of LEWEL's Tables 3 and 4 that come, as its BYOL and SimSiam there, from the SimSiam paper's Table 5."""
_SEARCHED = (
    "The fine-tuning rate was searched for each model: --sweep-lrs. SimCLR and SwAV are the SimSiam paper's "
    "repetitions, with projectors of three layers."
)
_KEEP_ALL = ("--keep-checkpoints", "0")

TABLES: dict[str, Table] = {
    "regioncl-table1": Table(
        "Linear classification on ImageNet, with ReaL labels",
        (Pick("linear", _REGIONCL_METHODS, source=f"({_REGIONCL})$"),),
        note="ReaL needs --real-labels real.json; rows of methods that are not implemented are left out.",
    ),
    "regioncl-table2": Table(
        "Linear classification after longer pre-training",
        (
            Pick("linear", (("moco-v2", 800),)),
            Pick("linear", (("regioncl-m", 800), ("moco-v3", 1000), ("regioncl-m3", 1000)), archs=("resnet50",)),
        ),
        recipes={"moco-v3": "moco-v3-1000ep"},
    ),
    "regioncl-table3": Table(
        "Linear classification on 1% and 10% of the labels", (Pick("fewshot", source="RegionCL paper, table 3"),)
    ),
    "regioncl-table4": Table(
        "Mask R-CNN on COCO, 1x schedule",
        (Pick("detect", _REGIONCL_METHODS, tasks="Mask R-CNN (C4|FPN) 1x", source=_REGIONCL),),
    ),
    "regioncl-table5": Table(
        "Mask R-CNN on COCO, 2x schedule",
        (Pick("detect", _REGIONCL_METHODS, tasks="Mask R-CNN (C4|FPN) 2x", source=_REGIONCL),),
    ),
    "regioncl-table6": Table(
        "RetinaNet on COCO", (Pick("detect", _REGIONCL_METHODS, tasks="RetinaNet", source=_REGIONCL),)
    ),
    "regioncl-table7": Table(
        "Cityscapes: instances and UPerNet",
        (
            Pick("detect", _REGIONCL_METHODS, tasks="Cityscapes", source=_REGIONCL),
            Pick("segment", _REGIONCL_METHODS, tasks="Cityscapes", source=_REGIONCL),
        ),
        note="The instance column printed as AP75 has the scale of AP50.",
    ),
    "regioncl-table8": Table(
        "Swin-T: MoBY and RegionCL", (Pick("linear", archs=("swin-t",)),), recipes={"moby": "moby"}
    ),
    "regioncl-table9": Table(
        "Bounds of the region's sides",
        tuple(Pick(protocol, source="RegionCL paper, tables? 9") for protocol in ("knn", "detect")),
        flags={"moco-v2": _SAME_SETTING},
        note="Neither the vote of k-NN nor the detector of the 12k steps is stated; weighted votes and FPN here.",
    ),
    "regioncl-table10": Table(
        "Paste views, canvas views and negatives of the same image",
        tuple(Pick(protocol, source="RegionCL paper, table 10|tables 9 and 10") for protocol in ("knn", "detect"))
        + tuple(
            Pick(protocol, (("moco-v2", 100),), source="RegionCL paper, table 9") for protocol in ("knn", "detect")
        ),
        flags={"moco-v2": _SAME_SETTING},
    ),
    "regioncl-figure1": Table(
        "Accuracy of a linear classifier against AP of Mask R-CNN on COCO (FPN, 1x)",
        (
            Pick("linear", _REGIONCL_METHODS, source=f"({_REGIONCL})$"),
            Pick("detect", _REGIONCL_METHODS[1:], tasks="Mask R-CNN FPN 1x", source=_REGIONCL),
        ),
        note="--plot FILE.svg draws it, published points hollow and own points filled.",
    ),
    "regioncl-figure4": Table(
        "Gradients inside object boxes and k-NN over pre-training",
        extra=tuple(
            _row(method, 200, "ImageNet-1K", {}, [Cell("analyze", "boxes")]) for method in ("moco-v2", "regioncl-m")
        ),
        flags={"moco-v2": (*_SAME_SETTING, *_KEEP_ALL), "regioncl-m": _KEEP_ALL},
        note="Needs --boxes: COCO-format boxes of training images by any detector.",
    ),
    "care-table1a": Table(
        "Linear classification with ResNet-50",
        (
            Pick("linear", source="CARE paper, table 1a"),
            Pick("linear", (("simsiam", 100), ("simsiam", 200), ("simsiam", 400)), source="SimSiam"),
            Pick("linear", (("byol", 100), ("byol", 200), ("byol", 400)), source="SimSiam paper"),
            Pick("linear", tuple((m, e) for m in ("simclr", "swav") for e in (100, 200, 400)), source="SimSiam paper"),
            Pick("linear", (("care", 100), ("care", 200), ("care", 400)), ("resnet50",), source="CARE repository"),
        ),
        recipes=_CARE_BYOL,
        note="SimCLR and SwAV are the SimSiam paper's repetitions, with projectors of three layers.",
    ),
    "care-table1b": Table(
        "Linear classification with larger backbones",
        (
            Pick("linear", source="CARE paper, table 1b"),
            Pick("linear", (("care", 100), ("care", 200)), ("resnet50-2x", "resnet101", "resnet152"), source="CARE"),
        ),
        recipes=_CARE_BYOL,
        note="The paper states no settings of BYOL on ViTs; here they are MoCo v3's.",
        costs=True,
    ),
    "care-table2": Table(
        "Linear classification after longer pre-training",
        (
            Pick("linear", source="CARE paper, table 2"),
            Pick("linear", (("care", 400), ("care", 800)), source="CARE repository"),
        ),
        recipes=_CARE_BYOL,
        costs=True,
    ),
    "care-table3": Table(
        "Fine-tuning on 1% and 10% of the labels", (Pick("semi", source="CARE paper|BYOL paper"),), recipes=_CARE_BYOL
    ),
    "care-table4": Table(
        "Detection on VOC and with Mask R-CNN C4 on COCO",
        (Pick("detect", tasks="C4", source="CARE paper, tables? 4"),),
        recipes=_CARE_BYOL,
        note="Means of five trials: --trials 5.",
    ),
    "care-table5": Table(
        "Mask R-CNN FPN on COCO",
        (Pick("detect", tasks="FPN", source="CARE paper, tables? (4 and )?5"),),
        recipes=_CARE_BYOL,
        note="Means of five trials: --trials 5.",
    ),
    "care-table6": Table("Weight of the attention loss", (Pick("linear", source="CARE paper, tables? 6"),)),
    "care-table7": Table(
        "Number of attention blocks", (Pick("linear", source="CARE paper, table 7|CARE paper, tables 6 to 8"),)
    ),
    "care-table8": Table(
        "Position encoding", (Pick("linear", source="CARE paper, table 8|CARE paper, tables 6 to 8"),)
    ),
    "care-streams": Table(
        "Sequential against parallel streams (section 4.3)", (Pick("linear", source="CARE paper, .* streams"),)
    ),
    "care-figure4": Table(
        "Grad-CAM of the C-stream alone and of CARE",
        extra=tuple(
            _row("care", 200, "ImageNet-1K", {"design": design}, [Cell("analyze", "gradcam")])
            for design in ("conv", "parallel")
        ),
        note="Both runs are drawn on one common scale.",
    ),
    "lewel-table1": Table(
        "Linear classification with ResNet-50",
        (Pick("linear", (*((m, e) for m in ("moco-v2", "byol") for e in (100, 200)),), source="LEWEL paper's"),)
        + (Pick("linear", source="LEWEL paper$"),),
    ),
    "lewel-table2": Table("Fine-tuning on 1% and 10% of the labels", (Pick("semi", source="LEWEL paper"),)),
    "lewel-table3": Table(
        "VOC: detection and segmentation",
        (
            Pick("detect", tasks="VOC", source="LEWEL paper"),
            Pick("detect", _REPEATED, tasks="VOC", source="SimSiam paper"),
            Pick("segment", tasks="VOC12", source="tables? 3"),
        ),
        note=_SEARCHED,
    ),
    "lewel-table4": Table(
        "Mask R-CNN on COCO, 1x schedule",
        (
            Pick("detect", tasks="COCO", source="LEWEL paper"),
            Pick("detect", _REPEATED, tasks="COCO", source="SimSiam paper"),
        ),
        note=_SEARCHED,
    ),
    "lewel-table5": Table(
        "Global, aligned and coupled losses",
        tuple(Pick(protocol, source="LEWEL paper, table 5") for protocol in ("linear", "segment")),
    ),
    "lewel-table6": Table(
        "Larger and extra heads, random alignment maps",
        tuple(Pick(protocol, source="LEWEL paper, table 6") for protocol in ("linear", "segment")),
        extra=(
            _row("moco-v2", 240, "ImageNet-100", {"hidden_dim": "4096", "dim": "256"}, _LEWEL_CELLS),
            _row("moco-v2", 240, "ImageNet-100", {"extra_head": "true"}, _LEWEL_CELLS),
            _row("lewel-m", 240, "ImageNet-100", {**_COUPLED, "align": "random"}, _LEWEL_CELLS),
            _row("lewel-m", 240, "ImageNet-100", {**_COUPLED, "align": "learned"}, _LEWEL_CELLS),
        ),
        note="The accuracies of the three middle rows cannot be read in the paper's text.",
    ),
    "lewel-table7": Table(
        "Width and number of groups",
        tuple(Pick(protocol, source="LEWEL paper, table 7") for protocol in ("linear", "segment")),
    ),
    "lewel-figure3a": Table(
        "Weight of the aligned loss",
        extra=_ablations("lewel-m", 240, "beta", ("0", "0.25", "0.5", "0.75", "1"), _LEWEL_CELLS[:1]),
        note="The paper draws a curve; these values are ours.",
    ),
    "lewel-figure3b": Table(
        "Number of alignment maps",
        extra=_ablations("lewel-m", 240, "c", ("32", "64", "128", "256", "512"), _LEWEL_CELLS[:1]),
        note="The paper draws a curve; these values are ours.",
    ),
    "lewel-appendix-b1": Table("Mask R-CNN FPN on COCO, 2x schedule", (Pick("detect", source="LEWEL repository"),)),
    "lewel-appendix-c1": Table(
        "Alignment maps", extra=(_row("lewel-b", 200, "ImageNet-1K", {}, [Cell("analyze", "align")]),)
    ),
}
"""Table or figure -> what it holds."""
