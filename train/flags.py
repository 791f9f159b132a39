"""Flags of every command: one line of error with the right flag in it, and one flag for each field of a dataclass."""

from __future__ import annotations

import argparse
import difflib
import json
import math
import re
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn

from .errors import UserMistake
from .fields import Leaf

# What other trainers call an option, and what it may be called here; the first one that a command has is named.
SYNONYMS: dict[str, tuple[str, ...]] = {
    "lr": ("optim.lr", "lr", "lrs"),
    "learning-rate": ("optim.lr", "lr", "lrs"),
    "base-lr": ("optim.lr", "lr", "lrs"),
    "wd": ("optim.weight-decay", "weight-decay"),
    "optimizer": ("optim.kind",),
    "opt": ("optim.kind",),
    "momentum": ("optim.sgd-momentum",),
    "clip-grad": ("optim.clip-grad-norm",),
    "grad-clip": ("optim.clip-grad-norm",),
    "warmup": ("schedule.warmup-epochs",),
    "scheduler": ("schedule.decay", "schedule"),
    "lr-schedule": ("schedule.decay", "schedule"),
    "min-lr": ("schedule.final",),
    "ema": ("ema.momentum",),
    "ema-decay": ("ema.momentum",),
    "moco-m": ("ema.momentum",),
    "moco-k": ("queue-size", "queue"),
    "moco-t": ("temperature",),
    "moco-dim": ("dim",),
    "tau": ("temperature",),
    "epsilon": ("sinkhorn-epsilon", "optim.eps"),
    "nmb-crops": ("small-crops",),
    "size-crops": ("small-size", "image-size"),
    "nmb-prototypes": ("prototypes",),
    "n-prototypes": ("prototypes",),
    "num-prototypes": ("prototypes",),
    "queue-length": ("queue-size", "queue"),
    "freeze-prototypes-niters": ("freeze-prototypes-steps",),
    "batch-size": ("global-batch", "batch", "images"),
    "batch": ("global-batch",),
    "bs": ("global-batch", "batch"),
    "accumulate": ("micro-batch",),
    "accum-iter": ("micro-batch",),
    "gradient-accumulation-steps": ("micro-batch",),
    "amp": ("precision",),
    "use-amp": ("precision",),
    "mixed-precision": ("precision",),
    "fp16": ("precision",),
    "bf16": ("precision",),
    "fp32": ("precision",),
    "half": ("precision",),
    "dtype": ("precision",),
    "cuda": ("device",),
    "cpu": ("device",),
    "gpu": ("device",),
    "sync-bn": ("bn.mode", "bn", "norm"),
    "syncbn": ("bn.mode", "bn", "norm"),
    "model": ("arch",),
    "model-name": ("arch",),
    "backbone": ("arch",),
    "architecture": ("arch",),
    "img-size": ("image-size", "size"),
    "input-size": ("image-size", "size"),
    "resolution": ("image-size", "size"),
    "crop-size": ("image-size", "crop"),
    "num-epochs": ("epochs",),
    "max-epochs": ("epochs",),
    "iterations": ("max-steps", "steps"),
    "max-iters": ("max-steps", "steps"),
    "num-steps": ("max-steps", "steps"),
    "dataset": ("data",),
    "data-dir": ("data",),
    "data-path": ("data",),
    "train-dir": ("data",),
    "train-data": ("data",),
    "val-dir": ("val-data",),
    "val-path": ("val-data",),
    "val": ("val-data",),
    "out": ("run-dir", "out", "output"),
    "output": ("run-dir", "output", "out"),
    "output-dir": ("run-dir", "output", "out"),
    "out-dir": ("run-dir", "output", "out"),
    "save-dir": ("run-dir", "output", "out"),
    "log-dir": ("run-dir", "output", "out"),
    "weights": ("init", "checkpoint"),
    "pretrained": ("init", "checkpoint"),
    "ckpt": ("init", "checkpoint"),
    "num-workers": ("workers",),
    "threads": ("workers",),
    "print-freq": ("log-every",),
    "save-freq": ("checkpoint-every",),
    "save-every": ("checkpoint-every",),
    "eval-freq": ("knn-every", "eval-every"),
    "force": ("overwrite",),
}
# Options of other trainers that no command here has.
INSTEAD: dict[str, str] = {
    **dict.fromkeys(
        ("gpus", "devices", "num-gpus", "ngpus", "nproc-per-node", "world-size", "nodes", "num-nodes", "distributed"),
        "processes are started by torchrun --nproc_per_node=N",
    ),
    **dict.fromkeys(
        ("wandb", "mlflow", "tensorboard", "logger"),
        "metrics are always written to metrics.jsonl and tensorboard/, and with --log wandb|mlflow|trackio there",
    ),
}


