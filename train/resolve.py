"""From arguments to a `Config`: recipe, then `--config` file, then flags; and how two configurations differ."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .config import Config, Recipe, RunConfig, ScheduleConfig
from .errors import UserMistake
from .fields import Leaf, check, flatten, unflatten
from .flags import OneLineParser, add_leaf, parse_fields
from .recipes import RECIPES, default_recipe, known_methods

PARTS = ("run", "recipe", "model")
_HELP_METHOD = "regioncl-m"  # whose recipe `--help` shows where no method is given


def resolve(argv: Sequence[str]) -> Config:
    """The configuration that a command line asks for: recipe, then `--config` file, then flags.

    Raises:
        UserMistake: naming the flag, its value and the remedy.
    """
    # Which flags there are depends on the method, and their defaults on recipe and file: those are read first.
    chosen = _first_pass(argv)
    document = _read_config_file(chosen["config"]) if chosen["config"] else {}
    method = _choose_method(chosen["method"], document)
    if not method and not any(argument in ("-h", "--help") for argument in argv):
        raise UserMistake(f"--method is needed: one of {', '.join(known_methods())}")
    name = _choose_recipe(chosen, document, method)
    base = Config(RunConfig(method=method, recipe=name), *RECIPES[name][1]())
    if document:
        base = _from_document(base, document)
    return _apply_flags(argv, base, show_model=bool(method))


def _first_pass(argv: Sequence[str]) -> dict[str, str]:
    parser = OneLineParser(add_help=False)
    for name in ("method", "recipe", "config"):
        parser.add_argument(f"--{name}", default="")
    return vars(parser.parse_once(argv, others_allowed=True))


def _read_config_file(path: str) -> dict[str, Any]:
    if Path(path).is_dir():
        raise UserMistake(f"--config {path} is a folder; give the config.json in it")
    try:
        loaded = json.loads(Path(path).read_text())
    except OSError as reason:
        raise UserMistake(f"--config {path}: {reason.strerror}; give the config.json of a run") from None
    except ValueError as reason:
        raise UserMistake(f"--config {path} is no JSON ({reason}); give the config.json of a run") from None
    if not isinstance(loaded, dict) or not set(PARTS) <= set(loaded):
        raise UserMistake(f"--config {path}: not a run's config.json (needs run, recipe and model)")
    return loaded


def _choose_method(given: str, document: Mapping[str, Any]) -> str:
    method = given or document.get("run", {}).get("method", "")
    if method and method not in known_methods():
        raise UserMistake(f"--method {method}: choose from {', '.join(known_methods())}")
    return method


def _choose_recipe(chosen: Mapping[str, str], document: Mapping[str, Any], method: str) -> str:
    """The name of the recipe; it belongs to the method where there is one."""
    of_file = document.get("run", {}).get("recipe", "")
    if chosen["recipe"] and document and chosen["recipe"] != of_file:
        # Both set every value. Taking the values of one under the name of the other would record what was not run.
        raise UserMistake(
            f"--recipe {chosen['recipe']} and --config {chosen['config']}, whose recipe is {of_file or 'not named'}, "
            "both set every value; give one of them"
        )
    name = chosen["recipe"] or of_file or default_recipe(method or _HELP_METHOD)
    if name not in RECIPES:
        fitting = [name for name, (owner, _) in RECIPES.items() if owner == method]
        raise UserMistake(f"--recipe {name}: choose from {', '.join(fitting)}")
    owner = RECIPES[name][0]
    if method and owner != method:
        raise UserMistake(f"--recipe {name} belongs to --method {owner}, not to {method}")
    return name


def config_of(document: Mapping[str, Any]) -> Config:
    """The configuration of a `config.json`, with the defaults for what it does not name.

    Raises:
        UserMistake: a field that this version does not have.
    """
    return _from_document(_plain(document["run"]["method"]), document)


def _from_document(default: Config, document: Mapping[str, Any]) -> Config:
    """The configuration `default` with the values of a `config.json`; unknown names are refused."""
    known = flatten(default)
    values = {}
    for name, leaf in flatten({part: document[part] for part in PARTS}).items():
        if name not in known:
            field = name.partition(".")[2]
            raise UserMistake(f"config field {field} does not exist in this version; remove it from the file")
        values[name] = tuple(leaf.value) if isinstance(leaf.value, list) else leaf.value
    return unflatten(default, values)


def _apply_flags(argv: Sequence[str], config: Config, show_model: bool) -> Config:
    parser = OneLineParser(
        prog="train/main.py",
        description="Train a backbone without labels. Give --method to see that method's own flags in this help.",
    )
    parser.add_argument("--config", metavar="RUN.json", default=None, help="start from a run's config.json")
    titles = {"run": "run", "recipe": "recipe", "model": f"method {config.run.method}"}
    fields: dict[str, Leaf] = {}
    for part in PARTS if show_model else PARTS[:2]:
        group = parser.add_argument_group(titles[part])
        for leaf in flatten(getattr(config, part)).values():
            add_leaf(group, leaf, f"{part}.")
            fields[f"{part}.{leaf.name}"] = leaf
    values = parse_fields(parser, argv, fields)
    # An empty --method or --recipe asks for the default, which `config` holds already.
    values |= {"run.method": config.run.method, "run.recipe": config.run.recipe}
    config = unflatten(config, values)
    if not config.run.run_dir:
        config = unflatten(config, {"run.run_dir": f"runs/{config.run.method}"})
    for part in PARTS:
        check(getattr(config, part))
    _check_milestones(config.recipe.schedule)
    return config


def _check_milestones(schedule: ScheduleConfig) -> None:
    if (schedule.decay == "steps") != bool(schedule.milestones):
        raise UserMistake(
            f"--schedule.milestones {','.join(map(str, schedule.milestones)) or 'none'} with --schedule.decay "
            f"{schedule.decay}: decay steps needs milestones, and no other decay has them"
        )


def continued(argv: Sequence[str], config: Config, recorded: Mapping[str, Any]) -> Config:
    """The configuration with which a recorded run of the same recipe goes on.

    A recipe's values may be mended between versions. A run that has begun keeps its own: whatever decides what is
    computed and is not given on the command line is as recorded. A run of another method or recipe, and one that names
    a `--config` file, is left as asked for, so that `changed_fields` refuses it.

    Args:
        argv: the command line.
        config: what `resolve` makes of it.
        recorded: configuration in the newest checkpoint of the run's folder.

    Returns:
        `config` with the recorded values; `config` itself where there are none to take over.
    """
    same = all(recorded["run"].get(name) == getattr(config.run, name) for name in ("method", "recipe"))
    if not same or _first_pass(argv)["config"]:
        return config
    # An option that the recorded run did not have counts at its default, as in `changed_fields`.
    known, values = _with_defaults(recorded)
    kept = {
        name: tuple(values[name]) if isinstance(values[name], list) else values[name]
        for name, leaf in known.items()
        if not leaf.option.free_on_resume
    }
    return _apply_flags(argv, unflatten(config, kept), show_model=True)


def lengthened(saved: Mapping[str, Any], current: Mapping[str, Any]) -> dict[str, Any]:
    """The current document with the saved number of epochs where that is the smaller one: a longer run may go on."""
    epochs = min(saved["recipe"]["epochs"], current["recipe"]["epochs"])
    return {**current, "recipe": {**current["recipe"], "epochs": epochs}}


def changed_fields(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """Names of the fields in which a continued run would compute something else, as `name: saved -> current`.

    An option that either version does not have yet counts at its default, which computes what was computed without it.

    Args:
        saved: the `config.json` of a run.
        current: another such document, which may hold tuples for lists.

    Returns:
        One line a changed field, those of run, recipe and model in turn, each by name.
    """
    known, before = _with_defaults(saved)
    others, now = _with_defaults(current)
    free = {name for name, leaf in (known | others).items() if leaf.option.free_on_resume}
    changed = [name for name in before.keys() | now.keys() if before.get(name) != now.get(name) and name not in free]
    changed.sort(key=lambda name: (PARTS.index(name.split(".")[0]), name.split(".")))
    return [f"{name.partition('.')[2]}: {before.get(name)} -> {now.get(name)}" for name in changed]


def _with_defaults(document: Mapping[str, Any]) -> tuple[dict[str, Leaf], dict[str, Any]]:
    """The fields that this version knows, and the document's values as JSON holds them, with defaults for missing ones.

    Both by name, as "recipe.optim.lr".
    """
    known = flatten(_plain(document["run"]["method"]))
    given = flatten({part: document[part] for part in PARTS})
    values = {name: leaf.value for name, leaf in {**known, **given}.items()}
    plain: dict[str, Any] = json.loads(json.dumps(values))  # tuples become lists, as in the file
    return known, plain


def _plain(method: str) -> Config:
    """The defaults of every field, for one method."""
    _, model = RECIPES[default_recipe(method)][1]()
    # Of the model the class alone counts: a recipe's own values are no defaults.
    return Config(RunConfig(), Recipe(), type(model)())
