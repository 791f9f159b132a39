"""Fields of configuration dataclasses that carry their own help line."""

from __future__ import annotations

from dataclasses import field
from typing import Any


def option(default: Any, help: str, *, positive: bool = False) -> Any:
    """A dataclass field: default, the line that `--help` shows for its flag, and whether 0 and less are refused."""
    return field(default=default, metadata={"help": help, "positive": positive})
