"""A protocol several times: with other seeds for a mean and its deviation, and with several fine-tuning rates.

Source: CARE reports detection as the mean of five trials (section 4.2); LEWEL searches the fine-tuning rate of
detectors and segmenters for each model (section 4.3).
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.atomic import write_atomically

from ..errors import UserMistake
from ..flags import OneLineParser
from ..record.evaluations import NAMES

Run = Callable[[Sequence[str]], int]
_RATED = ("detect", "segment")
"""Protocols with one fine-tuning rate, `--lr`."""
_HEADLINES = ("box_ap", "mask_ap", "miou", "top1")
"""Figures that tell which rate is best, the first that a result has."""


@dataclass(frozen=True)
class Trials:
    """How often a protocol runs.

    Attributes:
        count: runs with the seeds SEED, SEED + 1, ... at each rate.
        rates: fine-tuning rates; empty for the protocol's own.
        seed: of the first run.
        output: result file of them all; each run's own result stands beside it.
    """

    count: int
    rates: tuple[float, ...]
    seed: int
    output: Path

    def runs(self) -> list[tuple[float | None, int, Path]]:
        """(rate, seed, result file) of every run, in order."""
        return [
            (rate, self.seed + trial, self.output.with_suffix("." + ".".join(_parts(rate, trial)) + ".json"))
            for rate in self.rates or (None,)
            for trial in range(self.count)
        ]


def _parts(rate: float | None, trial: int) -> list[str]:
    # A dot would make two endings of one number.
    return ([] if rate is None else [f"lr{rate:g}".replace(".", "_")]) + [f"trial{trial}"]


def take_trials(protocol: str, argv: Sequence[str]) -> tuple[Trials | None, list[str]]:
    """Separate the flags of this file from those of the protocol.

    Args:
        protocol: name of the protocol.
        argv: its arguments.

    Returns:
        (what was asked for, None for a single run; the arguments that are left, without seed and result file where
        trials have their own).

    Raises:
        UserMistake: a value does not fit, or trials have no place for their results.
    """
    parser = OneLineParser(add_help=False)
    parser.add_argument("--trials", type=int, default=1)
    parser.add_argument("--sweep-lrs", type=_rates, default=())
    asked, rest = parser.parse_known_args(list(argv))
    if asked.trials < 1:
        raise UserMistake(f"--trials {asked.trials} must be at least 1")
    if asked.trials == 1 and not asked.sweep_lrs:
        return None, rest
    if protocol == "knn":
        raise UserMistake("--trials: k-NN draws nothing, so every run would be the same; leave it out")
    if asked.sweep_lrs and protocol not in _RATED:
        raise UserMistake(f"--sweep-lrs is for {' and '.join(_RATED)}; {protocol} has --lrs or rates of its own")
    parser = OneLineParser(add_help=False)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="")
    own, rest = parser.parse_known_args(rest)
    if not own.output:
        raise UserMistake("--trials and --sweep-lrs need --output FILE.json; each run's own result stands beside it")
    return Trials(asked.trials, asked.sweep_lrs, own.seed, Path(own.output)), rest


def _rates(text: str) -> tuple[float, ...]:
    rates = tuple(float(part) for part in text.split(","))
    if min(rates) <= 0:
        raise ValueError("a learning rate is greater than 0")
    return rates


def run_trials(run: Run, trials: Trials, argv: Sequence[str]) -> int:
    """Run a protocol for every rate and seed that has no result yet, then write the mean and the deviation.

    Args:
        run: the protocol.
        trials: rates, seeds and result file.
        argv: the protocol's other arguments.

    Returns:
        0, or the exit code of the run that ended otherwise; what is done stays done.
    """
    # Looked at before the first run, so that all ranks pass over the same ones.
    wanted = [each for each in trials.runs() if not each[2].exists()]
    for rate, seed, output in wanted:
        own = ["--seed", str(seed), "--output", str(output)] + ([] if rate is None else ["--lr", f"{rate:g}"])
        code = run([*argv, *own])
        if code:
            return code
    if int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))) == 0:
        document = summary(trials)
        write_atomically(trials.output, (json.dumps(document, indent=1) + "\n").encode())
        print(f"result: {trials.output}, {document['headline']} {100 * document['mean'][document['headline']]:.2f}")
    return 0


def summary(trials: Trials) -> dict[str, Any]:
    """The result of all runs: that of the best rate's first run, with the means of its trials in place of its figures.

    Besides, "mean" and "deviation" (of the sample, None for one trial) by figure, "trials", and "rates": rate -> mean
    of the figure named "headline", by which the best rate was chosen.
    """
    found: dict[float | None, list[dict[str, Any]]] = {}
    for rate, _, output in trials.runs():
        found.setdefault(rate, []).append(json.loads(output.read_text(encoding="utf-8")))
    first = next(iter(found.values()))[0]
    headline = next(name for name in _HEADLINES if name in _figures(first))
    means = {
        rate: statistics.fmean(_figures(each)[headline] for each in each_rate) for rate, each_rate in found.items()
    }
    best = max(means, key=lambda rate: means[rate])
    rows = [_figures(each) for each in found[best]]
    mean = {name: statistics.fmean(row[name] for row in rows) for name in rows[0]}
    deviation = {name: statistics.stdev(row[name] for row in rows) if len(rows) > 1 else None for name in rows[0]}
    document = _with_figures(found[best][0], mean)
    rates = {f"{rate:g}": value for rate, value in means.items() if rate is not None}
    return {**document, "headline": headline, "mean": mean, "deviation": deviation, "trials": rows, "rates": rates}


def _figures(document: dict[str, Any]) -> dict[str, float]:
    """The shares of a result: in "metrics", in "best" (the best of several classifiers), or at its top."""
    found: dict[str, float] = {}
    for place in (document, document.get("best", {}), document.get("metrics", {})):
        found |= {name: value for name, value in place.items() if _is_figure(name, value)}
    return found


def _is_figure(name: str, value: Any) -> bool:
    return isinstance(value, float) and name in NAMES


def _with_figures(document: dict[str, Any], figures: dict[str, float]) -> dict[str, Any]:
    """A copy whose figures are these, wherever they stand."""

    def replaced(place: dict[str, Any]) -> dict[str, Any]:
        return {name: figures[name] if _is_figure(name, value) else value for name, value in place.items()}

    inner = {name: replaced(document[name]) for name in ("best", "metrics") if isinstance(document.get(name), dict)}
    return {**replaced(document), **inner}
