"""Keyword arguments as the arguments of a command: Python callers have every option of the command line."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any


def arguments_of(options: Mapping[str, Any]) -> list[str]:
    """The command line that says what keyword arguments say.

    Args:
        options: option -> value. Underscores stand for hyphens. A mapping holds nested options, `optim={"lr": 0.1}` for
            `--optim.lr 0.1`; a list or tuple is written with commas.

    Returns:
        Flags in the `--name=value` form, so that a value that begins with a hyphen is not taken for a flag.
    """
    return [f"--{name.replace('_', '-')}={_text(value)}" for name, value in _flat(options)]


def _flat(options: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in options.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _text(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ",".join(map(_text, value))
    # The command line writes them small.
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return os.fspath(value) if isinstance(value, os.PathLike) else str(value)
