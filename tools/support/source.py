"""Images to pack: each has a name, a label and a place that it is read from."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from pipeline.refusal import ImageRefused

MAX_FILE_BYTES = 1 << 29


class Place(Protocol):
    """Where one image file's bytes are."""

    def read(self) -> bytes:
        """The bytes.

        Raises:
            ImageRefused: they cannot be read, or are absurdly many.
        """


@dataclass(frozen=True, slots=True)
class FilePart:
    """A file, or the `size` bytes of it from `offset` on where `offset` is not negative."""

    path: str
    offset: int = -1
    size: int = -1

    def read(self) -> bytes:
        """The bytes; see `Place`."""
        limit = MAX_FILE_BYTES + 1
        try:
            if not stat.S_ISREG(os.stat(self.path).st_mode):
                raise ImageRefused("not a regular file")  # reading a pipe would wait for ever
            with open(self.path, "rb") as file:
                if self.offset >= 0:
                    file.seek(self.offset)
                data = file.read(limit if self.size < 0 else min(self.size, limit))
        except OSError as error:
            raise ImageRefused(f"the file cannot be read: {error.strerror}") from error
        return refuse_huge(data)


@dataclass(frozen=True, slots=True)
class Unusable:
    """What stands for an image that cannot be reached: it is counted and named with its reason."""

    reason: str

    def read(self) -> bytes:
        """Refuses; see `Place`."""
        raise ImageRefused(self.reason)


def refuse_huge(data: bytes) -> bytes:
    """The data themselves.

    Raises:
        ImageRefused: they are more than any image file has.
    """
    if len(data) > MAX_FILE_BYTES:
        raise ImageRefused(f"more than {MAX_FILE_BYTES >> 20} MiB of file")
    return data


@dataclass(frozen=True)
class Source:
    """Images to pack, in order.

    Attributes:
        names: what to call them.
        labels: (N,) int64, -1 where there are no classes.
        classes: class names by label.
        places: where each is.
        passed_over: what else was found and is no image: kind, as ".txt", and number of files.
    """

    names: list[str]
    labels: np.ndarray
    classes: tuple[str, ...]
    places: Sequence[Place]
    passed_over: Mapping[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.names)

    def read(self, index: int) -> bytes:
        """The bytes of one image file.

        Raises:
            ImageRefused: it cannot be read or is absurdly large.
        """
        return self.places[index].read()

    def shuffled(self, seed: int) -> Source:
        """A source with these images in a random order, which depends only on the seed and the number of images."""
        # Philox by name: NumPy may change what its default generator draws.
        return self.taken(np.random.Generator(np.random.Philox(seed)).permutation(len(self)).tolist())

    def taken(self, order: Sequence[int]) -> Source:
        """A source with the images of these numbers, in this order."""
        return Source(
            [self.names[i] for i in order],
            self.labels[list(order)],
            self.classes,
            [self.places[i] for i in order],
            self.passed_over,
        )
