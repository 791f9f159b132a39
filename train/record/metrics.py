"""Rows of `metrics.jsonl`, TensorBoard scalars, callbacks, and on the console a bar or a line every few seconds."""

from __future__ import annotations

import datetime
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from train.callbacks import Callback, Listeners, Started
from train.record.board import Board
from train.record.run import CURVES, METRICS
from train.retry import persistently

_CONSOLE_EVERY_S = 5.0


class Metrics:
    """Writes what happened; only rank 0 has one that writes.

    Args:
        run_dir: folder of the run; None writes nothing.
        total_steps: length of the progress bar.
        keep_bytes: `metrics.jsonl` is cut to this length first, so that a continued run repeats no row.
        first_step: where the progress bar and TensorBoard go on.
        steps_per_epoch: steps that the bar counts an epoch by; 0 where it shows none.
        global_batch: images of a step, by which the bar tells images per second.
        callbacks: told every row after it is on the disk.
    """

    def __init__(
        self,
        run_dir: Path | None,
        total_steps: int,
        keep_bytes: int = 0,
        first_step: int = 0,
        steps_per_epoch: int = 0,
        global_batch: int = 1,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        self._start = time.monotonic()
        self._stream = None
        self._board: Board | None = None
        self._bar: tqdm | None = None
        self._last_console = 0.0
        self._first_step, self._total_steps = first_step, total_steps
        self._steps_per_epoch = steps_per_epoch
        self._run_dir = run_dir
        self._listeners = Listeners(callbacks)
        self._told: dict[str, int] = {}
        if run_dir is None:
            return
        path = run_dir / METRICS
        persistently(METRICS, path.touch)
        # Rows past the checkpoint are cut off here; whoever was told them must not take them for new ones.
        self._told = _last_steps(path, keep_bytes) if keep_bytes else {}
        persistently(METRICS, lambda: os.truncate(path, min(keep_bytes, path.stat().st_size)))
        self._stream = persistently(METRICS, lambda: path.open("ab", buffering=0))
        self._board = Board(run_dir, first_step if keep_bytes else None)
        if sys.stderr.isatty():
            # Steps counted as images: the bar's own rate then is what the rows call `images_per_s`.
            self._bar = tqdm(
                total=total_steps,
                initial=first_step,
                unit=" images",
                unit_scale=global_batch,
                dynamic_ncols=True,
            )
            self.at_step(first_step)

    def start(self, config: dict[str, Any]) -> None:
        """Tell TensorBoard and the callbacks that the run starts; `config` is the content of `config.json`."""
        if self._board is not None:
            self._board.describe(config)
        if self._run_dir is not None:
            first, last, per_epoch = self._first_step, self._total_steps, self._steps_per_epoch
            self._listeners.start(Started(self._run_dir, config, first, last, per_epoch, self._told))

    def at_step(self, step: int) -> None:
        """Move the bar to a step that has been taken (on a GPU: queued); called after each, and waits for nothing."""
        if self._bar is None:
            return
        each = self._steps_per_epoch
        if each and (step == self._first_step or (step - 1) % each == 0):
            last = -(-self._total_steps // each)
            self._bar.set_description_str(f"epoch {min(step // each + 1, last)}/{last}", refresh=False)
        # Drawn ten times a second at most, whatever is counted in between.
        self._bar.update(step - self._bar.n)

    def position(self) -> int:
        """Bytes written to `metrics.jsonl` so far."""
        return os.fstat(self._stream.fileno()).st_size if self._stream else 0

    def row(self, kind: str, step: int, epoch: int, **values: Any) -> None:
        """Append one row and show its numbers on TensorBoard."""
        if self._stream is None:
            return
        row = {"kind": kind, "step": step, "epoch": epoch, "time_s": round(time.monotonic() - self._start, 3), **values}
        self._append(json.dumps(row) + "\n")
        for name, value in values.items():
            # Starts, ends and the like are no curves.
            if self._board is not None and isinstance(value, int | float) and kind in CURVES:
                self._board.add(f"{kind}/{name}", value, step)
        self._show(kind, row)
        self._listeners.row(row)

    def _append(self, line: str) -> None:
        assert self._stream is not None
        waiting = memoryview(line.encode())

        def write() -> None:
            # A full disk may take a part of the line: the next attempt goes on behind it.
            nonlocal waiting
            while waiting:
                waiting = waiting[self._stream.write(waiting) :]  # type: ignore[union-attr]

        persistently(METRICS, write)

    def _show(self, kind: str, row: dict[str, Any]) -> None:
        shown = {name: value for name, value in row.items() if name not in ("kind", "step", "epoch", "time_s")}
        text = " ".join(
            f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in shown.items()
        )
        if self._bar is not None and kind == "train":
            self._bar.set_postfix_str(f"loss {row['loss']:.3f}", refresh=False)  # drawn by the next `at_step`
        elif kind != "train" or time.monotonic() - self._last_console > _CONSOLE_EVERY_S:
            if kind == "train":
                self._last_console = time.monotonic()
            place = self._place(row["step"]) if self._bar is None and kind == "train" else ""
            tqdm.write(f"[{kind}] step {row['step']} epoch {row['epoch']} {place}{text}", file=sys.stderr)

    def _place(self, step: int) -> str:
        """How far the run is, for a log that has no bar: share of the steps, time left at the pace so far, clock."""
        # The steps of this process alone: those before a restart took time that its clock has not seen.
        pace = (time.monotonic() - self._start) / max(step - self._first_step, 1)
        left = datetime.timedelta(seconds=round(pace * (self._total_steps - step)))
        return f"({step / self._total_steps:.0%}, {left} left at {time.strftime('%H:%M:%S')}) "

    def close(self, outcome: str = "done") -> None:
        """Flush and release files, and tell the callbacks how the run ended: "done", "stopped" or "failed"."""
        if self._bar is not None:
            self._bar.close()
        if self._stream is not None:
            self._stream.close()
            self._stream = None
            if self._board is not None:
                self._board.close()
            self._listeners.end(outcome)


def _last_steps(path: Path, first_byte: int) -> dict[str, int]:
    """Kind -> last step of the rows behind `first_byte`."""
    last: dict[str, int] = {}
    for line in path.read_bytes()[first_byte:].splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue  # the last one, which a kill cut short
        last[row["kind"]] = max(row["step"], last.get(row["kind"], -1))
    return last
