"""What a path names by its ending. A folder is a folder, whatever its name ends in."""

from __future__ import annotations

import os

PACKED = ".beton"
TABLE = ".parquet"
TAR = ".tar"


def is_packed(data: str) -> bool:
    """Whether the path or address is that of a packed file."""
    return _is_file(data, PACKED)


def is_table(data: str) -> bool:
    """Whether the path or address is that of a parquet file."""
    return _is_file(data, TABLE)


def is_tar(data: str) -> bool:
    """Whether the path, pattern or address is that of tar files."""
    return _is_file(data, TAR)


def _is_file(data: str, ending: str) -> bool:
    return data.endswith(ending) and not os.path.isdir(data)
