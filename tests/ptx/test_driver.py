"""The launcher against a driver that refuses what a CUDA driver refuses, without a GPU.

It sees a launch in a thread without a context, in another device's context, beyond the limits of a grid, with arguments
of another size than the kernel's, and shared memory that was not asked for. It runs no kernel and knows no streams.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from models.ops.nvrtc import find_nvrtc

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the driver answered, of a process that has it."""
    pytest.importorskip("cuda.bindings", reason="cuda-bindings is not installed")
    compiler = shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("no C compiler")
    try:
        find_nvrtc()
    except RuntimeError as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("driver")
    library = folder / "libcuda.so.1"
    flags = ["-std=gnu11", "-O1", "-Wall", "-Werror", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1"]
    subprocess.run([compiler, *flags, str(HERE / "libcuda.c"), "-o", str(library), "-ldl"], check=True)
    environment = {**os.environ, "XDG_CACHE_HOME": str(folder), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.ptx.driver_session", str(library)]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout)


def test_the_driver_takes_what_is_right_and_refuses_what_is_not(said: dict[str, Any]) -> None:
    assert said["direct"] == {
        "plain": [0, ""],
        "in a cold thread": [201, "no context is current in this thread"],
        "no blocks": [1, "grid or block beyond the limits"],
        "blocks along z": [1, "grid or block beyond the limits"],
        "threads": [1, "grid or block beyond the limits"],
        "shared memory": [1, "more shared memory than was asked for"],
        "no such kernel": [500, "no such kernel in the module"],
        "no cubin": [200, "no cubin"],
        "no context to load in": [201, "a module is loaded without a current context"],
        "shared memory that was asked for": [0, ""],
    }


def test_a_launch_arrives_as_it_was_given(said: dict[str, Any]) -> None:
    launcher = said["launcher"]
    assert launcher["warm"] == "launched" and launcher["same arguments"]
    assert launcher["seen"] == ["batch_norm_move_running", [3, 1, 1], [256, 1, 1], 7]


def test_a_cold_thread_can_launch(said: dict[str, Any]) -> None:
    launcher = said["launcher"]
    assert launcher["cold"] == launcher["augment, cold"] == "launched"
    assert launcher["other device"] == {"result": "launched", "restored": True}


def test_a_grid_beyond_the_limits_is_refused(said: dict[str, Any]) -> None:
    launcher = said["launcher"]
    for refused in (*launcher["grid"], launcher["augment, grid"]):
        assert refused.startswith(("RuntimeError", "ValueError")), refused


def test_arguments_of_the_wrong_size_are_refused(said: dict[str, Any]) -> None:
    for refused in said["launcher"]["sizes"]:
        assert "arguments of the wrong size" in refused


def test_large_shared_memory_is_asked_for(said: dict[str, Any]) -> None:
    assert said["launcher"]["augment"] == "launched"
