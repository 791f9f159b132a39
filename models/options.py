"""Fields of configuration dataclasses that carry their own help line."""

from __future__ import annotations

from dataclasses import field
from typing import Any


def option(default: Any, help: str) -> Any:
    """A dataclass field with a default and the line that `--help` shows for its flag."""
    return field(default=default, metadata={"help": help})
