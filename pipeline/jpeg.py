"""Is this JPEG whole? The marker structure in Python, the entropy-coded data in compiled code, no pixels.

Decoders paint grey over a part that is missing and go on after a code that does not exist, often without a word. Here
every code of every scan is read and counted, so that a file is either complete or refused with a reason. What cannot
be told: damage that happens to form another valid sequence of codes (the packer's checksums catch what happens later).

Source: ITU-T T.81, annexes B (markers), F (sequential) and G (progressive). Colour space by libjpeg's rules, because
libjpeg is what decodes our records.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numba import njit

MAX_PIXELS = 178_956_970
# Encoders write about ten scans. A hostile file can hold thousands, each over the whole image.
MAX_SCANS = 100


class ImageRefused(ValueError):
    """A file that cannot be used as an image; the message is the reason, in a few words and without the file's name."""


@dataclass
class _Component:
    identifier: int
    h: int
    v: int
    quantizer: int
    blocks_wide: int = 0  # without the padding to whole MCUs
    blocks_high: int = 0
    padded_wide: int = 0
    padded_high: int = 0
    scanned: bool = False
    # Progressive: bits still to come of each coefficient, -1 for never sent; which coefficients are not zero so far.
    precision: list[int] = field(default_factory=lambda: [-1] * 64)
    nonzero: np.ndarray | None = None


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
        self.components: list[_Component] = []
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
        refuse_if_huge(self.width, self.height, self.max_pixels)
        if body[5] not in (1, 3, 4):
            raise ImageRefused(f"JPEG with {body[5]} colour components (1, 3 or 4 are supported)")
        for at in range(6, len(body), 3):
            component = _Component(body[at], body[at + 1] >> 4, body[at + 1] & 15, body[at + 2])
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
            table = np.zeros(_LOOKUP + _TAIL, dtype=np.int32)
            if slot < 0x10 and total and symbols.max() > 15:
                raise ImageRefused("damaged JPEG: an impossible Huffman table")
            if not _build_codes(counts, symbols, table):
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
        members, selectors = self._scan_members(body)
        first, last, high, low = body[-3], body[-2], body[-1] >> 4, body[-1] & 15
        self.scans += 1
        if self.scans > MAX_SCANS:
            raise ImageRefused(f"JPEG with more than {MAX_SCANS} scans")
        if self.progressive:
            self._check_progression(members, first, last, high, low)
        elif (first, last, high, low) != (0, 63, 0, 0):
            self.clean = False  # decoders ignore these numbers here, with a warning
        rest = len(self.data) - self.position
        windows = np.empty(rest + _PADDING, dtype=np.uint32)
        starts = np.empty(rest // 2 + 2, dtype=np.int64)
        segments, self.position = _unstuff(self.bytes, self.position, windows, starts)
        if segments < 0:
            raise ImageRefused("damaged JPEG: restart markers out of order")
        if self.position >= len(self.data):
            raise ImageRefused("truncated JPEG: it ends inside the coded image")
        status = _read_scan(
            windows[3:],
            starts[: segments + 1],
            self.restart_interval,
            self._geometry(members),
            self._tables(members, selectors, first, high),
            self.progressive,
            first,
            last,
            high,
            _NO_FLAGS if members[0].nonzero is None else members[0].nonzero,
        )
        if status > 1:
            raise ImageRefused(_DAMAGE[status])
        if status == 1:
            self.clean = False
        for component in members:
            component.scanned = True

    def _scan_members(self, body: bytes) -> tuple[list[_Component], list[int]]:
        if not self.components:
            raise ImageRefused("damaged JPEG: coded data before the frame header")
        count = body[0] if body else 0
        if not 1 <= count <= 4 or len(body) != 4 + 2 * count:
            raise ImageRefused("damaged JPEG: a scan header of wrong length")
        members = []
        for identifier in body[1 : 1 + 2 * count : 2]:
            found = [c for c in self.components if c.identifier == identifier and c not in members]
            if not found or (found[0].scanned and not self.progressive):
                raise ImageRefused("damaged JPEG: a scan names components wrongly")
            members.append(found[0])
        if count > 1 and sum(c.h * c.v for c in members) > 10:
            raise ImageRefused("damaged JPEG: too many blocks in a unit")
        if any(c.quantizer not in self.quantizers for c in members):
            raise ImageRefused("damaged JPEG: a quantisation table is missing")
        return members, list(body[2 : 2 + 2 * count : 2])

    def _check_progression(self, members: list[_Component], first: int, last: int, high: int, low: int) -> None:
        """Each coefficient must come first with some of its bits left out, then bit by bit (T.81 G.1.1.1)."""
        band_fits = last == 0 if first == 0 else first <= last <= 63 and len(members) == 1
        if not band_fits or low > 13 or (high and high != low + 1):
            raise ImageRefused("damaged JPEG: impossible progression")
        for c in members:
            if any(c.precision[k] != (high if high else -1) for k in range(first, last + 1)):
                raise ImageRefused("damaged JPEG: impossible progression")
            if first and c.precision[0] < 0:
                raise ImageRefused("damaged JPEG: impossible progression")
            c.precision[first : last + 1] = [low] * (last + 1 - first)
            if first and c.nonzero is None:
                c.nonzero = np.zeros((c.padded_wide * c.padded_high, 64), dtype=np.bool_)

    def _geometry(self, members: list[_Component]) -> np.ndarray:
        """Rows (h, v, blocks wide, blocks high in this scan, stride of the flags); one component has no padding."""
        if len(members) == 1:
            c = members[0]
            return np.array([[1, 1, c.blocks_wide, c.blocks_high, c.padded_wide]], dtype=np.int64)
        rows = [[c.h, c.v, c.padded_wide, c.padded_high, c.padded_wide] for c in members]
        return np.array(rows, dtype=np.int64)

    def _tables(self, members: list[_Component], selectors: list[int], first: int, high: int) -> np.ndarray:
        """Code tables of this scan, for each member DC then AC; one that the scan does not use stays empty."""
        tables = np.zeros((len(members), 2, _LOOKUP + _TAIL), dtype=np.int32)
        uses_dc, uses_ac = first == 0 and high == 0, first > 0
        if not self.progressive:
            uses_dc = uses_ac = True
        for row, selector in enumerate(selectors):
            for kind, used, slot in ((0, uses_dc, selector >> 4), (1, uses_ac, 0x10 | (selector & 15))):
                if used and slot not in self.codes:
                    raise ImageRefused("damaged JPEG: a Huffman table is missing")
                if used:
                    tables[row, kind] = self.codes[slot]
        return tables.reshape(-1)

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
# Words of zeros behind a scan's bytes: more than the longest block has bits, so that a cut scan needs no test per code.
_PADDING = 512
_NO_FLAGS = np.zeros((0, 64), dtype=np.bool_)
_CUT, _BAD_CODE, _LEFT_OVER, _RESTARTS = 2, 3, 4, 5
_DAMAGE = {
    _CUT: "truncated JPEG: the coded image ends too early",
    _BAD_CODE: "damaged JPEG: a code that does not exist",
    _LEFT_OVER: "damaged JPEG: coded data left over",
    _RESTARTS: "damaged JPEG: restart markers are missing or too many",
}


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def refuse_if_huge(width: int, height: int, max_pixels: int) -> None:
    """Raise `ImageRefused` where width * height is above the limit."""
    if width * height > max_pixels:
        raise ImageRefused(f"too large: {width} x {height} pixels, the limit is {max_pixels} pixels")


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


# The compiled part. A scan's bytes are first copied without stuffing; from then on the only state is the number of the
# next bit, and `windows[i]` holds the four bytes from byte i on, so that the next 25 bits are one load and one shift.
# Positions are unsigned: for a signed index numba adds a test for counting from the end.

_LOOKUP_BITS = 10
_LOOKUP = 1 << _LOOKUP_BITS
_TAIL = 36 + 256  # limits and symbols behind a lookup table, for the codes that are longer
_LOOKUP_SHIFT, _LOOKUP_MASK = np.uint64(32 - _LOOKUP_BITS), np.uint64(_LOOKUP - 1)
_U0, _U1, _U3, _U4, _U7, _U8, _U15, _U16 = (np.uint64(n) for n in (0, 1, 3, 4, 7, 8, 15, 16))


@njit(cache=True, nogil=True, error_model="numpy")
def _build_codes(counts, symbols, table):
    """Fill a code table of `_LOOKUP + _TAIL` entries; False where the counts form no prefix code.

    The first part maps the leading bits to length << 8 | symbol, 0 for longer codes. Then, for n in 1..16:
    table[_LOOKUP + n] is the first 16-bit value too large for a code of n bits, table[_LOOKUP + 17 + n] what to add to
    a code of n bits to get the position of its symbol; then the symbols.
    """
    code = 0
    position = 0
    for length in range(1, 17):
        count = np.int64(counts[length - 1])
        table[_LOOKUP + 17 + length] = position - code
        if code + count > 1 << length:
            return False
        for _ in range(count):
            if length <= _LOOKUP_BITS:
                first = code << (_LOOKUP_BITS - length)
                for entry in range(first, first + (1 << (_LOOKUP_BITS - length))):
                    table[entry] = (length << 8) | symbols[position]
            code += 1
            position += 1
        table[_LOOKUP + length] = code << (16 - length)
        code <<= 1
    table[_LOOKUP + 36 : _LOOKUP + 36 + len(symbols)] = symbols
    return True


@njit(cache=True, nogil=True, error_model="numpy")
def _unstuff(data, position, windows, starts):
    """Copy a scan's bytes without stuffing; starts[i] is where restart segment i begins.

    windows[i + 3] becomes the four bytes from byte i on, zeros behind the end.

    Returns:
        (segments, or -1 where restart markers are out of order; position of the next marker).
    """
    size = len(data)
    length = 0
    segments = 1
    starts[0] = 0
    window = np.uint32(0)
    while position < size:
        byte = data[position]
        if byte == 0xFF:
            after = position + 1
            while after < size and data[after] == 0xFF:
                after += 1
            if after >= size:
                position = size
                break
            if 0xD0 <= data[after] <= 0xD7:
                if data[after] != 0xD0 + ((segments - 1) & 7):
                    return -1, position
                starts[segments] = length
                segments += 1
                position = after + 1
                continue
            if data[after] != 0:
                break
            position = after
        position += 1
        window = (window << np.uint32(8)) | np.uint32(byte)
        windows[length] = window
        length += 1
    windows[length] = window << np.uint32(8)
    windows[length + 1] = window << np.uint32(16)
    windows[length + 2] = window << np.uint32(24)
    windows[length + 3 : length + _PADDING] = 0
    starts[segments] = length
    return segments, position


@njit(cache=True, nogil=True, error_model="numpy")
def _peek(windows, bit):
    """The 16 bits from position `bit` on, as uint64; `windows` begins with what belongs to byte 0."""
    return (np.uint64(windows[bit >> _U3]) >> (_U16 - (bit & _U7))) & np.uint64(0xFFFF)


@njit(cache=True, nogil=True, error_model="numpy")
def _long_code(word, tables, base):
    """(length << 8 | symbol) of a code longer than the lookup, 0 where there is no such code."""
    tail = base + np.uint64(_LOOKUP)
    for length in range(np.uint64(_LOOKUP_BITS + 1), np.uint64(17)):
        if word < np.uint64(tables[tail + length]):
            position = np.int64(word >> (_U16 - length)) + np.int64(tables[tail + np.uint64(17) + length])
            return np.uint64((np.int64(length) << 8) | np.int64(tables[tail + np.uint64(36 + position)]))
    return _U0


@njit(cache=True, nogil=True, error_model="numpy")
def _symbol(windows, bit, tables, base):
    """(length << 8 | symbol) of the code at position `bit`, 0 where there is no such code."""
    leading = (np.uint64(windows[bit >> _U3]) >> (_LOOKUP_SHIFT - (bit & _U7))) & _LOOKUP_MASK
    entry = np.uint64(tables[base + leading])
    if entry == _U0:
        entry = _long_code(_peek(windows, bit), tables, base)
    return entry


@njit(cache=True, nogil=True, error_model="numpy")
def _skip_dc(windows, bit, tables, base):
    """Step over a DC difference (T.81 F.2.2.1): the next position, 0 for a bad code."""
    entry = _symbol(windows, bit, tables, base)
    if entry == _U0 or entry & np.uint64(0xFF) > np.uint64(15):
        return _U0
    return bit + (entry >> _U8) + (entry & np.uint64(15))


@njit(cache=True, nogil=True, error_model="numpy")
def _skip_ac(windows, bit, tables, base):
    """Step over the 63 AC coefficients of a sequential block (T.81 F.2.2.2): the next position, 0 for a bad code.

    `_symbol` is written out here: this loop is where the time goes, and a call in it costs twice the loop.
    """
    k = _U1
    while k < np.uint64(64):
        leading = (np.uint64(windows[bit >> _U3]) >> (_LOOKUP_SHIFT - (bit & _U7))) & _LOOKUP_MASK
        entry = np.uint64(tables[base + leading])
        if entry == _U0:
            entry = _long_code(_peek(windows, bit), tables, base)
        size = entry & _U15
        bit += (entry >> _U8) + size
        if size == _U0:
            if entry & np.uint64(0xFF) == _U0 and entry:
                return bit
            if entry & np.uint64(0xFF) != np.uint64(0xF0):
                return _U0
        k += ((entry >> _U4) & _U15) + _U1
    return bit if k == np.uint64(64) else _U0


@njit(cache=True, nogil=True, error_model="numpy")
def _first_band(windows, bit, tables, base, first, last, nonzero):
    """First pass over a band of AC coefficients of one block (T.81 G.1.2.2): (position or 0, blocks skipped after)."""
    k = first
    while k <= last:
        entry = _symbol(windows, bit, tables, base)
        run, size = np.int64((entry >> np.uint64(4)) & np.uint64(15)), entry & np.uint64(15)
        bit += (entry >> _U8) + size
        if entry == _U0:
            return _U0, 0
        if size == _U0 and run < 15:
            skip = (np.int64(1) << run) - 1
            if run:
                skip += np.int64(_peek(windows, bit) >> np.uint64(16 - run))
            return bit + np.uint64(run), skip
        k += run
        if k > last:
            return _U0, 0
        if size:
            nonzero[k] = True
        k += 1
    return bit, 0


@njit(cache=True, nogil=True, error_model="numpy")
def _refine_band(windows, bit, tables, base, first, last, nonzero):
    """A later pass over a band of one block (T.81 G.1.2.3): (position or 0, blocks that have only corrections after).

    Corrections are one bit for each coefficient that is already not zero.
    """
    k = first
    skip = np.int64(0)
    while k <= last:
        entry = _symbol(windows, bit, tables, base)
        run, size = np.int64((entry >> np.uint64(4)) & np.uint64(15)), entry & np.uint64(15)
        if entry == _U0 or size > _U1:
            return _U0, 0
        bit += (entry >> _U8) + size
        if size == _U0 and run < 15:
            skip = np.int64(1) << run
            if run:
                skip += np.int64(_peek(windows, bit) >> np.uint64(16 - run))
            bit += np.uint64(run)
            break
        while k <= last and (nonzero[k] or run > 0):
            if nonzero[k]:
                bit += _U1
            else:
                run -= 1
            k += 1
        if size:
            if k > last:
                return _U0, 0
            nonzero[k] = True
        k += 1
    if skip:
        bit += _corrections(nonzero, k, last)
        skip -= 1
    return bit, skip


@njit(cache=True, nogil=True, error_model="numpy")
def _corrections(nonzero, first, last):
    count = _U0
    for k in range(first, last + 1):
        if nonzero[k]:
            count += _U1
    return count


@njit(cache=True, nogil=True, error_model="numpy")
def _read_band(windows, bit, end, blocks, geometry, tables, first, last, high, nonzero):
    """One segment of a progressive scan over AC coefficients: (status, position)."""
    wide, stride = geometry[0, 2], geometry[0, 4]
    base = np.uint64(_LOOKUP + _TAIL)
    skip = 0
    for block in range(blocks[0], blocks[1]):
        flags = nonzero[block // wide * stride + block % wide]
        if skip:
            skip -= 1
            if high:
                bit += _corrections(flags, first, last)
        elif high:
            bit, skip = _refine_band(windows, bit, tables, base, first, last, flags)
        else:
            bit, skip = _first_band(windows, bit, tables, base, first, last, flags)
        if bit == _U0:
            return _BAD_CODE, bit
        if bit > end:
            return _CUT, bit
    return (_BAD_CODE if skip else 0), bit


@njit(cache=True, nogil=True, error_model="numpy")
def _read_units(windows, bit, end, units, geometry, tables, sequential, high):
    """One segment of a sequential scan, or of a progressive one over DC coefficients: (status, position)."""
    members = len(geometry)
    for _ in range(units):
        for member in range(members):
            dc = np.uint64(2 * member * (_LOOKUP + _TAIL))
            ac = dc + np.uint64(_LOOKUP + _TAIL)
            for _ in range(geometry[member, 0] * geometry[member, 1]):
                if high:
                    bit += _U1
                    continue
                bit = _skip_dc(windows, bit, tables, dc)
                if bit == _U0:
                    return _BAD_CODE, bit
                if sequential:
                    bit = _skip_ac(windows, bit, tables, ac)
                    if bit == _U0:
                        return _BAD_CODE, bit
                # Also keeps the next read inside the windows: one block cannot be longer than their padding.
                if bit > end:
                    return _CUT, bit
    return (_CUT if bit > end else 0), bit


@njit(cache=True, nogil=True, error_model="numpy")
def _close_segment(windows, bit, end):
    """What follows the last code of a segment: 0 nothing, 1 zero bytes, `_LEFT_OVER` anything else."""
    status = 0
    for at in range((bit + _U7) >> _U3, end >> _U3):
        if windows[at] >> np.uint32(24):
            return _LEFT_OVER
        status = 1
    return status


@njit(cache=True, nogil=True, error_model="numpy")
def _read_scan(windows, starts, restart, geometry, tables, progressive, first, last, high, nonzero):
    """Read every code of a scan: 0 whole, 1 whole but not clean, otherwise a key of `_DAMAGE`."""
    units = geometry[0, 2] // geometry[0, 0] * (geometry[0, 3] // geometry[0, 1])
    per_segment = restart if restart > 0 else units
    segments = len(starts) - 1
    if segments != (units + per_segment - 1) // per_segment:
        return _CUT if segments == 1 else _RESTARTS
    bad = 0
    worst = 0
    blocks = np.zeros(2, dtype=np.int64)
    for segment in range(segments):
        bit, end = _U8 * np.uint64(starts[segment]), _U8 * np.uint64(starts[segment + 1])
        blocks[0], blocks[1] = segment * per_segment, min((segment + 1) * per_segment, units)
        if progressive and first > 0:
            status, bit = _read_band(windows, bit, end, blocks, geometry, tables, first, last, high, nonzero)
        else:
            count = blocks[1] - blocks[0]
            status, bit = _read_units(windows, bit, end, count, geometry, tables, not progressive, high)
        if status == 0:
            status = _close_segment(windows, bit, end)
        bad += status > 1
        worst = max(worst, status)
    # Damage cannot strike nearly every segment and leave every restart marker in its place: what looks like that was
    # written like that, and decoders agree on it, since they start anew at each marker.
    if segments >= 8 and 10 * bad >= 9 * segments:
        return 1
    return worst
