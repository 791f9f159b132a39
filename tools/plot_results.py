"""Draw the plots of the README and the plots and marked tables of the results page from the rows in tools/results.

`python tools/plot_results.py [--out FOLDER]` writes one SVG a plot, and the tables into tools/results/README.md. It
reads rows and nothing else, so a figure without a row cannot appear in them. Needs matplotlib (extra `eval`).
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:
    # Python puts the script's folder on the path, not the checkout.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import csv
import re
from collections.abc import Callable, Sequence
from functools import partial
from statistics import fmean
from typing import TYPE_CHECKING

from tools.support.host_table import host_table
from tools.support.pages import redraw
from tools.support.plan_tables import curve, grouped, plan_part

if TYPE_CHECKING:
    from matplotlib.axes import Axes

RESULTS = Path(__file__).resolve().parent / "results"
PLOTS = RESULTS / "plots"
OURS, OTHERS = "#0b6e4f", "#9aa5b1"
Row = dict[str, str]

# Contender as the rows name it, label in the plot, and whether it is ours; the slowest first.
LOADERS = (
    ("DataLoader, PIL, whole MoCo v2 augmentation", "PyTorch DataLoader with PIL, all augmentation", False),
    ("DALI in our order, crops only", "DALI, CPU operators, crops", False),
    ("DataLoader, PIL, crops only", "PyTorch DataLoader with PIL, crops", False),
    ("stock FFCV, one decode per view", "stock FFCV, crops", False),
    ("ours through FFCV's Loader, whole MoCo v2 augmentation on the CPU", "Regatta, all augmentation", True),
    ("ours through FFCV's Loader, crops only", "Regatta, crops", True),
)


def rows_of(name: str) -> list[Row]:
    """The rows of one file of tools/results, oldest first.

    Args:
        name: file name with its ending.
    """
    with (RESULTS / name).open(newline="") as stream:
        return sorted(csv.DictReader(stream), key=lambda row: row["date"])


def newest_run(rows: Sequence[Row], contenders: Sequence[str]) -> dict[str, Row]:
    """The rows of the newest run that has every contender: only figures of one run may be compared.

    Args:
        rows: throughput rows, oldest first.
        contenders: names that the run must have.

    Returns:
        Row of each contender.

    Raises:
        ValueError: when no run has them all.
    """
    runs: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        if row["metric"] == "throughput":
            # The PIL contenders run on fewer images and say so in their setting, so the date tells a run.
            runs.setdefault((row["date"], row["cpu"]), {})[row["contender"]] = row
    complete = [run for run in runs.values() if set(contenders) <= set(run)]
    if not complete:
        raise ValueError(f"no run in bench_pipeline.csv has all of: {', '.join(contenders)}")
    return complete[-1]


def draw_loaders(axes: Axes) -> None:
    """Source images per second of the loaders, two views of 224 px each, as bars."""
    run = newest_run(rows_of("bench_pipeline.csv"), [name for name, _, _ in LOADERS])
    rates = [float(run[name]["median"]) for name, _, _ in LOADERS]
    bars = axes.barh(
        [label for _, label, _ in LOADERS], rates, color=[OURS if ours else OTHERS for _, _, ours in LOADERS]
    )
    axes.bar_label(bars, labels=[f"{rate:,.0f}" for rate in rates], padding=4)
    axes.set_xlim(0, 1.12 * max(rates))
    machine = run[LOADERS[-1][0]]
    axes.set_xlabel(f"images/s, two 224 px views of each image; {machine['cores']} cores, {machine['cpu']}, no GPU")


def learning_curve(rows: Sequence[Row], method: str, recipe: str) -> list[tuple[int, float]]:
    """20-NN top-1 by epoch of the run of a method with its recipe unchanged, as (epoch, percent), ascending.

    Args:
        rows: rows of learning.csv, oldest first; of an epoch measured twice the newer counts.
        method: contender.
        recipe: recipe that the setting begins with. A setting that goes on after the seed changed the recipe.
    """
    curve = {}
    for row in rows:
        epoch = re.fullmatch(r"20-NN top-1, epoch (\d+)", row["metric"])
        setting = row["setting"]
        if epoch and row["contender"] == method and setting.startswith(f"{recipe},") and setting.endswith("seed 0"):
            curve[int(epoch[1])] = 100 * float(row["median"])
    return sorted(curve.items())


def draw_imagenette(axes: Axes) -> None:
    """20-NN top-1 of the small recipes on Imagenette against epochs, one line a method, one seed."""
    rows = rows_of("learning.csv")
    for method in sorted({row["contender"] for row in rows if row["benchmark"] == "learning"}):
        curve = learning_curve(rows, method, f"{method}-small")
        if curve:
            axes.plot(*zip(*curve, strict=True), marker="o", markersize=3.5, label=method)
    axes.set_xlabel("epochs of Imagenette (ResNet-18, 64 px, one seed)")
    axes.set_ylabel("20-NN top-1, percent")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, ncols=2)


def draw_plan(axes: Axes, plan: str) -> None:
    """20-NN top-1 of a plan's runs against epochs: the mean over seeds, and a band from the least to the most.

    Args:
        axes: what is drawn on.
        plan: name in imagenette.csv.
    """
    rows = [row for row in rows_of("imagenette.csv") if row["plan"] == plan]
    for label, runs in sorted(grouped(rows).items()):
        epochs = [epoch for epoch, _ in curve(runs[0])]
        shares = [[100 * share for _, share in curve(run)] for run in runs]
        (line,) = axes.plot(epochs, [fmean(each) for each in zip(*shares, strict=True)], label=label, linewidth=1.2)
        if len(runs) > 1:
            low, high = ([least(each) for each in zip(*shares, strict=True)] for least in (min, max))
            axes.fill_between(epochs, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
    axes.set_xlabel(f"epochs of Imagenette ({rows[0]['arch']}, {rows[0]['image_size']} px; band: over seeds)")
    axes.set_ylabel("20-NN top-1, percent")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))


def draw_shapes(axes: Axes) -> None:
    """20-NN top-1 on drawn shapes, trained beside untrained, with the 20th and 80th percentile of three seeds."""
    newest: dict[tuple[str, str], Row] = {}
    for row in rows_of("behaviour.csv"):
        # A setting with a semicolon plants a fault; the plot shows the methods as they are.
        if ";" not in row["setting"] and row["metric"].startswith("20-NN top-1, "):
            newest[row["contender"], row["metric"].partition(", ")[2]] = row
    methods = sorted({method for method, _ in newest}, key=lambda name: float(newest[name, "trained"]["median"]))
    for offset, state, colour in ((-0.2, "untrained", OTHERS), (0.2, "trained", OURS)):
        rows = [newest[method, state] for method in methods]
        middle = [100 * float(row["median"]) for row in rows]
        below = [m - 100 * float(row["p20"]) for m, row in zip(middle, rows, strict=True)]
        above = [100 * float(row["p80"]) - m for m, row in zip(middle, rows, strict=True)]
        places = [place + offset for place in range(len(methods))]
        axes.barh(places, middle, height=0.38, color=colour, xerr=(below, above), label=state, error_kw={"lw": 0.8})
    axes.set_yticks(range(len(methods)), methods)
    axes.set_xlabel("20-NN top-1 on twelve drawn classes, percent; median of three seeds")
    axes.legend(frameon=False, loc="lower right")


PLANS = ("imagenette-small", "imagenette-32px-30", "imagenette-32px-long", "imagenette-32px", "imagenette-narrow")
"""Plans that have rows."""
PLOTS_BY_NAME: dict[str, tuple[Callable[[Axes], None], tuple[float, float]]] = {
    "loaders": (draw_loaders, (8.4, 2.6)),
    "imagenette": (draw_imagenette, (8.4, 3.6)),
    **{plan: (partial(draw_plan, plan=plan), (8.4, 4.2)) for plan in PLANS},
    "shapes": (draw_shapes, (8.4, 5.2)),
}
"""Name of each plot, with the function that draws it and its width and height in inches."""


def write_plot(name: str, folder: Path) -> Path:
    """Draw one plot.

    Args:
        name: key of `PLOTS_BY_NAME`.
        folder: where `<name>.svg` goes; made when it is missing.

    Returns:
        The file.
    """
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    draw, size = PLOTS_BY_NAME[name]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.svg"
    # Text stays text, and neither date nor random ids go into the file: the same rows give the same bytes.
    with plt.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 9, "font.family": "sans-serif"}):
        figure, axes = plt.subplots(figsize=size, layout="constrained")
        axes.spines[["top", "right"]].set_visible(False)
        draw(axes)
        figure.savefig(path, metadata={"Date": None}, facecolor="white")
        plt.close(figure)
    # Matplotlib ends some lines with a blank, which would show up in every later diff.
    path.write_text("\n".join(line.rstrip() for line in path.read_text().splitlines()) + "\n")
    return path


def write_tables(page: Path) -> list[str]:
    """Draw the marked tables of a page anew; returns their marks."""
    return redraw(
        page,
        {
            "plan": partial(plan_part, rows_of("imagenette.csv")),
            "rows": lambda name: host_table(rows_of(f"{name}.csv")),
        },
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Write every plot; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=PLOTS, help="folder of the plots")
    out = parser.parse_args(argv).out
    for name in PLOTS_BY_NAME:
        print(write_plot(name, out))
    write_tables(RESULTS / "README.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
