"""Which vector instructions our compiled code uses: the processor's best, or less for a test or a measurement."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from . import augment_native
from .decoder import native_library

LEVELS = ("plain", "avx2", "avx512")
"""Instruction sets, in the numbers of `native/targets.h`."""


def level() -> str:
    """The instruction set in use: one of `LEVELS`, "plain" where nothing could be compiled."""
    library = native_library()
    return LEVELS[library.rg_level()] if library is not None else LEVELS[0]


@contextmanager
def at_most(name: str) -> Iterator[None]:
    """Decode, resize and augment with this instruction set, in all threads of the process.

    Args:
        name: one of `LEVELS`.

    Raises:
        ValueError: this processor does not have it, or nothing could be compiled.
    """
    before = level()
    _force(name)
    try:
        if level() != name:
            raise ValueError(f"{name} cannot be used here; the most there is: {level()}")
        yield
    finally:
        # Not to the processor's best: this may be a block within another's limit.
        _force(before)


def _force(name: str) -> None:
    number = LEVELS.index(name)
    decoder, augmenter = native_library(), augment_native.library()
    if decoder is not None:
        decoder.rg_force_level(number)
    if augmenter is not None:
        augmenter.regatta_augment_force_level(number)
