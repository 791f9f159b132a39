"""An image file's bytes to the JPEG record that a store keeps of it."""

from __future__ import annotations

import hashlib
import io
import zlib
from dataclasses import dataclass

from PIL import Image

from .images import open_rgb, refuse_other_content
from .jpeg import check_jpeg, is_jpeg
from .refusal import MAX_PIXELS, ImageRefused


@dataclass(frozen=True)
class Record:
    """A complete JPEG, gray or YCbCr, upright, that any decoder reads without a warning.

    Attributes:
        data: its bytes.
        width: pixels; `height` likewise.
        kept: the source's own bytes, not coded anew.
        digest: SHA-256 of the bytes.
        crc32: CRC-32 of the bytes.
    """

    data: bytes
    width: int
    height: int
    kept: bool
    digest: bytes
    crc32: int


def make_record(data: bytes, max_side_px: int, quality: int, max_bytes: int) -> Record:
    """The record of an image file.

    A JPEG that is upright, gray or YCbCr and whose longest side fits is kept byte for byte up to its end marker
    (phones append films, cameras previews). Everything else is decoded, made to fit with antialiasing, and coded with
    4:2:0 sampling.

    Args:
        data: the image file.
        max_side_px: longest side of a record; larger images are reduced to it, smaller ones are never enlarged.
        quality: JPEG quality, 1 to 100, of what is coded.
        max_bytes: what a record may have at most; a JPEG with more (because of what else it holds) is coded anew.

    Raises:
        ImageRefused: see `images.decode_rgb`.
    """
    refuse_other_content(data)
    info = check_jpeg(data) if is_jpeg(data) else None
    if info is not None and info.clean and info.orientation == 1 and info.color in ("gray", "ycc"):
        if max(info.width, info.height) <= max_side_px and info.end <= max_bytes:
            return _record(bytes(data[: info.end]), info.width, info.height, kept=True)
    # Decoding at a fraction of the size saves most of the time; twice the target leaves the choice of pixels to the
    # antialiased resize.
    image = fit(open_rgb(data, MAX_PIXELS, at_least_px=2 * max_side_px, info=info), max_side_px)
    coded = io.BytesIO()
    image.save(coded, "JPEG", quality=quality, subsampling="4:2:0")
    if coded.tell() > max_bytes:
        raise ImageRefused(f"too large: {coded.tell()} bytes as JPEG, the limit is {max_bytes} bytes")
    return _record(coded.getvalue(), *image.size, kept=False)


def fit(image: Image.Image, max_side_px: int) -> Image.Image:
    """The image with its longest side reduced to `max_side_px` where it is longer; no side becomes less than 1."""
    longest = max(image.size)
    if longest <= max_side_px:
        return image
    width, height = (max(1, round(side * max_side_px / longest)) for side in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC)


def _record(data: bytes, width: int, height: int, kept: bool) -> Record:
    return Record(data, width, height, kept, hashlib.sha256(data).digest(), zlib.crc32(data))
