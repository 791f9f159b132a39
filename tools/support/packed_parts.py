"""Where the parts of a packed file lie: `photos-2-of-3.beton` with its manifest and its list of refused files."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.atomic import remove, write_atomically
from pipeline.beton import BetonReader
from pipeline.manifest import Manifest, manifest_path, read_manifest, rejected_path
from pipeline.parts import part_name

from .packing import Tally
from .parts import tally_of


class PackedParts:
    """The parts of DEST.beton, which itself is never written; see `parts.PartFiles`."""

    def __init__(self, dest: Path, of: int):
        self.dest, self.of = dest, of

    def path(self, number: int) -> Path:
        """The packed file of a part."""
        return self.dest.with_name(part_name(self.dest.stem, number, self.of) + ".beton")

    def where(self) -> str:
        """The pattern that all packed files of the parts fit."""
        return str(self.dest.with_name(f"{self.dest.stem}-*-of-{self.of}.beton"))

    def check(self) -> None:
        """Refuse a DEST that is packed as one file, or in another number of parts.

        Raises:
            ValueError: naming what is there.
        """
        if self.dest.exists():
            raise ValueError(f"{self.dest} is there already, as one file; choose another DEST for the parts")
        other = re.compile(re.escape(self.dest.stem) + r"-\d+-of-(\d+)\.beton")
        for path in sorted(self.dest.parent.glob("*.beton")):
            match = other.fullmatch(path.name)
            if match is not None and int(match[1]) != self.of:
                raise ValueError(
                    f"{path} is one of {match[1]} parts, not of {self.of}; remove them or choose another DEST (a lost "
                    f"part is packed again with --part I/{match[1]})"
                )

    def there(self, number: int) -> bool:
        """Whether a part has its manifest, which gets its name last."""
        return manifest_path(self.path(number)).exists()

    def manifest(self, number: int) -> Manifest | None:
        """A part's manifest; None where it or the packed file is not there, or they do not belong together."""
        path = self.path(number)
        try:
            manifest = read_manifest(manifest_path(path))
            if manifest.num_samples and BetonReader(path).fingerprint() != manifest.fingerprint:
                return None
        # Missing, cut or damaged: in each case the part is to be packed again.
        except (OSError, ValueError):
            return None
        return manifest

    def tally(self, number: int, manifest: Manifest) -> Tally:
        """What became of a part's images."""
        path = self.path(number)
        labels = BetonReader(path).labels.tolist() if manifest.num_samples else []
        return tally_of(manifest, labels, rejected_path(path))

    def forget_whole(self) -> None:
        """Remove the manifest over the parts."""
        remove(manifest_path(self.dest))

    def publish(
        self, tally: Tally, parts: Sequence[Manifest], settings: dict[str, Any], more: Mapping[str, Any]
    ) -> Manifest:
        """Write DEST.manifest.json and DEST.rejected.jsonl."""
        self.refuse(tally)
        prints = "\0".join(part.fingerprint for part in parts)
        fingerprint = hashlib.sha256(prints.encode()).hexdigest()
        manifest = tally.manifest(fingerprint, parts[0].classes, settings, more)
        write_atomically(manifest_path(self.dest), manifest.to_json().encode())
        return manifest

    def refuse(self, tally: Tally) -> Path:
        """Write DEST.rejected.jsonl."""
        path = rejected_path(self.dest)
        write_atomically(path, tally.rejected_lines().encode())
        return path
