"""The benchmark of the host's time: CUDA code of PyTorch on a device that does nothing, and what a step launches."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


def rows(tmp_path: Path, *flags: str) -> dict[tuple[str, str], float]:
    """(contender, metric) -> median of one run of the benchmark."""
    table = tmp_path / "rows.csv"
    command = [sys.executable, "tools/bench_host.py", *flags, "--output", str(table)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    with table.open() as file:
        return {(row["contender"], row["metric"]): float(row["median"]) for row in csv.DictReader(file)}


@pytest.mark.skipif(not torch.version.cuda, reason="this PyTorch has no CUDA code")
def test_a_step_on_the_idle_device(tmp_path: Path) -> None:
    found = rows(tmp_path, "--methods", "moco-v2", "--arch", "resnet18", "--batch", "64", "--rounds", "2")
    launches = {name: found[name, "launches of a step"] for name in ("plain", "ours", "ours + kernels")}
    assert launches["ours + kernels"] < launches["plain"] < launches["ours"]
    assert all(found[name, "host time of a step"] > 0 for name in launches)