def nearest(word: str, known: Iterable[str]) -> str:
    """The one of `known` that a mistyped word most likely means; empty where none is like it."""
    return next(iter(difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)), "")


def nearest_flag(flag: str, known: Sequence[str]) -> str:
    """The flag of a command that an unknown one most likely means: a synonym, a part of one alone, or a typo.

    Args:
        flag: what was typed, with its dashes.
        known: the command's flags, with their dashes.

    Returns:
        One of `known`, or empty text where a guess would be a wrong one.
    """
    by_name = {each.lstrip("-"): each for each in known if each.startswith("--")}
    name = flag.lstrip("-").lower()
    for candidate in SYNONYMS.get(name, ()):
        if candidate in by_name:
            return by_name[candidate]
    part = re.compile(rf"(^|[-.]){re.escape(name)}($|[-.])")
    whole = [each for each in by_name if part.search(each)]
    # A part may belong to two nested flags; only a single fit is a good guess.
    if len(whole) == 1:
        return by_name[whole[0]]
    if name in SYNONYMS or name in INSTEAD:
        return ""  # what it means is known, so that a flag that only looks like it is a wrong one
    return by_name.get(nearest(name, by_name), "")


def unknown_flag(flag: str, known: Sequence[str]) -> UserMistake:
    """The mistake of giving a flag that a command does not have, with what to give instead."""
    name = flag.lstrip("-").lower()
    found = nearest_flag(flag, known)
    if found:
        remedy = f"the nearest valid flag is {found}; --help lists all"
    else:
        remedy = f"{INSTEAD[name]}; --help lists all flags" if name in INSTEAD else "--help lists all flags"
    return UserMistake(f"unknown flag {flag}; {remedy}")


class OneLineParser(argparse.ArgumentParser):
    """A parser whose errors are one line that names the nearest valid flag, never a usage block.

    Flags may be written with underscores or hyphens, never abbreviated, and each only once.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **settings})

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing usage."""
        raise UserMistake(f"{message}; --help lists all flags")

    def known_flags(self) -> list[str]:
        """Every flag this parser accepts."""
        return [name for action in self._actions for name in action.option_strings if name.startswith("--")]

    def parse_once(self, argv: Sequence[str], others_allowed: bool = False) -> argparse.Namespace:
        """Parse the arguments.

        Args:
            argv: the command's arguments.
            others_allowed: leave arguments alone that this parser does not know, for a first pass.

        Raises:
            UserMistake: an unknown flag, a flag given twice, or a value that does not fit.
        """
        arguments = [_normalise(argument) for argument in argv]
        self._refuse_flags(arguments, others_allowed)
        namespace, unknown = self.parse_known_args(arguments)
        if unknown and not others_allowed:
            raise UserMistake(f"unknown argument {unknown[0]}; --help lists all")
        return namespace

    def _refuse_flags(self, arguments: Sequence[str], others_allowed: bool) -> None:
        # Before argparse, which tells of a missing argument first and takes the last of two values without a word.
        seen: set[int] = set()
        for argument in arguments:
            flag = argument.partition("=")[0]
            if flag == "--":
                return
            # A value, perhaps a negative number.
            if not re.fullmatch(r"--?[A-Za-z][-\w.]*", flag):
                continue
            action = self._option_string_actions.get(flag)
            if action is None:
                if others_allowed:
                    continue
                raise unknown_flag(flag, self.known_flags())
            # By the action, which all spellings of a flag share.
            if id(action) in seen:
                raise UserMistake(f"{flag} is given twice; give it once")
            seen.add(id(action))


def given_flags(argv: Sequence[str]) -> set[str]:
    """Names of the flags that a command line gives, without dashes and in the form with hyphens."""
    words = (_normalise(argument).partition("=")[0] for argument in argv)
    return {word.removeprefix("--") for word in words if re.fullmatch(r"--[A-Za-z][-\w.]*", word)}


