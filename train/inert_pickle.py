"""Read a pickled checkpoint without running what it names: tensors, plain values, and inert objects for the rest."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch.serialization import safe_globals

_MOST_NAMES = 200  # a Lightning checkpoint with its configuration names some dozens
_REFUSED = re.compile(r"Unsupported global: GLOBAL ([\w.]+)")
_FILLED = re.compile(r"Can only (append|extend|SETITEMS?)\b.* got <class '[\w.]*\.(Inert_\d+)'>")


class Inert:
    """Stands for an object of a class that the file names: takes whatever unpickling gives it, and keeps nothing."""

    named = ""
    """The class or function as the file names it."""

    content: type[list[Any]] | type[dict[Any, Any]] | None = None
    """What an object is made as instead where the named class is a list or a dict of its own kind."""

    def __new__(cls, *arguments: Any, **keywords: Any) -> Any:
        """An object without content, whatever it is called with."""
        # PyTorch fills plain lists and dicts alone.
        return super().__new__(cls) if cls.content is None else cls.content()

    def __init__(self, *arguments: Any, **keywords: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


def load_inert(path: Path) -> Any:
    """What `torch.load` gives with `weights_only=True`, an `Inert` object in the place of every other one.

    Only the names that PyTorch allows are ever looked up. Every name that it refuses, such as a Namespace of arguments
    or a configuration, gets an empty class, and the file is read anew.

    Raises:
        Exception: whatever `torch.load` raises: for a damaged file, for a name of a module that PyTorch blocks, such as
            `os`, and for what no inert class can stand for.
    """
    stand_ins: dict[str, type[Inert]] = {}
    while True:
        try:
            with safe_globals(_allowed(stand_ins)):
                return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as reason:  # raised anew unless it is the refusal of a name
            if not _learn(str(reason), stand_ins):
                raise


def _allowed(stand_ins: dict[str, type[Inert]]) -> list[Any]:
    """Pairs of a stand-in and a name; PyTorch's messages leave out the module of a built-in name."""
    return [
        (kind, f"{module}{name}") for name, kind in stand_ins.items() for module in ("", "builtins.", "__builtin__.")
    ]


def _learn(message: str, stand_ins: dict[str, type[Inert]]) -> bool:
    """Add or change the stand-in that a refusal asks for; False where none would help, so that reading ends."""
    refused, filled = _REFUSED.search(message), _FILLED.search(message)
    if refused and refused[1] not in stand_ins and len(stand_ins) < _MOST_NAMES:
        # A class of its own for each name: the message about filling one tells which.
        stand_ins[refused[1]] = type(f"Inert_{len(stand_ins)}", (Inert,), {"named": refused[1]})
        return True
    kind = next((kind for kind in stand_ins.values() if filled and kind.__name__ == filled[2]), None)
    if filled is None or kind is None or kind.content is not None:
        return False
    kind.content = dict if filled[1].startswith("SETITEM") else list
    return True
