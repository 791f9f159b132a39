"""What a file that is no data set is, by its first bytes, and what its owner should do with it."""

from __future__ import annotations

from pathlib import Path

_HEAD_BYTES = 264
_UNPACK = "unpack it and give the folder"
_FRAMES = "take single frames out of it (ffmpeg -i VIDEO FOLDER/%06d.jpg) and give their folder"
_ONE_IMAGE = "give the folder it lies in"

# (offset, bytes there, what it is, what to do). The marks are those of the formats' own specifications.
_MARKS: tuple[tuple[int, bytes, str, str], ...] = (
    (0, b"PK\x03\x04", "a zip archive", _UNPACK),
    (0, b"PK\x05\x06", "a zip archive", "it is empty"),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive", _UNPACK),
    (0, b"Rar!\x1a\x07", "a rar archive", _UNPACK),
    (0, b"\x1f\x8b", "a gzip archive", _UNPACK),
    (0, b"BZh", "a bzip2 archive", _UNPACK),
    (0, b"\xfd7zXZ\x00", "an xz archive", _UNPACK),
    (0, b"\x28\xb5\x2f\xfd", "a zstd archive", _UNPACK),
    (257, b"ustar", "a tar archive", "name it with the ending .tar"),
    (4, b"ftypheic", "an image", _ONE_IMAGE),
    (4, b"ftypmif1", "an image", _ONE_IMAGE),
    (4, b"ftypavif", "an image", _ONE_IMAGE),
    (4, b"ftyp", "a video", _FRAMES),
    (0, b"\x1a\x45\xdf\xa3", "a video", _FRAMES),
    (8, b"AVI ", "a video", _FRAMES),
    (8, b"WEBP", "an image", _ONE_IMAGE),
    (0, b"\xff\xd8\xff", "an image", _ONE_IMAGE),
    (0, b"\x89PNG\r\n\x1a\n", "an image", _ONE_IMAGE),
    (0, b"GIF8", "an image", _ONE_IMAGE),
)


def foreign_kind(path: Path) -> str:
    """What a file is that can be no list of paths, with its remedy, such as "is a zip archive: unpack it ...".

    Args:
        path: an existing file; only its first bytes are read.

    Returns:
        The rest of a sentence that begins with the path; empty for a file of any other kind, a text file above all.
    """
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    for offset, mark, what, remedy in _MARKS:
        if head[offset : offset + len(mark)] == mark:
            return f"is {what}: {remedy}"
    return ""
