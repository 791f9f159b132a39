"""Packed files that are parts of one data set: how they are named, which belong together, whether all are there.

A packer that was given `--part 2/3` writes `photos-2-of-3.beton`, with a manifest of its own that says of which data
set it is a part. When the last part is packed, `photos.manifest.json` is written: the manifest of the whole, with the
order, hash and checksums that one packed file of the same images would have. The parts are read as that one file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .endings import PACKED
from .manifest import Manifest, manifest_path, read_manifest

_NAME = re.compile(r"-(\d+)-of-(\d+)(?=\.|$)")


@dataclass(frozen=True)
class PartOf:
    """What a part's manifest says of its place.

    Attributes:
        number: from 1.
        of: number of parts.
        whole: hash that all parts of one data set share, and no part of another.
    """

    number: int
    of: int
    whole: str


@dataclass(frozen=True)
class Whole:
    """What is read as one packed file: a file alone, or all parts of a data set in their order.

    Attributes:
        paths: the files.
        manifest: of all parts; None for a file alone, whose own manifest, if any, lies beside it.
    """

    paths: tuple[str, ...]
    manifest: Manifest | None = None


def part_name(stem: str, number: int, of: int) -> str:
    """`photos` -> `photos-02-of-16`; numbers have equal widths, so that a listing shows the parts in their order."""
    return f"{stem}-{number:0{len(str(of))}d}-of-{of}"


def whole_path(part: str | Path) -> Path:
    """The packed file that a part's name belongs to: `photos.beton` for `photos-2-of-3.beton`."""
    path = Path(part)
    return path.with_name(_NAME.sub("", path.name))


def part_of(details: Mapping[str, Any]) -> PartOf | None:
    """The place that a manifest's details name; None for a store that is no part.

    Raises:
        ValueError: the entry is damaged.
    """
    fields = details.get("part")
    if fields is None:
        return None
    try:
        return PartOf(int(fields["number"]), int(fields["of"]), str(fields["whole"]))
    except (KeyError, TypeError) as error:
        raise ValueError("the manifest of a packed part is damaged; pack the part again") from error


def arranged(paths: Sequence[str]) -> list[Whole]:
    """Packed files and other data, with the parts of each data set gathered in their order.

    Args:
        paths: what `--data` names, in its order. Whatever is no packed part stays alone.

    Returns:
        A data set in parts stands where its first part was named.

    Raises:
        ValueError: a part is missing, is there twice, or was packed anew without the others.
    """
    found: dict[str, list[tuple[PartOf, str, Manifest]]] = {}
    order: list[str | Whole] = []
    for path in paths:
        manifest = _manifest_of(path)
        part = None if manifest is None else part_of(manifest.details)
        if manifest is None or part is None:
            order.append(Whole((path,)))
            continue
        if part.whole not in found:
            order.append(part.whole)
        found.setdefault(part.whole, []).append((part, path, manifest))
    complete = {whole: _complete(members, len(found)) for whole, members in found.items()}
    return [complete[each] if isinstance(each, str) else each for each in order]


def _manifest_of(path: str) -> Manifest | None:
    beside = manifest_path(path)
    return read_manifest(beside) if path.endswith(PACKED) and beside.exists() else None


def _complete(members: list[tuple[PartOf, str, Manifest]], sets: int) -> Whole:
    """All parts of one data set.

    Raises:
        ValueError: as `arranged`.
    """
    by_number: dict[int, tuple[str, Manifest]] = {}
    for part, path, manifest in members:
        if part.number in by_number:
            raise ValueError(
                f"{by_number[part.number][0]} and {path} are both part {part.number} of {part.of} of one data set; "
                "name each part once"
            )
        by_number[part.number] = path, manifest
    first, path, _ = members[0]
    whole = whole_path(path)
    manifest = _manifest_of_all(whole, first)
    # A part all of whose images were refused has no packed file.
    prints = {row["number"]: row["fingerprint"] for row in manifest.details["parts"] if row["images"]}
    wanted = list(prints)
    missing = [number for number in wanted if number not in by_number]
    if missing:
        pattern = f"{whole.with_suffix('')}-*-of-{first.of}{PACKED}"
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        other = " (parts of another data set, of other images or settings, do not stand for it)" if sets > 1 else ""
        raise ValueError(
            f"{path} is part {first.number} of {first.of}, and part {missing[0]}{more} is missing{other}; give all of "
            f"them as --data '{pattern}', or pack a lost one again by its command with --part {missing[0]}/{first.of}"
        )
    for number, fingerprint in prints.items():
        # Packed anew, perhaps from files that have changed since: the hash of the whole would not be that of its bytes.
        if by_number[number][1].fingerprint != fingerprint:
            raise ValueError(
                f"{by_number[number][0]} is not the file that {manifest_path(whole)} describes; repeat the packer's "
                f"command with --part {number}/{first.of}"
            )
    return Whole(tuple(by_number[number][0] for number in wanted), manifest)


def _manifest_of_all(whole: Path, part: PartOf) -> Manifest:
    """The manifest over the parts.

    Raises:
        ValueError: it is not there, or is of another data set.
    """
    path = manifest_path(whole)
    manifest = read_manifest(path) if path.exists() else None
    if manifest is None or manifest.details.get("whole") != part.whole:
        raise ValueError(
            f"{path}, which the packer writes when all {part.of} parts are there, is "
            f"{'missing' if manifest is None else 'of another data set'}; pack the parts that lack, or repeat the "
            f"command of one, as with --part {part.number}/{part.of}, which then packs nothing again"
        )
    return manifest


def divided_into(folder: Path) -> int:
    """Into how many parts the shards of a folder were divided; 0 where they were not."""
    found = (_NAME.search(path.name) for path in folder.glob("part-*-of-*.json"))
    return next((int(match[2]) for match in found if match), 0)
