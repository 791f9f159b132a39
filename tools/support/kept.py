"""What a refused packing run has made, kept beside DEST: another `--max-bad` need not decode the images again."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.atomic import remove, replacing

from .packing import Tally
from .source import FilePart, Source

_MADE, _ABOUT = "made", "about.json"


def kept_path(dest: Path) -> Path:
    """The folder beside DEST that holds what was made for it."""
    return dest.with_name(f"{dest.name}.refused")


def identity(source: Source, settings: Mapping[str, Any]) -> str:
    """SHA-256 (hex) that is equal for the same files, labels and settings: sizes and times stand for the bytes."""
    digest = hashlib.sha256(json.dumps([settings, source.classes, source.labels.tolist()]).encode())
    # Members of one tar file share its time, which is asked for once.
    times: dict[str, str] = {}
    for name, place in zip(source.names, source.places, strict=True):
        if isinstance(place, FilePart) and place.path not in times:
            times[place.path] = _time_and_size(place.path)
        state = times[place.path] if isinstance(place, FilePart) else ""
        digest.update(f"{name}\0{place}\0{state}\0".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _time_and_size(path: str) -> str:
    try:
        status = os.stat(path)
    except OSError as error:
        return str(error.errno)
    return f"{status.st_mtime_ns} {status.st_size}"


def keep(dest: Path, key: str, made: Path, tally: Tally, more: Mapping[str, Any]) -> None:
    """Move what was made into the kept folder, with all that is needed to go on.

    Args:
        dest: what the run was to write.
        key: `identity` of the run.
        made: the packed file or folder, whole; it is moved.
        tally: what became of the images.
        more: what else the packer must know, in JSON's types.
    """
    fields = {each.name: getattr(tally, each.name) for each in dataclasses.fields(tally)}
    fields |= {"digests": base64.b64encode(tally.digests).decode(), "passed_over": dict(tally.passed_over)}
    with replacing(kept_path(dest)) as folder:
        folder.mkdir()
        os.rename(made, folder / _MADE)
        (folder / _ABOUT).write_text(json.dumps({"key": key, "tally": fields, "more": dict(more)}))


def take_up(dest: Path, key: str, made: Path) -> tuple[Tally, dict[str, Any]] | None:
    """Move what an equal run has kept to `made`.

    Returns:
        (what became of the images, `more` of `keep`); None where nothing of this run is kept.
    """
    folder = kept_path(dest)
    try:
        about = json.loads((folder / _ABOUT).read_text())
        if about["key"] != key:
            return None
        fields = about["tally"]
        fields |= {
            "digests": bytearray(base64.b64decode(fields["digests"])),
            "rejected": [(name, reason) for name, reason in fields["rejected"]],
        }
        tally = Tally(**fields)
        os.rename(folder / _MADE, made)
    # Whatever is wrong with it, the images can be decoded again.
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return tally, about["more"]


def forget(dest: Path) -> None:
    """Remove what is kept for DEST, if anything is."""
    if (kept_path(dest) / _ABOUT).is_file():
        remove(kept_path(dest))
