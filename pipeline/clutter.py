"""What systems and programs leave in people's folders: no data, although some of it looks like images."""

from __future__ import annotations

import re
from collections.abc import Iterable

# Folders of network storage, of systems' bins and of archives, in lower case. Names that begin with a dot are clutter
# anyway.
_FOLDERS = frozenset(
    {
        "@eadir",  # Synology: thumbnails of every photo beside it
        "@tmp",
        "@recycle",  # QNAP
        "@recently-snapshot",
        "#recycle",  # Synology
        "#snapshot",
        "$recycle.bin",  # Windows
        "recycler",
        "system volume information",
        "__macosx",  # companions that macOS puts into archives
        "lost+found",
        "__pycache__",
    }
)
_LOST = re.compile(r"found\.\d{3}")  # what Windows saved from a damaged disk
_FILES = frozenset({"thumbs.db", "ehthumbs.db", "desktop.ini"})


def is_clutter(name: str) -> bool:
    """Whether a file or folder of this name belongs to a system or an editor and not to the data.

    Hidden names (`._photo.jpg` of macOS, `.ipynb_checkpoints`, `.@__thumb`), folders of network storage and bins,
    lock files and copies of editors (`~$x`, `x~`, `#x#`), and thumbnails that Synology names `SYNOPHOTO_THUMB_…`.

    Args:
        name: one part of a path.
    """
    lower = name.lower()
    if lower.startswith((".", "~$", "synophoto_thumb", "synofile_thumb")) or lower in _FOLDERS or lower in _FILES:
        return True
    return (
        bool(_LOST.fullmatch(lower))
        or lower.endswith("~")
        or (len(lower) > 2 and lower.startswith("#") and lower.endswith("#"))
    )


def has_clutter(parts: Iterable[str]) -> bool:
    """Whether a path leads through clutter.

    Args:
        parts: the path's parts below the folder that the user gave. A folder that the user names is data, whatever its
            name.
    """
    return any(is_clutter(part) for part in parts)
