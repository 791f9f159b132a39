"""What is kept of the first steps of a run that were not finite, so that `tools/replay.py` can take them again.

Batches, augmentations and regions are functions of seed and step: a checkpoint from before the steps and their numbers
are all that it takes.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from pipeline.atomic import remove, replacing

from .checkpoint import step_of, steps_on_disk
from .errors import UserMistake

FOLDER, _FILE = "replay", "non_finite.json"


@dataclass(frozen=True)
class Skipped:
    """Where the first bad step of a run is.

    Attributes:
        first: 0-based number of the first step that may be it.
        last: of the last one; the host of a GPU learns of it with the next row only.
    """

    first: int
    last: int


def keep(run_dir: Path, skipped: Skipped) -> None:
    """Write `replay/` in a run's folder, unless an earlier bad step has one; on the rank that writes files.

    The checkpoint in it shares its bytes with the run's own, so that it costs no room until that one is dropped. What
    the disk refuses is left out: a run that goes on is worth more than its replay.
    """
    final = run_dir / FOLDER
    if final.exists():
        return
    try:
        with replacing(final) as folder:
            (folder / "checkpoints").mkdir(parents=True)
            (folder / _FILE).write_text(json.dumps(asdict(skipped)))
            _link_newest(run_dir / "checkpoints", folder / "checkpoints", skipped.first)
    except OSError as reason:
        print(f"regatta: the bad step's replay could not be kept: {reason}", flush=True)
        remove(final)


def _link_newest(source: Path, target: Path, step: int) -> None:
    """Link the newest checkpoint of at most this step; without one a replay begins with the run itself."""
    saved = next((folder for folder in steps_on_disk(source) if step_of(folder) <= step), None)
    if saved is not None:
        (target / saved.name).mkdir()
        for file in saved.iterdir():
            os.link(file, target / saved.name / file.name)


def read(run_dir: Path) -> Skipped:
    """What `keep` wrote.

    Raises:
        UserMistake: there is nothing to replay in this folder, or the file is damaged.
    """
    path = run_dir / FOLDER / _FILE
    try:
        return Skipped(**json.loads(path.read_text()))
    except FileNotFoundError:
        raise UserMistake(
            f"{run_dir} holds no {FOLDER}/{_FILE}: no step of this run was skipped; give another run"
        ) from None
    except (OSError, ValueError, TypeError) as reason:
        raise UserMistake(f"{path} is damaged: {reason}; start the run again from the checkpoint before") from None
