"""How the long forms tell what they have found."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def publish(lines: Sequence[str], path: Path | None) -> None:
    """Print a report, and write it where a path is given."""
    text = "\n".join(lines)
    print(text)
    if path is not None:
        path.write_text(f"{text}\n")
