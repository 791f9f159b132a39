"""Packing in parts: which images a part holds, what makes parts one data set, and what is written when all are there.

Parts need no coordinator. Each is packed by a command of its own, on any machine that sees SOURCE and DEST, and each
looks at the end whether it was the last; whoever finds all parts writes the manifest over them, whose bytes do not
depend on who that was. A part that is there already is not packed again, so any command may simply be repeated.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from pipeline.manifest import Manifest
from pipeline.parts import part_of
from pipeline.refusal import ImageRefused
from train.errors import EXIT_BAD_IMAGES

from .kept import identity
from .packing import Tally, next_command
from .source import Source

_SAMPLES = 8
"""Images whose bytes are part of a data set's identity: two folders may have files of equal names."""


@dataclass(frozen=True)
class Part:
    """One of `of` parts; numbers count from 1."""

    number: int
    of: int

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"

    def stretch(self, total: int) -> range:
        """The images of this part, of `total`: the parts in turn have all in their order, each once."""
        return range(total * (self.number - 1) // self.of, total * self.number // self.of)


def read_part(text: str, environment: Mapping[str, str]) -> Part:
    """The part that `--part` names: `2/16`, or `slurm` for the place of this task in its array.

    Raises:
        ValueError: the text is neither, or this is no task of a regular array.
    """
    if text == "slurm":
        return _array_task(environment)
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None:
        raise ValueError(f"--part {text} is not I/N, as 2/16, or slurm for a task of an array job")
    part = Part(int(match[1]), int(match[2]))
    if not 1 <= part.number <= part.of:
        raise ValueError(f"--part {text}: parts are numbered from 1 to {part.of}")
    return part


def _array_task(environment: Mapping[str, str]) -> Part:
    names = ("ID", "COUNT", "MIN", "MAX", "STEP")
    texts = [environment.get(f"SLURM_ARRAY_TASK_{name}") for name in names]
    if texts[0] is None or texts[1] is None:
        raise ValueError(
            "--part slurm: this is no task of an array; submit with sbatch --array=1-N, or give --part I/N"
        )
    # A job of one task has no step in some versions of SLURM.
    task, count, low, high, step = (int(text or texts[0]) if n < 4 else int(text or 1) for n, text in enumerate(texts))
    # Of an array as 1,2,5 nobody could say which part a task is; one of a single task may be a lost part's.
    if high - low != (count - 1) * step or count == 1:
        raise ValueError(
            f"--part slurm: the array has {count} tasks from {low} to {high}, which do not tell the parts; submit all "
            "parts as --array=1-N, and a lost one with --part I/N"
        )
    return Part((task - low) // step + 1, count)


class PartFiles(Protocol):
    """Where the parts of one data set lie, in one of the two formats."""

    of: int
    """Number of parts."""

    def path(self, number: int) -> Path:
        """The file that a part is known by in messages."""

    def where(self) -> str:
        """What `--data` is to be given for all parts."""

    def check(self) -> None:
        """Refuse a DEST that holds something else; raises ValueError."""

    def there(self, number: int) -> bool:
        """Whether a part seems whole, without reading it."""

    def manifest(self, number: int) -> Manifest | None:
        """A part's manifest; None where the part is not there or not whole."""

    def tally(self, number: int, manifest: Manifest) -> Tally:
        """What became of a part's images."""

    def forget_whole(self) -> None:
        """Remove the manifest over the parts: one of them changes."""

    def publish(
        self, tally: Tally, parts: Sequence[Manifest], settings: dict[str, Any], more: Mapping[str, Any]
    ) -> Manifest:
        """Write the manifest over all parts and the list of what was refused."""

    def refuse(self, tally: Tally) -> Path:
        """Write only the list of what was refused; gives its path."""


Write = Callable[[Source, int, int, dict[str, Any]], None]
"""Packs some images as the part of a number, from the image of a number on, with further entries of its manifest."""


def place_part(
    files: PartFiles, part: Part, source: Source, settings: Mapping[str, Any], overwrite: bool, write: Write
) -> None:
    """Pack one part unless it is there.

    Args:
        files: where the parts go.
        part: which one.
        source: all images of the data set.
        settings: of the packer, as its manifest records them.
        overwrite: replace a part that is there.
        write: packs the images of a part.

    Raises:
        ValueError: DEST holds something else, or parts of other images or settings.
    """
    if part.of > len(source):
        raise ValueError(f"{part.of} parts: there are only {len(source)} images; choose at most so many parts")
    files.check()
    whole = whole_identity(source, settings, part.of)
    stretch = part.stretch(len(source))
    mine = source.taken(stretch)
    key = identity(mine, settings)
    before = files.manifest(part.number)
    if not overwrite:
        _refuse_others(files, part, whole)
    if before is not None and before.details.get("key") == key and not overwrite:
        print(f"{files.path(part.number)} is packed already")
        return
    if before is not None and not overwrite:
        raise ValueError(f"{files.path(part.number)} was packed from files that have changed; add --overwrite")
    if before is not None:
        files.forget_whole()
    place = {"number": part.number, "of": part.of, "whole": whole}
    write(mine, part.number, stretch.start, {"part": place, "key": key})


def whole_identity(source: Source, settings: Mapping[str, Any], of: int) -> str:
    """SHA-256 (hex) that the parts of one data set share: names, classes, settings, and the bytes of some images.

    Sizes and times of all files stand for nothing here: to ask for them in every part would cost a file server more
    than the packing.
    """
    digest = hashlib.sha256(json.dumps([of, dict(settings), source.classes, source.labels.tolist()]).encode())
    digest.update("\0".join(source.names).encode("utf-8", "surrogateescape"))
    for index in np.unique(np.linspace(0, len(source) - 1, _SAMPLES).astype(int)).tolist():
        try:
            digest.update(hashlib.sha256(source.read(index)).digest())
        except ImageRefused as refusal:
            digest.update(str(refusal).encode())
    return digest.hexdigest()


def _refuse_others(files: PartFiles, part: Part, whole: str) -> None:
    """Refuse a part beside parts of another data set; one that is there stands for all of them.

    Raises:
        ValueError: the part that was found is of other images or settings.
    """
    for number in (part.number, *range(1, part.of + 1)):
        manifest = files.manifest(number)
        if manifest is not None:
            place = part_of(manifest.details)
            if place is None or place.whole != whole:
                raise ValueError(
                    f"{files.path(number)} is a part of other images or settings than these; choose another DEST, or "
                    "add --overwrite to the command of every part"
                )
            return


def finish(files: PartFiles, source: Source, settings: Mapping[str, Any], max_bad: float | None) -> int:
    """Write the manifest over all parts if they are there, and say how far the data set is.

    Args:
        files: where the parts are.
        source: all images of the data set.
        settings: of the packer.
        max_bad: share of refused images that the whole data set may have; None is the default.

    Returns:
        The exit code.

    Raises:
        ValueError: not one image could be used.
    """
    numbers = range(1, files.of + 1)
    parts: list[Manifest | None] = []
    # Names first: while many parts are packed, each would otherwise read the manifests of all others.
    if all(files.there(number) for number in numbers):
        parts = [files.manifest(number) for number in numbers]
    missing = [number for number in numbers if not files.there(number) or (parts and parts[number - 1] is None)]
    whole = whole_identity(source, settings, files.of)
    # While every part is packed anew with --overwrite, old ones are still among them.
    old = [number for number, manifest in enumerate(parts, 1) if not _belongs(manifest, whole)]
    if missing or old:
        lack, what = (missing[0], "missing") if missing else (old[0], "of other images or settings")
        print(f"{files.of - len(missing or old)} of {files.of} parts are packed; part {lack} is {what}")
        return 0
    return _publish(files, [each for each in parts if each is not None], whole, len(source), settings, max_bad)


def _belongs(manifest: Manifest | None, whole: str) -> bool:
    place = None if manifest is None else part_of(manifest.details)
    return place is not None and place.whole == whole


def _publish(
    files: PartFiles,
    parts: list[Manifest],
    whole: str,
    total: int,
    settings: Mapping[str, Any],
    max_bad: float | None,
) -> int:
    tally = _joined([files.tally(number, manifest) for number, manifest in enumerate(parts, 1)])
    problem = tally.too_many(total, max_bad)
    if problem is not None:
        # The parts stay: the same command with another limit finds them packed.
        print(f"{problem}; all are listed in {files.refuse(tally)}", file=sys.stderr)
        return EXIT_BAD_IMAGES
    if not tally.sources:
        raise ValueError(f"not one image can be used; the first: {tally.rejected[0]}")
    rows = [
        {"number": number, "images": part.num_samples, "fingerprint": part.fingerprint}
        for number, part in enumerate(parts, 1)
    ]
    manifest = files.publish(tally, parts, dict(settings), {"whole": whole, "parts": rows})
    print(
        f"all {files.of} parts are packed: {len(tally.sources)} images, {len(tally.rejected)} refused; "
        f"{tally.passed_over_words()}data hash {manifest.data_hash[:12]}"
    )
    print(next_command(files.where(), len(tally.sources)))
    return 0


def _joined(tallies: Sequence[Tally]) -> Tally:
    """What became of all images, in the order of the parts."""
    # Each part has looked through the whole source, so each counts all that is no image.
    whole = Tally(passed_over=tallies[0].passed_over)
    for each in tallies:
        whole.sources += each.sources
        whole.labels += each.labels
        whole.checksums += each.checksums
        whole.digests += each.digests
        whole.kept += each.kept
        whole.rejected += each.rejected
    return whole


def digests_entry(tally: Tally) -> dict[str, str]:
    """The entry of a part's manifest from which the hash of the whole is made."""
    return {"sha256": base64.b64encode(tally.digests).decode("ascii")}


def tally_of(manifest: Manifest, labels: Sequence[int], rejected: Path) -> Tally:
    """What became of a part's images, from what was written about them.

    Raises:
        ValueError: it is damaged.
        OSError: the list of refused files is not there.
    """
    try:
        details = manifest.details
        lines = [json.loads(line) for line in rejected.read_text(encoding="utf-8").splitlines()]
        return Tally(
            list(manifest.sources),
            list(labels),
            manifest.checksums.tolist(),
            bytearray(base64.b64decode(details["sha256"])),
            details["stored_as_they_were"],
            [(line["file"], line["reason"]) for line in lines],
            details["passed_over"],
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"what is written about a part beside {rejected} is damaged; pack it again") from error
