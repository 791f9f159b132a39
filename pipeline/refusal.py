"""What ends the use of an image or of a data set, and the limit on an image's size that every reader shares."""

from __future__ import annotations

MAX_PIXELS = 178_956_970
"""More pixels are refused by the header, before memory is taken for them: twice what PIL warns of."""


class ImageRefused(ValueError):
    """A file that cannot be used as an image; the message is the reason, in a few words and without the file's name."""


class TooManyBad(ValueError):
    """So many images cannot be used that the outcome would not be about the data that were given."""


class SourceBusy(OSError):
    """A file behind an address that did not arrive in time; the same command may succeed later."""


class SourceClosed(ValueError):
    """A file behind an address that is not there or may not be read."""


def refuse_if_huge(width: int, height: int, max_pixels: int) -> None:
    """Raise `ImageRefused` where width * height is above the limit."""
    if width * height > max_pixels:
        raise ImageRefused(f"too large: {width} x {height} pixels, the limit is {max_pixels} pixels")
