"""Everything in a tar file, from its first byte to its last: members, and what is no member.

Python's own listing ends without a word at the first damaged header and at the first end mark, so that images behind
either are lost. Here the listing ends where the file ends, or the file is refused.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

BLOCK = 512
_PIECE = 1 << 20
_EMPTY = bytes(BLOCK)
# Headers that describe the next one. Their bodies are read whole, so a damaged size must not make that gigabytes.
_NOTES = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, b"L", b"K")
_LONGEST_NOTE = 1 << 20


@dataclass(frozen=True)
class Gap:
    """A stretch of a tar file in which no member begins that can be read.

    Attributes:
        start: its first byte.
        end: the byte behind its last, where the next whole header is or the file ends.
    """

    start: int
    end: int

    @property
    def reason(self) -> str:
        """What to tell the user."""
        return f"damaged tar header; {self.end - self.start} bytes up to the next whole one cannot be told apart"


def walk(file: BinaryIO, start: int, end: int, where: str) -> Iterator[tarfile.TarInfo | Gap]:
    """The members of the tar file that fills bytes `start` to `end` of a file, in order.

    Archives that were joined are read one after the other. Behind a damaged header the next whole one is looked for.

    Args:
        file: an uncompressed tar file; its position is moved.
        start: the first byte of the first header.
        end: the byte behind the last one.
        where: what to call the tar file in an error.

    Raises:
        ValueError: it is no uncompressed tar file, or it is cut: a member's data or the end mark are missing.
    """
    archive = _reader(file)
    at, ended, found = start, False, False
    while at < end:
        at, empty = _skip_empty(file, at, end)
        ended = ended or empty
        if at >= end:
            break
        member = _member(archive, file, at)
        if member is None:
            after = _next_header(file, at + BLOCK, end)
            yield Gap(at, after)
            # Where the last header is damaged the gap takes in the end mark, which is the file's last block.
            at, ended = after, ended or (after >= end and _block(file, end - BLOCK) == _EMPTY)
            continue
        if member.offset_data + _data_bytes(member) > end:
            raise ValueError(f"{where} is truncated within {member.name}; copy it again")
        yield member
        at, ended, found = archive.offset, False, True
    # Gaps alone: a compressed file, or no tar file at all.
    if not found and not ended:
        raise ValueError(f"{where} is not an uncompressed tar file or is damaged; copy it again")
    # Without the mark nobody can say how many members are missing behind the last one.
    if not ended:
        raise ValueError(
            f"{where} is cut: the empty block that ends a tar file is missing; copy it again (or, where the program "
            f"that wrote it leaves that out, add it: truncate -s +1024 {where})"
        )


def _reader(file: BinaryIO) -> tarfile.TarFile:
    """What `tarfile` needs to read headers of a file, made without reading one: the first may be a damaged one."""
    archive = tarfile.TarFile(fileobj=io.BytesIO(bytes(2 * BLOCK)), errors="surrogateescape")
    archive.fileobj = file
    return archive


def _block(file: BinaryIO, at: int) -> bytes:
    file.seek(max(at, 0))
    return file.read(BLOCK)


def _data_bytes(member: tarfile.TarInfo) -> int:
    # Links have the size of their target in some archives, and no data.
    return member.size if member.isreg() else 0


def _skip_empty(file: BinaryIO, at: int, end: int) -> tuple[int, bool]:
    """(the first block from `at` on that is not empty, or `end`; whether there was an empty one)."""
    first = at
    file.seek(at)
    while at < end:
        piece = file.read(min(_PIECE, end - at))
        # Padding may be gigabytes of zeros, so whole pieces are compared first.
        if piece.count(0) == len(piece):
            at += len(piece)
            continue
        filled = len(piece) - len(piece.lstrip(b"\0"))
        at += filled // BLOCK * BLOCK
        break
    return at, at - first >= BLOCK


def _member(archive: tarfile.TarFile, file: BinaryIO, at: int) -> tarfile.TarInfo | None:
    """The member whose header is at `at`; None where there is no header that can be read.

    The archive's `offset` is behind the member afterwards.
    """
    if not _is_header(_block(file, at)):
        return None
    file.seek(at)
    try:
        return tarfile.TarInfo.fromtarfile(archive)
    # The tar module raises these, and some plain ones for a nonsensical extended header.
    except (tarfile.TarError, ValueError, KeyError, IndexError):
        return None


def _is_header(block: bytes) -> bool:
    try:
        info = tarfile.TarInfo.frombuf(block, tarfile.ENCODING, "surrogateescape")
    except (tarfile.TarError, ValueError):
        return False
    return info.size >= 0 and (info.type not in _NOTES or info.size <= _LONGEST_NOTE)


def _next_header(file: BinaryIO, at: int, end: int) -> int:
    """The first block from `at` on whose checksum is that of a header, or `end`."""
    while at < end:
        file.seek(at)
        piece = file.read(min(_PIECE, end - at))
        for place in range(0, len(piece) - BLOCK + 1, BLOCK):
            # Nearly every block of image data fails this; the checksum itself costs twenty times as much.
            if piece[place + 148 : place + 154].strip(b" \0").isdigit():
                if _is_header(piece[place : place + BLOCK]):
                    return at + place
        at += len(piece)
    return end
