"""Configuration as flat fields and back: the one walk over nested dataclasses, and over their JSON documents.

A field's name is its path with dots, for example "region.sampling". Flags, `config.json`, the comparison of two runs
and the check of bounds all work on such flat fields.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from models.options import Option

from .errors import UserMistake

_PLAIN = Option()
Nested = TypeVar("Nested")


@dataclass(frozen=True)
class Leaf:
    """One field that holds a value.

    Attributes:
        name: path from the root with dots, for example "region.sampling".
        value: what it holds.
        annotation: resolved type of the field; None for a field of a JSON document.
        option: help line, bounds and choices; without any for a field of a JSON document.
    """

    name: str
    value: Any
    annotation: Any = None
    option: Option = _PLAIN

    @property
    def flag(self) -> str:
        """The flag as users type it."""
        return "--" + self.name.replace("_", "-")


def _children(tree: Any) -> Iterator[Leaf]:
    if isinstance(tree, Mapping):
        yield from (Leaf(str(name), value) for name, value in tree.items())
        return
    # Annotations are text under `from __future__ import annotations`; this resolves them.
    hints = typing.get_type_hints(type(tree))
    for each in dataclasses.fields(tree):
        yield Leaf(each.name, getattr(tree, each.name), hints[each.name], each.metadata.get("option", _PLAIN))


def flatten(tree: Any, prefix: str = "") -> dict[str, Leaf]:
    """The leaves of a dataclass instance, or of a nested mapping such as a `config.json`, by name.

    Args:
        tree: the dataclass instance or mapping; those inside it are walked, lists and tuples are values.
        prefix: put before every name, with its dot.

    Returns:
        Name -> leaf, in order of definition.
    """
    found: dict[str, Leaf] = {}
    for child in _children(tree):
        name = prefix + child.name
        # By value, not by type: a JSON document has no types.
        if dataclasses.is_dataclass(child.value) or isinstance(child.value, Mapping):
            found |= flatten(child.value, name + ".")
        else:
            found[name] = dataclasses.replace(child, name=name)
    return found


def unflatten(default: Nested, values: Mapping[str, Any]) -> Nested:
    """A copy of a nested dataclass with the leaves of these names replaced.

    Raises:
        KeyError: a name that `flatten(default)` does not have.
    """
    changes: dict[str, Any] = {}
    nested: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        head, _, rest = name.partition(".")
        # `replace` would raise a TypeError that names no path.
        if not hasattr(default, head):
            raise KeyError(name)
        if rest:
            nested.setdefault(head, {})[rest] = value
        else:
            changes[head] = value
    # Inner fields in one go: each call makes a new frozen instance.
    changes |= {head: unflatten(getattr(default, head), inner) for head, inner in nested.items()}
    return dataclasses.replace(default, **changes)  # type: ignore[type-var]


def check(config: Any, prefix: str = "") -> None:
    """Refuse a value outside the bounds or choices of its field: the one place where they are looked at.

    Args:
        config: a configuration dataclass.
        prefix: put before each name in the message, with its dot, where `config` is a part of what has the flags.

    Raises:
        UserMistake: naming the flag, its value and what is allowed.
    """
    for leaf in flatten(config, prefix).values():
        problem = _type_problem(leaf) or leaf.option.problem(leaf.value)
        if problem:
            raise UserMistake(f"{leaf.flag} {problem}")


def _type_problem(leaf: Leaf) -> str:
    """The problem of a value's type, empty for none; files and Python callers need this, the flag parser checked it."""
    arguments = typing.get_args(leaf.annotation)
    origin = typing.get_origin(leaf.annotation)
    if origin is typing.Literal:
        return Option(choices=arguments).problem(leaf.value)
    words = [word for each in arguments if typing.get_origin(each) is typing.Literal for word in typing.get_args(each)]
    if words and isinstance(leaf.value, str) and leaf.value not in words:
        return f"{leaf.value}: give a number or {', '.join(words)}"
    if origin is tuple and Ellipsis not in arguments and len(leaf.value) != len(arguments):
        count = {2: "two"}.get(len(arguments), str(len(arguments)))
        return f"{','.join(map(str, leaf.value))}: must be {count} numbers, apart by commas"
    return ""
