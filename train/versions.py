"""What software a run used, for `config.json` and benchmark rows."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from pathlib import Path

_PACKAGES = (
    "torch",
    "torchvision",
    "numpy",
    "numba",
    "triton",
    "ffcv",
    "nvidia-dali-cuda130",
    "webdataset",
    "safetensors",
)


def commit() -> str:
    """The checkout's commit, with `+` when files differ from it; empty outside a git checkout."""
    root = Path(__file__).resolve().parents[1]
    try:
        # With time limits: on a network disk git may hang, and a run must not wait for its own name.
        head = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "--short=12", "HEAD"],
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        ).stdout.strip()
        changed = subprocess.run(
            ["git", "-C", str(root), "status", "--porcelain", "-uno"],
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
    return head + ("+" if changed else "")


def versions() -> dict[str, str]:
    """Python, commit and the versions of the packages that decide a run's numbers."""
    found = {"python": platform.python_version(), "commit": commit()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
