"""The example of a new method in models/README.md runs as it is printed there."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path

import pytest

import train.main
import train.recipes
from models.methods import METHODS
from tests.runs import rows

ROOT = Path(__file__).resolve().parents[1]


def example_source() -> str:
    """The Python block under "Adding a method"."""
    section = (ROOT / "models" / "README.md").read_text().split("## Adding a method")[1].split("\n## ")[0]
    found = re.search(r"```python\n(.*?)```", section, re.DOTALL)
    assert found, "models/README.md shows no Python under 'Adding a method'"
    return found.group(1)


def test_the_readme_s_method_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("example_method")
    # A dataclass looks its module up to resolve annotations.
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(example_source(), "README.md", "exec"), vars(module))
    monkeypatch.setitem(METHODS, "align", module.Align)
    monkeypatch.setitem(train.recipes.RECIPES, "align", ("align", module.align))
    argv = (
        "--method align --loader synthetic --data 64 --arch resnet18 --image-size 32 --global-batch 8 --max-steps 2 "
        f"--log-every 1 --holdout 4 --device cpu --dim 16 --run-dir {tmp_path / 'run'}"
    ).split()
    assert train.main.main(argv) == 0
    losses = [row["loss"] for row in rows(tmp_path / "run", "train")]
    assert len(losses) == 2 and losses[0] != losses[1]
