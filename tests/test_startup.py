"""A mistyped flag and `--help` are answered before PyTorch is imported: what a command costs until then."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from models.hyperparameters import ARCHITECTURES, CONFIGS
from models.methods import METHODS
from models.resnet import BACKBONES
from tests.test_layout import entry_files
from tools import analyze
from tools.support.analyses import ANALYSES
from tools.support.export_place import ENDINGS
from tools.support.exports import TARGETS

ROOT = Path(__file__).resolve().parents[1]
SLOW = ("torch", "numba", "torchvision", "scipy", "matplotlib")
"""Packages whose import takes a good part of a second or more."""

DRIVER = """
import contextlib, io, json, os, resource, runpy, sys

command = json.loads(sys.argv[1])
sys.argv[:] = command
sys.path[0] = os.path.dirname(command[0])  # as Python does for a script
said = io.StringIO()
code = 0
with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
    try:
        runpy.run_path(command[0], run_name="__main__")
    except SystemExit as end:
        code = end.code or 0
used = resource.getrusage(resource.RUSAGE_SELF)
print(json.dumps({
    "code": code, "said": said.getvalue(), "modules": sorted(sys.modules), "cpu_s": used.ru_utime + used.ru_stime
}))
"""


def answer(*command: str) -> dict:
    """What one command did in a fresh interpreter: exit code, text, imported modules and seconds of CPU time."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, json.dumps(command)], capture_output=True, text=True, env=environment, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def commands() -> list[tuple[str, ...]]:
    """Every command but those that measure or prove, which nobody meets first; words before the flag stand with it."""
    found: list[tuple[str, ...]] = []
    for path in entry_files():
        if path.stem == "evaluate":
            found += [(str(path), "knn"), (str(path), "detect"), (str(path), "segment")]
        elif path.stem == "main":
            found += [(str(path), "--method", "regioncl-m")]
        elif not path.stem.startswith(("bench_", "record_", "plot_", "gpu_", "prove_")):
            found += [(str(path),)]
    return found


@pytest.mark.parametrize("command", commands(), ids=lambda command: " ".join([Path(command[0]).name, *command[1:]]))
def test_help_and_a_mistyped_flag_need_no_torch(command: tuple[str, ...]) -> None:
    for flag, wanted in (("--no-such-flag", 2), ("--help", 0)):
        found = answer(*command, flag)
        assert found["code"] == wanted, found["said"]
        assert not set(SLOW) & set(found["modules"]), f"{flag}: imports {set(SLOW) & set(found['modules'])}"
        assert found["cpu_s"] < 1.0, found["cpu_s"]


def test_a_wrong_value_needs_no_torch() -> None:
    found = answer(str(ROOT / "train/main.py"), "--method", "care", "--data", "photos", "--dim", "0")
    assert found["code"] == 2 and "--dim" in found["said"] and "torch" not in found["modules"]


def test_a_place_that_an_export_cannot_have_needs_no_torch() -> None:
    found = answer(str(ROOT / "tools/export_backbone.py"), "run", "out.bin", "--format", "onnx")
    assert found["code"] == 2 and "ends in .onnx" in found["said"] and "torch" not in found["modules"]


def test_the_compiler_is_not_imported_with_batch_norm() -> None:
    program = "import sys, models.norm; print('torch._dynamo' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "False", done.stderr


def test_names_known_before_torch_are_those_that_there_are() -> None:
    assert tuple(BACKBONES) == ARCHITECTURES
    assert {name: method.Config for name, method in METHODS.items()} == CONFIGS and list(METHODS) == list(CONFIGS)
    assert tuple(ENDINGS) == tuple(TARGETS) and analyze.ANALYSES == tuple(ANALYSES)
