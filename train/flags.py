"""Command-line flags from nested frozen dataclasses: one flag per leaf field, dots for nesting, one-line errors."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import math
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

from .errors import UserMistake


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One field that a flag sets.

    Attributes:
        path: field names from the root, for example ("region", "sampling").
        annotation: resolved type of the field.
        default: value before flags.
        help: one line from the field's metadata.
        positive: whether 0 and less are refused.
    """

    path: tuple[str, ...]
    annotation: Any
    default: Any
    help: str
    positive: bool = False

    @property
    def flag(self) -> str:
        """The flag as users type it."""
        return "--" + ".".join(self.path).replace("_", "-")


def leaves(config: Any, prefix: tuple[str, ...] = ()) -> list[Leaf]:
    """The leaf fields of a dataclass instance, in order of definition."""
    hints = typing.get_type_hints(type(config))
    found: list[Leaf] = []
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        path = (*prefix, item.name)
        if dataclasses.is_dataclass(value):
            found.extend(leaves(value, path))
        else:
            help, positive = item.metadata.get("help", ""), item.metadata.get("positive", False)
            found.append(Leaf(path, hints[item.name], value, help, positive))
    return found


def replace_leaves(config: Any, values: Mapping[tuple[str, ...], Any]) -> Any:
    """A copy of the dataclass with the leaves at the given paths replaced."""
    changes: dict[str, Any] = {path[0]: value for path, value in values.items() if len(path) == 1}
    nested: dict[str, dict[tuple[str, ...], Any]] = {}
    for path, value in values.items():
        if len(path) > 1:
            nested.setdefault(path[0], {})[path[1:]] = value
    for name, inner in nested.items():
        changes[name] = replace_leaves(getattr(config, name), inner)
    return dataclasses.replace(config, **changes)


def parse_value(text: str, annotation: Any) -> Any:
    """The value that `text` means for a field of this type.

    Raises:
        ValueError: when it means none; the message lists what is accepted.
    """
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        if type(None) in arguments and text.lower() == "none":
            return None
        return parse_value(text, next(a for a in arguments if a is not type(None)))
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
    if not math.isfinite(value):
        raise ValueError(f"give {what}")
    return value


class OneLineParser(argparse.ArgumentParser):
    """Errors are one line that names the nearest valid flag, never a usage block."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing usage."""
        raise UserMistake(message)

    def known_flags(self) -> list[str]:
        """Every flag this parser accepts."""
        return [option for action in self._actions for option in action.option_strings if option.startswith("--")]


def _normalise(argument: str) -> str:
    """Flags may be written with underscores or hyphens; values are left alone."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value


def add_leaf(parser: argparse._ActionsContainer, leaf: Leaf) -> None:
    """One flag for one leaf; a boolean gets a `--no-` form as well."""
    shown = json.dumps(list(leaf.default) if isinstance(leaf.default, tuple) else leaf.default, default=str)
    text = f"{leaf.help} (default: {shown})".strip().replace("%", "%%")
    dest = ".".join(leaf.path)
    if leaf.annotation in (bool, bool | None):
        group = parser.add_mutually_exclusive_group()
        group.add_argument(
            leaf.flag, dest=dest, nargs="?", const="true", metavar="BOOL", default=argparse.SUPPRESS, help=text
        )
        negative = "--" + ".".join((*leaf.path[:-1], "no-" + leaf.path[-1])).replace("_", "-")
        group.add_argument(
            negative, dest=dest, action="store_const", const="false", default=argparse.SUPPRESS, help=argparse.SUPPRESS
        )
        return
    choices = typing.get_args(leaf.annotation) if typing.get_origin(leaf.annotation) is typing.Literal else ()
    metavar = "{" + ",".join(map(str, choices)) + "}" if choices else leaf.path[-1].upper()
    parser.add_argument(leaf.flag, dest=dest, metavar=metavar, default=argparse.SUPPRESS, help=text)


def parse_flags(parser: OneLineParser, argv: Iterable[str], fields: Iterable[Leaf]) -> dict[tuple[str, ...], Any]:
    """The leaves that the command line sets, by path.

    Raises:
        UserMistake: on an unknown flag (with the nearest valid one) or a value that does not fit.
    """
    by_dest = {".".join(leaf.path): leaf for leaf in fields}
    namespace, unknown = parser.parse_known_args([_normalise(argument) for argument in argv])
    if unknown:
        name = unknown[0].partition("=")[0]
        nearest = difflib.get_close_matches(name, parser.known_flags(), n=1, cutoff=0.0)
        kind = "flag" if name.startswith("-") else "argument"
        raise UserMistake(f"unknown {kind} {name}; the nearest valid flag is {nearest[0]}; --help lists all")
    values: dict[tuple[str, ...], Any] = {}
    for dest, text in vars(namespace).items():
        if dest not in by_dest:
            continue  # a flag of the caller's own
        leaf = by_dest[dest]
        try:
            values[leaf.path] = parse_value(text, leaf.annotation)
        except ValueError as reason:
            raise UserMistake(f"{leaf.flag} {text}: {reason}") from None
    return values
