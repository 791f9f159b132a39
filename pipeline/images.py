"""Any image file's bytes to RGB pixels as a person would expect to see them, or a refusal that says why.

EXIF orientation is applied. Transparency is laid over white, as viewers and paper do. CMYK and YCCK become RGB by the
plain conversion, without ICC profiles (which no training pipeline applies). 16 bits are scaled to 8, not clipped. Of an
animation or of several pages the first counts. What is cut or damaged is refused, never half decoded: JPEG and PNG are
checked code by code here, because PIL passes over some of their damage in silence; of the other formats PIL's decoders
refuse what is cut.
"""

from __future__ import annotations

import functools
import io
import re
import struct
import warnings
import zlib
from collections.abc import Collection

import numpy as np
from PIL import Image, JpegImagePlugin

from .jpeg import JpegInfo, check_jpeg, is_jpeg
from .refusal import MAX_PIXELS, ImageRefused, refuse_if_huge

# Others that PIL can open are left out: some start an interpreter (EPS), some have no signature and take any bytes
# for an image (TGA), some are not pictures.
_FORMATS = ("PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM", "QOI", "HEIF")
_PNG_START = b"\x89PNG\r\n\x1a\n"
_PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
_ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# PIL warns of odd metadata, which do not matter, and of images above half our limit, which we check ourselves.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def decode_rgb(data: bytes, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """The pixels of an image file.

    Args:
        data: the whole file.
        max_pixels: refuse larger images by their header, before memory is taken for them.

    Returns:
        uint8 (height, width, 3) RGB, upright.

    Raises:
        ImageRefused: the file is not an image, damaged, cut, too large or of a kind that is not supported.
    """
    return np.asarray(open_rgb(data, max_pixels))


def open_rgb(
    data: bytes, max_pixels: int = MAX_PIXELS, at_least_px: int | None = None, info: JpegInfo | None = None
) -> Image.Image:
    """As `decode_rgb`, but a PIL image.

    Args:
        data: the whole file.
        max_pixels: as for `decode_rgb`.
        at_least_px: decode a JPEG at 1/2, 1/4 or 1/8 of its size where its longest side stays at least this long.
        info: what `check_jpeg` said of the data, where that was asked already.

    Raises:
        ImageRefused: as for `decode_rgb`.
    """
    refuse_other_content(data)
    if is_jpeg(data):
        return _open_jpeg(data, info or check_jpeg(data, max_pixels), at_least_px)
    # PIL shows a cut PNG or a nonsensical TIFF without a word, or with a word on standard error only.
    if data.startswith(_PNG_START):
        _check_png(data, max_pixels)
    elif data[:4] in (b"II*\0", b"MM\0*"):
        _check_tiff(data)
    return _open_other(data, max_pixels)


def refuse_other_content(data: bytes) -> None:
    """Refuse by name what people often find in place of an image.

    Raises:
        ImageRefused: an empty file, a web page, a Git LFS pointer, or a HEIF image without pillow-heif.
    """
    start = data[:64].lstrip().lower()
    if not data:
        raise ImageRefused("empty file")
    if start.startswith((b"<!doctype html", b"<html")):
        raise ImageRefused("a web page, not an image")
    if start.startswith(b"version https://git-lfs"):
        raise ImageRefused("a Git LFS pointer, not the image; fetch it with git lfs pull")
    if data[4:8] == b"ftyp" and data[8:12] in (b"heic", b"heix", b"heif", b"mif1", b"msf1", b"hevc"):
        if b"avif" not in data[8:64] and not _reads_heif():
            raise ImageRefused("format HEIF needs pillow-heif (pip install pillow-heif); or convert it to JPEG or PNG")


@functools.cache
def _reads_heif() -> bool:
    """Whether PIL can read HEIF here; the package that gives it this is asked for with the first such file."""
    try:
        import pillow_heif
    except ImportError:
        return False
    pillow_heif.register_heif_opener()
    return True


def _open_jpeg(data: bytes, info: JpegInfo, at_least_px: int | None) -> Image.Image:
    try:
        # The plain JPEG reader: PIL's own choice would look at multi-picture tables behind the image.
        with JpegImagePlugin.JpegImageFile(io.BytesIO(data[: info.end])) as image:
            longest = max(image.size)
            if at_least_px and longest >= 2 * at_least_px:
                width, height = (-(-side * at_least_px // longest) for side in image.size)
                image.draft(None, (width, height))
            image.load()
            # Converting would copy even what is RGB already: 4 bytes a pixel.
            return _upright(image if image.mode == "RGB" else image.convert("RGB"), info.orientation)
    except Exception as error:  # PIL's readers raise many types on hostile input
        raise ImageRefused(f"JPEG cannot be decoded: {_message(error)}") from error


def _open_other(data: bytes, max_pixels: int) -> Image.Image:
    name = "image"
    try:
        with Image.open(io.BytesIO(data), formats=[each for each in _FORMATS if each in _known()]) as image:
            name = str(image.format)
            refuse_if_huge(*image.size, max_pixels)
            image.load()
            # PIL turns a TIFF upright while loading and then reports no orientation.
            return _upright(_to_rgb(image), _orientation(image))
    except ImageRefused:
        raise
    except Image.DecompressionBombError as error:
        raise ImageRefused(f"too large: more than {max_pixels} pixels") from error
    except Image.UnidentifiedImageError as error:
        raise ImageRefused("not an image, or in a format that is not supported") from error
    except Exception as error:  # PIL's readers raise many types on hostile input
        raise ImageRefused(f"{name} cannot be decoded: {_message(error)}") from error


def _known() -> Collection[str]:
    # PIL fails with a KeyError for the name of a format that nobody has registered.
    Image.init()
    return Image.OPEN


def _message(error: Exception) -> str:
    text = re.sub(r"<[^>]* at 0x[0-9a-f]+>", "data", " ".join(str(error).split()))
    return text or type(error).__name__


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(0x0112, 1)
    except Exception:  # broken EXIF does not make the picture unusable
        return 1
    return value if isinstance(value, int) else 1


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    return image.transpose(_TRANSPOSE[orientation]) if orientation in _TRANSPOSE else image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        image = _from_16_bits(np.asarray(image), image.info.get("transparency"))
    elif image.mode == "I" and image.format == "PPM":
        image = _from_16_bits(np.asarray(image), None)
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        rgba = image.convert("LA").convert("RGBA") if image.mode == "La" else image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    if image.mode not in ("1", "L", "P", "RGB", "CMYK", "YCbCr"):
        raise ImageRefused(f"pixels of kind {image.mode} have no agreed meaning as colours; convert it to 8-bit RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _from_16_bits(pixels: np.ndarray, transparent: object) -> Image.Image:
    """Grey of 0..65535 as 0..255, rounded; the value `transparent` becomes transparent."""
    gray = Image.fromarray(((pixels.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8))
    if isinstance(transparent, int):
        gray.putalpha(Image.fromarray(np.where(pixels == transparent, 0, 255).astype(np.uint8)))
    return gray


def _check_png(data: bytes, max_pixels: int) -> None:
    """Refuse a PNG whose chunks are cut or changed, or whose pixel data end early or do not fit their checksum."""
    at, pixels, header = 8, [], b""
    while True:
        length, name = struct.unpack(">I4s", data[at : at + 8]) if at + 8 <= len(data) else (0, b"")
        if not name or at + 12 + length > len(data):
            raise ImageRefused("truncated PNG: it ends without an end chunk")
        body = data[at + 8 : at + 8 + length]
        # Ancillary chunks (lower case) only carry notes, which we do not read.
        if name[:1].isupper() and zlib.crc32(name + body) != int.from_bytes(data[at + 8 + length : at + 12 + length]):
            raise ImageRefused(f"damaged PNG: the checksum of chunk {name.decode('ascii', 'replace')} does not fit")
        at += 12 + length
        if name == b"IHDR" and not header:
            header = body
            _check_png_header(header, max_pixels)
        elif name == b"IDAT":
            pixels.append(body)
        elif name == b"IEND":
            break
    if not header:
        raise ImageRefused("damaged PNG: it has no header")
    _check_png_pixels(pixels, _png_bytes(header))


def _check_png_header(header: bytes, max_pixels: int) -> None:
    if len(header) != 13 or header[9] not in _PNG_CHANNELS:
        raise ImageRefused("damaged PNG: an impossible header")
    width, height = struct.unpack(">II", header[:8])
    if width == 0 or height == 0:
        raise ImageRefused(f"empty image of {width} x {height} pixels")
    refuse_if_huge(width, height, max_pixels)


def _png_bytes(header: bytes) -> int:
    """Bytes of the filtered rows before compression."""
    width, height, depth, color, _, _, interlaced = struct.unpack(">IIBBBBB", header)
    bits = depth * _PNG_CHANNELS[color]
    if not interlaced:
        return height * (1 + -(-width * bits // 8))
    total = 0
    for left, top, step_x, step_y in _ADAM7:
        columns, rows = -(-(width - left) // step_x), -(-(height - top) // step_y)
        if columns > 0 and rows > 0:
            total += rows * (1 + -(-columns * bits // 8))
    return total


def _check_png_pixels(pieces: list[bytes], expected: int) -> None:
    """Inflate without keeping anything; more data than the image needs are ignored, as all decoders do."""
    inflate = zlib.decompressobj()
    count = 0
    try:
        for piece in pieces:
            while piece and count <= expected and not inflate.eof:
                count += len(inflate.decompress(piece, 1 << 18))
                piece = inflate.unconsumed_tail
        while count < expected and not inflate.eof:
            more = len(inflate.decompress(b"", 1 << 18))
            if not more:
                break
            count += more
    except zlib.error as error:
        raise ImageRefused(f"damaged PNG: {_message(error)}") from error
    if count < expected:
        raise ImageRefused("truncated PNG: its pixel data end too early")


def _check_tiff(data: bytes) -> None:
    """Refuse a TIFF whose first directory is nonsense: libtiff would tell standard error about each of its entries."""
    order = "<" if data[:2] == b"II" else ">"
    at = struct.unpack(order + "I", data[4:8])[0] if len(data) >= 8 else 0
    if not 8 <= at <= len(data) - 2:
        raise ImageRefused("damaged TIFF: its directory lies outside the file")
    count = struct.unpack(order + "H", data[at : at + 2])[0]
    if count == 0 or at + 2 + 12 * count > len(data):
        raise ImageRefused("damaged TIFF: its directory ends outside the file")
    entries = [struct.unpack(order + "HH", data[at + 2 + 12 * n : at + 6 + 12 * n]) for n in range(count)]
    if len({tag for tag, _ in entries}) < count or any(not 1 <= kind <= 18 for _, kind in entries):
        raise ImageRefused("damaged TIFF: its directory has repeated or impossible entries")
