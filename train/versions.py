"""What software and what machine a run used, for `config.json` and benchmark rows."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

import torch

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


def machine(device: torch.device) -> str:
    """What a run computes on: the GPU's name, or the processor's with the cores that this process may use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{cpu_name()}, {usable_cores()} cores"


@functools.cache
def cpu_name() -> str:
    """Model name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    named = next((line.partition(":")[2].strip() for line in lines if line.lower().startswith("model name")), "")
    return named or platform.processor() or platform.machine()


def usable_cores() -> int:
    """Cores this process may run on."""
    # Not the machine's cores: a container or a scheduler may allow fewer.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def versions() -> dict[str, str]:
    """Python, commit and the versions of the packages that decide a run's numbers."""
    found = {"python": platform.python_version(), "commit": commit()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
