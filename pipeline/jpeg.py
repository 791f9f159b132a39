"""Is this JPEG whole? The markers are read here, scans in `jpeg_scan`, their coded data in `jpeg_entropy`; no pixels.

Decoders paint grey over a part that is missing and go on after a code that does not exist, often without a word. Here
every code of every scan is read and counted, so that a file is either complete or refused with a reason. What cannot
be told: damage that happens to form another valid sequence of codes (the packer's checksums catch what happens later).

Source: ITU-T T.81, annexes B (markers), F (sequential) and G (progressive). Colour space by libjpeg's rules, because
libjpeg is what decodes our records.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .jpeg_entropy import TABLE, build_codes
from .jpeg_scan import Component, parse_scan
from .refusal import MAX_PIXELS, ImageRefused, refuse_if_huge

# Encoders write about ten scans. A hostile file can hold thousands, each over the whole image.
MAX_SCANS = 100


@dataclass
class JpegInfo:
    """What a complete JPEG is.

    Attributes:
        width: pixels as coded, before EXIF orientation; `height` likewise.
        color: "gray", "ycc", "rgb", "cmyk" or "ycck".
        orientation: EXIF orientation, 1 to 8; 1 where it is absent, out of range or unreadable.
        progressive: coded in several passes over the image.
        clean: a decoder reads it without a warning: no stray bytes between markers or behind a scan.
        end: bytes from the start marker up to and including the end marker.
    """

    width: int
    height: int
    color: str
    orientation: int
    progressive: bool
    clean: bool
    end: int


def is_jpeg(data: bytes) -> bool:
    """Whether the data begin like a JPEG file."""
    return data[:3] == b"\xff\xd8\xff"


def check_jpeg(data: bytes, max_pixels: int = MAX_PIXELS) -> JpegInfo:
    """Read a whole JPEG without making pixels of it.

    Args:
        data: the file; what follows the end marker is ignored.
        max_pixels: refuse images with more pixels, before anything is allocated for them.

    Raises:
        ImageRefused: not a JPEG, cut, damaged, too large, or of a kind that is not supported (arithmetic coding,
            lossless, hierarchical, 12 bits).
    """
    return _Parser(data, max_pixels).run()


class _Parser:
    """The state of reading one file; `run` is all there is to call."""

    def __init__(self, data: bytes, max_pixels: int):
        self.data = data
        self.bytes = np.frombuffer(data, dtype=np.uint8)
        self.max_pixels = max_pixels
        self.position = 2
        self.clean = True
        self.width = self.height = 0
        self.progressive = False
        self.components: list[Component] = []
        self.restart_interval = 0
        self.scans = 0
        self.quantizers: set[int] = set()
        self.codes: dict[int, np.ndarray] = {}
        self.jfif = False
        self.adobe_transform = -1
        self.orientation = 0

    def run(self) -> JpegInfo:
        if not is_jpeg(self.data):
            raise ImageRefused("not a JPEG file")
        while (marker := self._next_marker()) != 0xD9:
            # These have no length; reading one would take the next marker for it.
            if marker == 0x01 or 0xD0 <= marker <= 0xD7:
                self.clean = False  # a marker without parameters where none belongs; decoders step over it
                continue
            if marker == 0xD8:
                raise ImageRefused("damaged JPEG: a second start marker inside the image")
            body = self._segment()
            if marker in (0xC0, 0xC1, 0xC2):
                self._frame(marker, body)
            elif marker in (0xC3, 0xC5, 0xC6, 0xC7, 0xC8, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF, 0xDE, 0xDF):
                raise ImageRefused(f"JPEG of an unsupported kind ({_KINDS.get(marker, 'hierarchical or lossless')})")
            elif marker == 0xC4:
                self._huffman_tables(body)
            elif marker == 0xDB:
                self._quantizers(body)
            elif marker == 0xDD:
                if len(body) != 2:
                    raise ImageRefused("damaged JPEG: a restart interval of wrong length")
                self.restart_interval = int.from_bytes(body, "big")
            elif marker == 0xDA:
                self._scan(body)
            elif 0xE0 <= marker <= 0xEF:
                self._application(marker, body)
            elif marker not in (0xFE, 0xDC):  # a comment; a number of lines, which the frame header has told already
                raise ImageRefused(f"damaged JPEG: a marker that does not exist (0x{marker:02x})")
        self._check_complete()
        color = self._color()
        return JpegInfo(
            width=self.width,
            height=self.height,
            color=color,
            orientation=self.orientation or 1,
            progressive=self.progressive,
            clean=self.clean,
            end=self.position,
        )

    def _next_marker(self) -> int:
        data, start = self.data, self.position
        at = start
        while True:
            at = data.find(b"\xff", at)
            if at < 0:
                raise ImageRefused("truncated JPEG: it ends without an end marker")
            if at > start:
                self.clean = False
            after = at + 1
            while after < len(data) and data[after] == 0xFF:
                after += 1
            if after >= len(data):
                raise ImageRefused("truncated JPEG: it ends without an end marker")
            if data[after] != 0:
                self.position = after + 1
                return data[after]
            self.clean = False  # FF 00 outside a scan
            at = after + 1

    def _segment(self) -> bytes:
        at = self.position
        length = int.from_bytes(self.data[at : at + 2], "big")
        # Cut comes before damaged: a file that ends here may have had a good length.
        if at + max(length, 2) > len(self.data):
            raise ImageRefused("truncated JPEG: it ends inside a header segment")
        if length < 2:
            raise ImageRefused("damaged JPEG: a header segment of impossible length")
        self.position = at + length
        return self.data[at + 2 : at + length]

    def _frame(self, marker: int, body: bytes) -> None:
        if self.components:
            raise ImageRefused("damaged JPEG: two frame headers")
        if len(body) < 6 or len(body) != 6 + 3 * body[5]:
            raise ImageRefused("damaged JPEG: a frame header of wrong length")
        if body[0] != 8:
            raise ImageRefused(f"JPEG of an unsupported kind ({body[0]} bits a sample)")
        self.height, self.width = int.from_bytes(body[1:3], "big"), int.from_bytes(body[3:5], "big")
        self.progressive = marker == 0xC2
        if self.width == 0 or self.height == 0:
            raise ImageRefused(f"empty image of {self.width} x {self.height} pixels")
        # Before anything is allocated: a header of ten bytes can claim gigabytes.
        refuse_if_huge(self.width, self.height, self.max_pixels)
        if body[5] not in (1, 3, 4):
            raise ImageRefused(f"JPEG with {body[5]} colour components (1, 3 or 4 are supported)")
        for at in range(6, len(body), 3):
            component = Component(body[at], body[at + 1] >> 4, body[at + 1] & 15, body[at + 2])
            if not (1 <= component.h <= 4 and 1 <= component.v <= 4):
                raise ImageRefused("damaged JPEG: impossible sampling factors")
            self.components.append(component)
        self._lay_out()

    def _lay_out(self) -> None:
        """Blocks of each component: those with image in them, and those that interleaved scans code."""
        most_h, most_v = max(c.h for c in self.components), max(c.v for c in self.components)
        if any(most_h % c.h or most_v % c.v for c in self.components):
            raise ImageRefused("JPEG of an unsupported kind (sampling factors that are no multiples)")
        mcus_wide, mcus_high = _ceil_div(self.width, 8 * most_h), _ceil_div(self.height, 8 * most_v)
        for c in self.components:
            c.blocks_wide = _ceil_div(_ceil_div(self.width * c.h, most_h), 8)
            c.blocks_high = _ceil_div(_ceil_div(self.height * c.v, most_v), 8)
            c.padded_wide, c.padded_high = mcus_wide * c.h, mcus_high * c.v

    def _huffman_tables(self, body: bytes) -> None:
        at = 0
        while at < len(body):
            counts = np.frombuffer(body[at + 1 : at + 17], dtype=np.uint8)
            total = int(counts.sum())
            slot, symbols = body[at], np.frombuffer(body[at + 17 : at + 17 + total], dtype=np.uint8)
            if len(counts) < 16 or len(symbols) < total or total > 256 or slot & 0xEC:
                raise ImageRefused("damaged JPEG: an impossible Huffman table")
            table = np.zeros(TABLE, dtype=np.int32)
            # A DC code names a number of bits, at most 15.
            if slot < 0x10 and total and symbols.max() > 15:
                raise ImageRefused("damaged JPEG: an impossible Huffman table")
            if not build_codes(counts, symbols, table):
                raise ImageRefused("damaged JPEG: an impossible Huffman table")
            self.codes[slot] = table
            at += 17 + total

    def _quantizers(self, body: bytes) -> None:
        at = 0
        while at < len(body):
            length = 129 if body[at] >> 4 else 65
            if at + length > len(body) or body[at] & 15 > 3:
                raise ImageRefused("damaged JPEG: an impossible quantisation table")
            self.quantizers.add(body[at] & 15)
            at += length

    def _application(self, marker: int, body: bytes) -> None:
        if marker == 0xE0 and body[:5] == b"JFIF\0" and len(body) >= 14:
            self.jfif = True
            self.clean &= body[5] == 1  # decoders warn of another major version
        elif marker == 0xEE and body[:5] == b"Adobe" and len(body) >= 12:
            self.adobe_transform = body[11]
        elif marker == 0xE1 and body[:6] == b"Exif\0\0" and not self.orientation:
            self.orientation = exif_orientation(body[6:])

    def _scan(self, body: bytes) -> None:
        scan = parse_scan(body, self.components, self.quantizers, self.progressive)
        self.scans += 1
        # Each scan costs a pass over the image, whatever it changes.
        if self.scans > MAX_SCANS:
            raise ImageRefused(f"JPEG with more than {MAX_SCANS} scans")
        if self.progressive:
            scan.check_progression()
        else:
            self.clean &= scan.usual
        self.position, clean = scan.read(self.bytes, self.position, self.restart_interval, self.codes)
        self.clean &= clean

    def _check_complete(self) -> None:
        if not self.components or not all(c.scanned for c in self.components):
            raise ImageRefused("truncated JPEG: the end marker comes before the image")
        if self.progressive:
            begun = [bits for c in self.components for bits in c.precision]
            if any(bits > 0 for bits in begun) or any(bits < 0 for bits in self.components[0].precision):
                raise ImageRefused("truncated JPEG: its last passes are missing")
            if any(c.precision[0] != 0 for c in self.components):
                raise ImageRefused("truncated JPEG: its last passes are missing")

    def _color(self) -> str:
        """The colour space as libjpeg concludes it (`default_decompress_parms`); `clean` is false where it warns."""
        self.clean &= self.adobe_transform in (-1, 0, 1, 2)
        if len(self.components) == 1:
            return "gray"
        if len(self.components) == 4:
            return "ycck" if self.adobe_transform == 2 else "cmyk"
        if self.jfif:
            return "ycc"
        if self.adobe_transform >= 0:
            return "rgb" if self.adobe_transform == 0 else "ycc"
        return "rgb" if [c.identifier for c in self.components] == [0x52, 0x47, 0x42] else "ycc"


_KINDS = {0xC3: "lossless", 0xC9: "arithmetic coding", 0xCA: "arithmetic coding"}


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def exif_orientation(tiff: bytes) -> int:
    """The orientation tag (1 to 8) of the first directory of an EXIF block, 0 where it is absent or makes no sense."""
    if tiff[:2] not in (b"II", b"MM"):
        return 0
    order = "little" if tiff[:2] == b"II" else "big"

    def number(at: int, size: int) -> int:
        return int.from_bytes(tiff[at : at + size], order)  # type: ignore[arg-type]

    directory = number(4, 4)
    for entry in range(directory + 2, min(directory + 2 + 12 * number(directory, 2), len(tiff) - 11), 12):
        if number(entry, 2) == 0x0112:
            size = {1: 1, 3: 2, 4: 4}.get(number(entry + 2, 2), 2)
            value = number(entry + 8, size)
            return value if 1 <= value <= 8 else 0
    return 0
