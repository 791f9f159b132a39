"""Both packers where they pack in parts: one part of several, or all of them on an engine."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .parts import Part, PartFiles, Write, finish, place_part, read_part
from .source import Source

Opened = tuple[Source, dict[str, Any]]


@dataclass(frozen=True)
class PartPacker:
    """What differs between the two packers.

    Attributes:
        module: name of the command's module among the tools, where a worker finds this object as `PARTS`.
        opened: options -> (all images in their order, settings for the manifest).
        files: (DEST, number of parts) -> where they lie.
        writer: (files, options, settings) -> what packs a part.
    """

    module: str
    opened: Callable[[argparse.Namespace], Opened]
    files: Callable[[Path, int], PartFiles]
    writer: Callable[[Any, argparse.Namespace, dict[str, Any]], Write]

    def place(self, options: argparse.Namespace, part: Part) -> tuple[PartFiles, Opened]:
        """Pack one part unless it is there; gives where the parts lie and what was opened.

        Raises:
            ValueError: as `parts.place_part`.
        """
        files = self.files(Path(os.path.abspath(options.dest)), part.of)
        source, settings = self.opened(options)
        place_part(files, part, source, settings, options.overwrite, self.writer(files, options, settings))
        return files, (source, settings)


def pack_in_parts(packer: PartPacker, options: argparse.Namespace) -> int:
    """Pack the part that `--part` names, or all parts on the engine; returns the exit code."""
    if options.engine == "ray":
        from .ray_engine import pack_on_ray

        return pack_on_ray(packer, options)
    files, (source, settings) = packer.place(options, read_part(options.part, os.environ))
    return finish(files, source, settings, options.max_bad)
