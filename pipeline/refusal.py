"""The refusal of an image file, and the limit on its size that every reader shares."""

from __future__ import annotations

MAX_PIXELS = 178_956_970
"""More pixels are refused by the header, before memory is taken for them: twice what PIL warns of."""


class ImageRefused(ValueError):
    """A file that cannot be used as an image; the message is the reason, in a few words and without the file's name."""


class TooManyBad(ValueError):
    """So many images cannot be used that the outcome would not be about the data that were given."""


def refuse_if_huge(width: int, height: int, max_pixels: int) -> None:
    """Raise `ImageRefused` where width * height is above the limit."""
    if width * height > max_pixels:
        raise ImageRefused(f"too large: {width} x {height} pixels, the limit is {max_pixels} pixels")
