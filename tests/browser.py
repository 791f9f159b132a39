"""Look at a page with a headless Chromium: what it says on its console, whether it overflows, and its contrasts."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
_LOOK = """
function channel(c) { c /= 255; return c <= 0.03928 ? c / 12.92 : Math.pow((c + 0.055) / 1.055, 2.4); }
function parse(text) {
  const found = text.match(/[\\d.]+/g);
  return found && text.startsWith('rgb') ? found.map(Number) : null;
}
function light(rgb) { return 0.2126 * channel(rgb[0]) + 0.7152 * channel(rgb[1]) + 0.0722 * channel(rgb[2]); }
function ratio(a, b) {
  const [x, y] = [light(a), light(b)].sort((p, q) => q - p);
  return (x + 0.05) / (y + 0.05);
}
function behind(view, element) {
  for (let at = element; at; at = at.parentElement) {
    const colour = parse(view.getComputedStyle(at).backgroundColor);
    if (colour && (colour.length < 4 || colour[3] > 0.99)) return colour;
  }
  return [255, 255, 255];
}
function look(view) {
  const page = view.document, low = [];
  const walk = page.createTreeWalker(page.body, NodeFilter.SHOW_TEXT);
  let texts = 0;
  while (walk.nextNode()) {
    const element = walk.currentNode.parentElement, style = view.getComputedStyle(element);
    if (!walk.currentNode.data.trim() || ['TITLE', 'STYLE', 'SCRIPT', 'title'].includes(element.tagName)) continue;
    texts++;
    const colour = parse(element instanceof view.SVGElement ? style.fill : style.color);
    if (!colour) { low.push([walk.currentNode.data.slice(0, 40), 0]); continue; }
    const found = ratio(colour, behind(view, element));
    if (found < 4.5) low.push([walk.currentNode.data.slice(0, 40), found]);
  }
  // A line of a curve is no text: three to one tells it from its ground.
  for (const line of page.querySelectorAll('polyline.line')) {
    const found = ratio(parse(view.getComputedStyle(line).stroke), behind(view, line));
    if (found < 3) low.push(['a curve', found]);
  }
  return {
    width: view.innerWidth, needs: page.documentElement.scrollWidth, texts: texts, low: low.slice(0, 8),
    dark: view.matchMedia('(prefers-color-scheme: dark)').matches,
    broken: [...page.images].filter(each => !each.complete || !each.naturalWidth).length,
  };
}
"""


@dataclass(frozen=True)
class Look:
    """What one look at a page found.

    Attributes:
        width: pixels that the page has.
        needs: pixels that it would need; more than `width` scrolls sideways.
        texts: pieces of text that were looked at.
        low: (text, ratio) of those with too little contrast to their ground, and of curves.
        dark: whether the page was asked for its dark form.
        broken: pictures that do not show.
        console: lines on the browser's console.
    """

    width: int
    needs: int
    texts: int
    low: list[Any]
    dark: bool
    broken: int
    console: list[str]


def browser() -> str | None:
    """Path of a Chromium on this machine, None where there is none."""
    return next((path for name in _NAMES if (path := shutil.which(name))), None)


def look(page: Path, folder: Path, width: int, dark: bool) -> Look:
    """Open a page in a frame of a width, in its light or dark form.

    Args:
        page: HTML file.
        folder: where the frame around it may be written.
        width: pixels; a window of its own cannot be as narrow as a phone.
        dark: which form is asked for.
    """
    content = html.escape(page.read_text(encoding="utf-8"), quote=True)
    around = folder / "around.html"
    around.write_text(
        f'<!doctype html><meta charset="utf-8"><iframe id="frame" width="{width}" height="900" srcdoc="{content}">'
        f"</iframe><pre id='found'></pre><script>{_LOOK}"
        "const frame = document.getElementById('frame');"
        "frame.onload = () => { for (const each of frame.contentDocument.querySelectorAll('details')) each.open = true;"
        "document.getElementById('found').textContent = JSON.stringify(look(frame.contentWindow)); };</script>",
        encoding="utf-8",
    )
    command = [
        str(browser()),
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--enable-logging=stderr",
        f"--user-data-dir={folder / 'profile'}",
        f"--blink-settings=preferredColorScheme={0 if dark else 1}",
        "--virtual-time-budget=4000",
        "--window-size=1600,1000",
        "--dump-dom",
        around.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found and found[1], done.stderr[-2000:]
    console = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
    return Look(**json.loads(html.unescape(found[1])), console=console)
