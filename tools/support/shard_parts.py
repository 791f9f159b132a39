"""Where the parts of a set of shards lie: all in one folder, each part with an index of its own shards."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.atomic import remove, sync, write_atomically
from pipeline.manifest import Manifest, read_manifest
from pipeline.parts import part_name
from pipeline.shards import INDEX_NAME, column, fingerprint, join_columns

from .packing import Tally
from .parts import tally_of

_PART = re.compile(r"part-\d+-of-(\d+)\.json")


class ShardParts:
    """The parts of DEST_DIR: shards `shard-2-of-3-000000.tar`, ... and `part-2-of-3.json`; see `parts.PartFiles`.

    `index.json` over all shards is written when the last part is there. It makes the folder one set of shards, for our
    loader and for others.
    """

    def __init__(self, dest: Path, of: int):
        self.dest, self.of = dest, of

    def path(self, number: int) -> Path:
        """The index of a part."""
        return self.dest / f"{part_name('part', number, self.of)}.json"

    def rejected(self, number: int) -> Path:
        """The list of a part's refused files."""
        return self.path(number).with_suffix(".rejected.jsonl")

    def prefix(self, number: int) -> str:
        """How the names of a part's shards begin."""
        return part_name("shard", number, self.of)

    def where(self) -> str:
        """The folder."""
        return str(self.dest)

    def check(self) -> None:
        """Refuse a folder that holds anything but parts of this division.

        Raises:
            ValueError: naming what is there.
        """
        if self.dest.exists() and not self.dest.is_dir():
            raise ValueError(f"{self.dest} is a file; choose another DEST_DIR")
        names = [path.name for path in self.dest.iterdir() if path.name[0] != "."] if self.dest.is_dir() else []
        others = {match[1] for name in names if (match := _PART.fullmatch(name))} - {str(self.of)}
        if others:
            raise ValueError(
                f"{self.dest} holds parts of {others.pop()}, not of {self.of}; remove them or choose another DEST_DIR"
            )
        # Shards of a part that was killed while it put them in place have no index yet.
        parts = re.compile(rf"(part|shard)-\d+-of-{self.of}\b.*")
        strange = next((name for name in sorted(names) if name != INDEX_NAME and not parts.fullmatch(name)), None)
        if strange is not None:
            raise ValueError(f"{self.dest} holds {strange}, which is no part of these shards; choose another DEST_DIR")

    def there(self, number: int) -> bool:
        """Whether a part has its index, which is written last."""
        return self.path(number).exists()

    def manifest(self, number: int) -> Manifest | None:
        """A part's index; None where it or one of its shards is not there or not whole."""
        try:
            manifest = read_manifest(self.path(number))
            for shard in manifest.details["shards"]:
                if (self.dest / shard["name"]).stat().st_size != shard["bytes"]:
                    return None
        # Missing, cut or damaged: in each case the part is to be packed again.
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return manifest

    def tally(self, number: int, manifest: Manifest) -> Tally:
        """What became of a part's images."""
        return tally_of(manifest, column(manifest.details["labels"]).tolist(), self.rejected(number))

    def forget_whole(self) -> None:
        """Remove the index over the parts."""
        remove(self.dest / INDEX_NAME)

    def put(self, made: Path, number: int, manifest: Manifest, rejected: str) -> None:
        """Move a part's finished shards into the folder and write its index, which makes it a part that is there.

        Args:
            made: a folder beside them with the shards.
            number: of the part.
            manifest: its index.
            rejected: text of the list of refused files.
        """
        remove(self.path(number))
        # Of an earlier packing there may be more shards than now.
        for old in self.dest.glob(f"{self.prefix(number)}-*.tar"):
            remove(old)
        for shard in sorted(made.iterdir()):
            shutil.move(shard, self.dest / shard.name)
        sync(self.dest)
        write_atomically(self.rejected(number), rejected.encode())
        write_atomically(self.path(number), manifest.to_json().encode())

    def publish(
        self, tally: Tally, parts: Sequence[Manifest], settings: dict[str, Any], more: Mapping[str, Any]
    ) -> Manifest:
        """Write index.json over the shards of all parts, and the list of what was refused."""
        self.refuse(tally)
        shards = join_columns([part.details for part in parts])
        manifest = tally.manifest(fingerprint(shards), parts[0].classes, settings, more)
        whole = replace(manifest, details={**manifest.details, **shards})
        write_atomically(self.dest / INDEX_NAME, whole.to_json().encode())
        return manifest

    def refuse(self, tally: Tally) -> Path:
        """Write the list of refused files beside the folder."""
        path = self.dest.with_name(f"{self.dest.name}.rejected.jsonl")
        write_atomically(path, tally.rejected_lines().encode())
        return path
