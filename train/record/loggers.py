"""Rows of a run in W&B, MLflow and Trackio, by their own libraries: they get what its own file of rows gets.

Where they send it is theirs to know: WANDB_PROJECT, WANDB_MODE, MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME,
TRACKIO_PROJECT, TRACKIO_SPACE_ID and so on. Without them the project is "regatta".
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline.atomic import write_atomically
from train.callbacks import Callback, Row, Started
from train.fields import flatten

NOTE = "loggers.json"
"""File in a run's folder that says in which run of each service it is."""
PROJECT = "regatta"
END_S = 60.0
"""Seconds that a logger has at the end for rows that it has not delivered yet."""
_MLFLOW_MOST = 100  # parameters or metrics of one call, by its own limit
_MLFLOW_VALUE = 500  # characters of a parameter that its oldest servers take


def numbers(row: Row) -> dict[str, float]:
    """The figures of a row by the names that TensorBoard shows as well, such as "train/loss"."""
    given = {name: value for name, value in row.items() if name not in ("kind", "step", "time_s")}
    return {f"{row['kind']}/{name}": value for name, value in given.items() if isinstance(value, int | float)}


class Note:
    """What a run's folder remembers of its loggers, by their names.

    Args:
        run_dir: folder of the run.
    """

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / NOTE

    def read(self, name: str) -> dict[str, Any]:
        """What is known of a logger; empty where the file is missing or damaged, and then a new external run begins."""
        try:
            known = json.loads(self._path.read_text())[name]
        except (OSError, ValueError, KeyError, TypeError):
            return {}
        return known if isinstance(known, dict) else {}

    def write(self, name: str, known: Mapping[str, Any]) -> None:
        """Remember what is known of a logger beside the others."""
        others: dict[str, Any] = {}
        with contextlib.suppress(OSError, ValueError):
            others = json.loads(self._path.read_text())
        write_atomically(self._path, json.dumps({**others, name: dict(known)}, indent=1).encode())


class Logger(Callback):
    """Finds the external run that goes on, and leaves out rows that it has; the three services are derived from it."""

    name = ""

    def __init__(self) -> None:
        self._told: dict[str, int] = {}

    def __str__(self) -> str:
        return f"--log {self.name}"

    def on_start(self, run: Started) -> None:
        """Open the external run: that of the run's folder where this one goes on, else a new one."""
        note = Note(run.run_dir)
        # A run that starts over is another run, whose curves must not be drawn through those of the one before.
        known = note.read(self.name) if run.first_step else {}
        before = known.get("told", {})
        self._told = {kind: max(before.get(kind, -1), run.told.get(kind, -1)) for kind in {*before, *run.told}}
        identity = self.open(run, known.get("id"))
        note.write(self.name, {"id": identity, "told": self._told})

    def on_row(self, row: Row) -> None:
        """Send a row's figures, unless an earlier start has sent them: after a kill some steps are taken again."""
        if row["step"] > self._told.get(row["kind"], -1):
            self.send(numbers(row), row["step"])

    def on_end(self, outcome: str) -> None:
        """Close the external run."""
        self.close(outcome)

    def open(self, run: Started, identity: str | None) -> str:
        """Open the external run of this name, or a new one; returns its name."""
        raise NotImplementedError

    def send(self, figures: dict[str, float], step: int) -> None:
        """Send figures of a step."""
        raise NotImplementedError

    def close(self, outcome: str) -> None:
        """Close the external run."""
        raise NotImplementedError


class Wandb(Logger):
    """Weights & Biases."""

    name = "wandb"

    def open(self, run: Started, identity: str | None) -> str:
        """A run of the project in WANDB_PROJECT."""
        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=run.run_dir.name,
            id=identity,
            resume="allow" if identity else None,
            dir=str(run.run_dir),
            config=dict(run.config),
        )
        return str(self._run.id)

    def send(self, figures: dict[str, float], step: int) -> None:
        """Rows of one step are joined by its library."""
        self._run.log(figures, step=step)

    def close(self, outcome: str) -> None:
        """Waits until all is sent, or written where it is offline."""
        self._run.finish(exit_code=1 if outcome == "failed" else 0)


