"""Parts of a Markdown page that are drawn from rows: what stands between `<!-- KIND NAME -->` and `<!-- end -->`."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path


def redraw(page: Path, kinds: Mapping[str, Callable[[str], str]]) -> list[str]:
    """Draw the marked parts of a page anew.

    Args:
        page: Markdown.
        kinds: what draws a part of each kind, from the name in its mark.

    Returns:
        The marks found, as "KIND NAME".
    """
    found: list[str] = []

    def draw(match: re.Match[str]) -> str:
        found.append(f"{match[1]} {match[2]}")
        return f"<!-- {found[-1]} -->\n\n{kinds[match[1]](match[2])}\n\n<!-- end -->"

    marks = rf"<!-- ({'|'.join(kinds)}) (\S+) -->.*?<!-- end -->"
    page.write_text(re.sub(marks, draw, page.read_text(encoding="utf-8"), flags=re.DOTALL), encoding="utf-8")
    return found
