"""One scan of a JPEG: its header, what it may code at this point of the file, and the tables it needs.

Source: ITU-T T.81, annexes B (scan header), F (sequential) and G (progressive).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from .jpeg_entropy import BAD_CODE, CUT, LEFT_OVER, PADDING, RESTARTS, TABLE, read_scan, unstuff
from .refusal import ImageRefused

_NO_FLAGS = np.zeros((0, 64), dtype=np.bool_)
_DAMAGE = {
    CUT: "truncated JPEG: the coded image ends too early",
    BAD_CODE: "damaged JPEG: a code that does not exist",
    LEFT_OVER: "damaged JPEG: coded data left over",
    RESTARTS: "damaged JPEG: restart markers are missing or too many",
}


@dataclass
class Component:
    """One colour component of a frame, and how far its scans have come; sides in blocks of 8 x 8 samples."""

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
class Scan:
    """A scan's header.

    Attributes:
        members: the components that it codes.
        selectors: for each of them, DC table number << 4 | AC table number.
        first: first coefficient, 0..63.
        last: last coefficient.
        high: bits that earlier scans have left out of these coefficients, 0 for a first scan.
        low: bits that this scan leaves out.
        progressive: whether the frame is.
    """

    members: list[Component]
    selectors: list[int]
    first: int
    last: int
    high: int
    low: int
    progressive: bool

    @property
    def usual(self) -> bool:
        """Whether the numbers of a sequential scan are what they must be; decoders ignore others, with a warning."""
        return (self.first, self.last, self.high, self.low) == (0, 63, 0, 0)

    def check_progression(self) -> None:
        """Each coefficient must come first with some of its bits left out, then bit by bit (T.81 G.1.1.1)."""
        members, first, last, high, low = self.members, self.first, self.last, self.high, self.low
        band_fits = last == 0 if first == 0 else first <= last <= 63 and len(members) == 1
        if not band_fits or low > 13 or (high and high != low + 1):
            raise ImageRefused("damaged JPEG: impossible progression")
        for c in members:
            if any(c.precision[k] != (high if high else -1) for k in range(first, last + 1)):
                raise ImageRefused("damaged JPEG: impossible progression")
            # AC coefficients may follow only when the DC coefficient has been sent.
            if first and c.precision[0] < 0:
                raise ImageRefused("damaged JPEG: impossible progression")
            c.precision[first : last + 1] = [low] * (last + 1 - first)
            # Only refinements need to know which coefficients are not zero; sequential files never pay for it.
            if first and c.nonzero is None:
                c.nonzero = np.zeros((c.padded_wide * c.padded_high, 64), dtype=np.bool_)

    def geometry(self) -> np.ndarray:
        """Rows (h, v, blocks wide, blocks high in this scan, stride of the flags); one component has no padding."""
        if len(self.members) == 1:
            c = self.members[0]
            return np.array([[1, 1, c.blocks_wide, c.blocks_high, c.padded_wide]], dtype=np.int64)
        rows = [[c.h, c.v, c.padded_wide, c.padded_high, c.padded_wide] for c in self.members]
        return np.array(rows, dtype=np.int64)

    def tables(self, codes: dict[int, np.ndarray]) -> np.ndarray:
        """Code tables of this scan, for each member DC then AC; one that the scan does not use stays empty."""
        # One array for compiled code, which cannot look up a dict.
        tables = np.zeros((len(self.members), 2, TABLE), dtype=np.int32)
        uses_dc, uses_ac = self.first == 0 and self.high == 0, self.first > 0
        if not self.progressive:
            uses_dc = uses_ac = True
        for row, selector in enumerate(self.selectors):
            for kind, used, slot in ((0, uses_dc, selector >> 4), (1, uses_ac, 0x10 | (selector & 15))):
                if used and slot not in codes:
                    raise ImageRefused("damaged JPEG: a Huffman table is missing")
                if used:
                    tables[row, kind] = codes[slot]
        return tables.reshape(-1)

    def read(
        self, data: np.ndarray, position: int, restart_interval: int, codes: dict[int, np.ndarray]
    ) -> tuple[int, bool]:
        """Read every code of the scan.

        Args:
            data: the whole file, uint8.
            position: of the first coded byte.
            restart_interval: units between restart markers, 0 for none.
            codes: code tables by slot.

        Returns:
            (position of the next marker, whether decoders read the scan without a warning).

        Raises:
            ImageRefused: the coded data are cut or damaged, or a code table is missing.
        """
        rest = len(data) - position
        # Every byte may be data, every second one a restart marker: no growing while compiled code writes.
        windows = np.empty(rest + PADDING, dtype=np.uint32)
        starts = np.empty(rest // 2 + 2, dtype=np.int64)
        segments, end = unstuff(data, position, windows, starts)
        if segments < 0:
            raise ImageRefused("damaged JPEG: restart markers out of order")
        if end >= len(data):
            raise ImageRefused("truncated JPEG: it ends inside the coded image")
        nonzero = self.members[0].nonzero
        status = read_scan(
            windows[3:],
            starts[: segments + 1],
            restart_interval,
            self.geometry(),
            self.tables(codes),
            self.progressive,
            self.first,
            self.last,
            self.high,
            _NO_FLAGS if nonzero is None else nonzero,
        )
        if status > 1:
            raise ImageRefused(_DAMAGE[status])
        for component in self.members:
            component.scanned = True
        return end, status == 0


def parse_scan(body: bytes, components: list[Component], quantizers: set[int], progressive: bool) -> Scan:
    """The scan that a header announces.

    Args:
        body: the header segment without marker and length.
        components: of the frame.
        quantizers: numbers of the quantisation tables that the file has defined so far.
        progressive: whether the frame is.

    Raises:
        ImageRefused: the header names what is not there, or has an impossible length.
    """
    if not components:
        raise ImageRefused("damaged JPEG: coded data before the frame header")
    count = body[0] if body else 0
    if not 1 <= count <= 4 or len(body) != 4 + 2 * count:
        raise ImageRefused("damaged JPEG: a scan header of wrong length")
    members: list[Component] = []
    for identifier in body[1 : 1 + 2 * count : 2]:
        found = [c for c in components if c.identifier == identifier and c not in members]
        if not found or (found[0].scanned and not progressive):
            raise ImageRefused("damaged JPEG: a scan names components wrongly")
        members.append(found[0])
    # T.81 B.2.3; the compiled reader relies on a bounded unit.
    if count > 1 and sum(c.h * c.v for c in members) > 10:
        raise ImageRefused("damaged JPEG: too many blocks in a unit")
    if any(c.quantizer not in quantizers for c in members):
        raise ImageRefused("damaged JPEG: a quantisation table is missing")
    selectors = list(body[2 : 2 + 2 * count : 2])
    return Scan(members, selectors, body[-3], body[-2], body[-1] >> 4, body[-1] & 15, progressive)