class Mlflow(Logger):
    """MLflow, by its client: no state of the process, which a caller may use for runs of its own."""

    name = "mlflow"

    def open(self, run: Started, identity: str | None) -> str:
        """A run of the experiment in MLFLOW_EXPERIMENT_NAME."""
        from mlflow.entities import Param
        from mlflow.tracking import MlflowClient

        self._client = MlflowClient()
        if identity:
            self._client.update_run(identity, status="RUNNING")
            self._id = identity
            return identity
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        experiment = self._client.get_experiment_by_name(name)
        home = experiment.experiment_id if experiment else self._client.create_experiment(name)
        self._id = self._client.create_run(home, run_name=run.run_dir.name).info.run_id
        settings = flatten({part: run.config[part] for part in ("run", "recipe", "model") if part in run.config})
        params = [Param(name, str(leaf.value)[:_MLFLOW_VALUE]) for name, leaf in settings.items()]
        for first in range(0, len(params), _MLFLOW_MOST):
            self._client.log_batch(self._id, params=params[first : first + _MLFLOW_MOST])
        return str(self._id)

    def send(self, figures: dict[str, float], step: int) -> None:
        """One call a row."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._client.log_batch(self._id, [Metric(name, float(value), now, step) for name, value in figures.items()])

    def close(self, outcome: str) -> None:
        """With the status that its page shows."""
        self._client.set_terminated(self._id, {"done": "FINISHED", "stopped": "KILLED"}.get(outcome, "FAILED"))


class Trackio(Logger):
    """Trackio."""

    name = "trackio"

    def open(self, run: Started, identity: str | None) -> str:
        """A run of the project in TRACKIO_PROJECT; its name is what it is found by again."""
        import trackio

        name = identity or f"{run.run_dir.name}-{uuid.uuid4().hex[:8]}"
        project = os.environ.get("TRACKIO_PROJECT", PROJECT)
        resume = "must" if identity else "never"
        self._run = trackio.init(project, name, config=dict(run.config), resume=resume, embed=False)
        return name

    def send(self, figures: dict[str, float], step: int) -> None:
        """Its library collects rows and writes them from a thread of its own."""
        self._run.log(figures, step=step)

    def close(self, outcome: str) -> None:
        """Waits until all is written."""
        self._run.finish()


LOGGERS: dict[str, type[Logger]] = {each.name: each for each in (Wandb, Mlflow, Trackio)}


class Background(Callback):
    """Tells a callback its rows from a thread, so that no step waits for a slow server.

    Args:
        callback: told of start and end here, of rows in the thread.
    """

    def __init__(self, callback: Callback) -> None:
        self._callback = callback
        self._rows: queue.SimpleQueue[Row | None] = queue.SimpleQueue()
        self._failed: Exception | None = None
        self._thread = threading.Thread(target=self._deliver, name=f"regatta-{callback}", daemon=True)

    def __str__(self) -> str:
        return str(self._callback)

    def on_start(self, run: Started) -> None:
        """Here, not in the thread: a service may have to ask or to say something."""
        self._callback.on_start(run)
        self._thread.start()

    def on_row(self, row: Row) -> None:
        """Put a row into the queue.

        Raises:
            what the callback raised at an earlier row.
        """
        if self._failed is not None:
            raise self._failed
        self._rows.put(row)

    def on_end(self, outcome: str) -> None:
        """Wait until all rows are delivered, for `END_S` at most.

        Raises:
            TimeoutError: they are not.
        """
        self._rows.put(None)
        self._thread.join(END_S)
        if self._failed is not None:
            raise self._failed
        if self._thread.is_alive():
            raise TimeoutError(f"not all rows were delivered within {END_S:g} s; those in the run's folder are whole")
        self._callback.on_end(outcome)

    def _deliver(self) -> None:
        for row in self._waiting():
            try:
                self._callback.on_row(row)
            except Exception as reason:
                self._failed = reason
                return

    def _waiting(self) -> Iterator[Row]:
        while (row := self._rows.get()) is not None:
            yield row
