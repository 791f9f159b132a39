"""TensorBoard's curves of a run: a copy of its rows, whose loss costs no run."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

FOLDER = "tensorboard"


class Board:
    """Writes scalars to TensorBoard's files until that fails, which is told in one line and ends nothing.

    Args:
        run_dir: folder of the run.
        goes_on_from: step that the run goes on from, behind which curves are drawn anew; None for one that starts over.
    """

    def __init__(self, run_dir: Path, goes_on_from: int | None) -> None:
        self._writer: Any = None
        self._attempt(lambda: self._open(run_dir / FOLDER, goes_on_from))

    def _open(self, folder: Path, goes_on_from: int | None) -> None:
        # Here and not above: it imports for most of a second.
        from torch.utils.tensorboard import SummaryWriter

        if goes_on_from is None:
            # A run that starts over: the curves of the run before it would be drawn through its own.
            shutil.rmtree(folder, ignore_errors=True)
        self._writer = SummaryWriter(str(folder), purge_step=goes_on_from + 1 if goes_on_from else None)

    def add(self, name: str, value: float, step: int) -> None:
        """Append a point to a curve."""
        if self._writer is not None:
            self._attempt(lambda: self._writer.add_scalar(name, value, step))

    def describe(self, config: dict[str, Any]) -> None:
        """Show the configuration of the run beside its curves, under the tab of texts."""
        # Indented by four, as Markdown wants code that holds any sign.
        lines = json.dumps(config, indent=1).splitlines()
        if self._writer is not None:
            self._attempt(lambda: self._writer.add_text("config", "\n".join(f"    {line}" for line in lines)))

    def close(self) -> None:
        """Write what waits, and release the files."""
        if self._writer is not None:
            self._attempt(lambda: self._writer.close())

    def _attempt(self, action: Callable[[], object]) -> None:
        try:
            action()
        except Exception as reason:
            # Its thread writes the files and hands over whatever has ended it: a full disk, a file server that left.
            self._writer = None
            line = f"TensorBoard: {reason}; its curves end here, metrics.jsonl and the report go on"
            print(f"regatta: {' '.join(line.split())}", file=sys.stderr, flush=True)
