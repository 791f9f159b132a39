"""The entropy-coded data of a JPEG, read code by code in compiled Python and counted, without making pixels.

A scan's bytes are first copied without stuffing; from then on the only state is the number of the next bit, and
`windows[i]` holds the four bytes from byte i on, so that the next 25 bits are one load and one shift. Positions are
unsigned: for a signed index numba adds a test for counting from the end.

Source: ITU-T T.81, annexes C and F (sequential) and G (progressive).
"""

from __future__ import annotations

import numpy as np
from numba import njit

# What `read_scan` finds: 0 is whole, 1 whole but not clean.
CUT, BAD_CODE, LEFT_OVER, RESTARTS = 2, 3, 4, 5
# Words of zeros behind a scan's bytes: more than the longest block has bits, so that a cut scan needs no test per code.
PADDING = 512

_LOOKUP_BITS = 10
_LOOKUP = 1 << _LOOKUP_BITS
_TAIL = 36 + 256  # limits and symbols behind a lookup table, for the codes that are longer
TABLE = _LOOKUP + _TAIL
"""Entries of a code table, as `build_codes` fills it."""
_LOOKUP_SHIFT, _LOOKUP_MASK = np.uint64(32 - _LOOKUP_BITS), np.uint64(_LOOKUP - 1)
_U0, _U1, _U3, _U4, _U7, _U8, _U15, _U16 = (np.uint64(n) for n in (0, 1, 3, 4, 7, 8, 15, 16))


@njit(cache=True, nogil=True, error_model="numpy")
def build_codes(counts, symbols, table):
    """Fill a code table of `TABLE` entries; False where the counts form no prefix code.

    The first part maps the leading bits to length << 8 | symbol, 0 for longer codes. Then, for n in 1..16:
    table[_LOOKUP + n] is the first 16-bit value too large for a code of n bits, table[_LOOKUP + 17 + n] what to add to
    a code of n bits to get the position of its symbol; then the symbols.
    """
    code = 0
    position = 0
    for length in range(1, 17):
        count = np.int64(counts[length - 1])
        table[_LOOKUP + 17 + length] = position - code
        # More codes than there are bit patterns left.
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
def unstuff(data, position, windows, starts):
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
            # Any number of fill bytes may stand before a marker.
            while after < size and data[after] == 0xFF:
                after += 1
            if after >= size:
                position = size
                break
            if 0xD0 <= data[after] <= 0xD7:
                # Restart markers count modulo 8, so a lost or doubled one shows.
                if data[after] != 0xD0 + ((segments - 1) & 7):
                    return -1, position
                starts[segments] = length
                segments += 1
                position = after + 1
                continue
            # Another marker ends the scan; FF 00 is a stuffed FF.
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
    windows[length + 3 : length + PADDING] = 0
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
        # A run counts coefficients that are still zero; the others take a correction bit each on the way.
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
            return BAD_CODE, bit
        if bit > end:
            return CUT, bit
    return (BAD_CODE if skip else 0), bit


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
                    return BAD_CODE, bit
                if sequential:
                    bit = _skip_ac(windows, bit, tables, ac)
                    if bit == _U0:
                        return BAD_CODE, bit
                # Also keeps the next read inside the windows: one block cannot be longer than their padding.
                if bit > end:
                    return CUT, bit
    return (CUT if bit > end else 0), bit


@njit(cache=True, nogil=True, error_model="numpy")
def _close_segment(windows, bit, end):
    """What follows the last code of a segment: 0 nothing, 1 zero bytes, `LEFT_OVER` anything else."""
    status = 0
    for at in range((bit + _U7) >> _U3, end >> _U3):
        if windows[at] >> np.uint32(24):
            return LEFT_OVER
        status = 1
    return status


@njit(cache=True, nogil=True, error_model="numpy")
def read_scan(windows, starts, restart, geometry, tables, progressive, first, last, high, nonzero):
    """Read every code of a scan: 0 for whole, 1 for whole but not clean, otherwise one of the kinds of damage above."""
    units = geometry[0, 2] // geometry[0, 0] * (geometry[0, 3] // geometry[0, 1])
    per_segment = restart if restart > 0 else units
    segments = len(starts) - 1
    if segments != (units + per_segment - 1) // per_segment:
        return CUT if segments == 1 else RESTARTS
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
        # What follows the last code tells a whole segment from one with bytes lost in the middle.
        if status == 0:
            status = _close_segment(windows, bit, end)
        bad += status > 1
        worst = max(worst, status)
    # Damage cannot strike nearly every segment and leave every restart marker in its place: what looks like that was
    # written like that, and decoders agree on it, since they start anew at each marker.
    if segments >= 8 and 10 * bad >= 9 * segments:
        return 1
    return worst