def _normalise(argument: str) -> str:
    """Flags may be written with underscores or hyphens; values are left alone."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value


def parse_value(text: str, annotation: Any) -> Any:
    """The value that `text` means for a field of this type.

    Raises:
        ValueError: when it means none; the message lists what is accepted.
    """
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        if type(None) in arguments and text.lower() == "none":
            return None
        kinds = [each for each in arguments if each is not type(None)]
        # A word beside a number, as in `--micro-batch auto`.
        words = [word for each in kinds[1:] for word in typing.get_args(each)]
        if text in words:
            return text
        try:
            return parse_value(text, kinds[0])
        except ValueError as reason:
            raise ValueError(" or ".join([str(reason), *words])) from None
    if origin is typing.Literal:
        match = next((choice for choice in arguments if str(choice) == text), None)
        if match is None:
            raise ValueError(f"choose from {', '.join(map(str, arguments))}")
        return match
    if origin is tuple:
        inner = arguments[0]
        return tuple(parse_value(part, inner) for part in text.split(",") if part)
    if annotation is bool:
        if text.lower() in ("true", "yes", "on", "1"):
            return True
        if text.lower() in ("false", "no", "off", "0"):
            return False
        raise ValueError("choose true or false")
    if annotation is int:
        return _number(int, text.replace("_", ""), "a whole number")
    if annotation is float:
        return _number(float, text, "a finite number")
    return annotation(text)


def _number(kind: type[int] | type[float], text: str, what: str) -> int | float:
    try:
        value = kind(text)
    except ValueError:
        raise ValueError(f"give {what}") from None
    # `float` takes "nan", which compares as false with every bound and would pass them.
    if not math.isfinite(value):
        raise ValueError(f"give {what}")
    return value


def add_leaf(parser: argparse._ActionsContainer, leaf: Leaf, prefix: str = "") -> None:
    """One flag for one field, under `prefix` and its name in the namespace; a boolean gets a `--no-` form as well."""
    # As JSON, so that help shows a value the way `config.json` does.
    shown = json.dumps(list(leaf.value) if isinstance(leaf.value, tuple) else leaf.value, default=str)
    text = f"{leaf.option.help} (default: {shown})".strip().replace("%", "%%")
    dest = prefix + leaf.name
    above, _, last = leaf.name.rpartition(".")
    if leaf.annotation in (bool, bool | None):
        group = parser.add_mutually_exclusive_group()
        group.add_argument(
            leaf.flag, dest=dest, nargs="?", const="true", metavar="BOOL", default=argparse.SUPPRESS, help=text
        )
        # The `no-` stands before the last part: `--region.no-shared-forward`.
        negative = "--" + ".".join(filter(None, (above, f"no-{last}"))).replace("_", "-")
        group.add_argument(
            negative, dest=dest, action="store_const", const="false", default=argparse.SUPPRESS, help=argparse.SUPPRESS
        )
        return
    choices = typing.get_args(leaf.annotation) if typing.get_origin(leaf.annotation) is typing.Literal else ()
    metavar = "{" + ",".join(map(str, choices)) + "}" if choices else last.upper()
    parser.add_argument(leaf.flag, dest=dest, metavar=metavar, default=argparse.SUPPRESS, help=text)


def parse_fields(parser: OneLineParser, argv: Sequence[str], fields: Mapping[str, Leaf]) -> dict[str, Any]:
    """The values of the fields that the command line sets.

    Args:
        parser: has a flag of each field, by `add_leaf`.
        argv: the command's arguments.
        fields: the fields by their names in the namespace; flags of the parser that are not in it are left out.

    Returns:
        Name -> value, of the fields that were given.

    Raises:
        UserMistake: an unknown or repeated flag, or a value that does not fit.
    """
    given = vars(parser.parse_once(argv))
    values: dict[str, Any] = {}
    for name in given.keys() & fields.keys():
        leaf = fields[name]
        try:
            values[name] = parse_value(given[name], leaf.annotation)
        except ValueError as reason:
            raise UserMistake(f"{leaf.flag} {given[name]}: {reason}") from None
    return values
