"""The C++ pass against the PyTorch definition on the same parameters."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline import augment, augment_native
from pipeline.augment import COLUMN, COLUMNS, JITTER_ORDERS, PROFILES, AugmentParams, apply, draw, params_from_table

from .test_augment import SSL_PROFILES, levels_of, sample_images

needs_native = pytest.mark.skipif(augment_native.library() is None, reason="no C++ compiler")
TOLERANCE = 2e-3  # grey levels: float rounding


def reference(images: torch.Tensor, params: AugmentParams) -> torch.Tensor:
    return levels_of(apply(images, params, torch.float64))


def processor_lanes() -> list[int]:
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return [4] + [8] * ("avx2" in flags and "fma" in flags) + [16] * ("avx512dq" in flags and "avx512vl" in flags)


def native(
    images: torch.Tensor, params: AugmentParams, dtype: torch.dtype = torch.float32, **options: int
) -> torch.Tensor:
    radius = params.blur_radius(images)
    return augment_native.augment(images, params.table, params.profile.gray_first, radius, dtype, **options)


@needs_native
@pytest.mark.parametrize("lanes", processor_lanes())
@pytest.mark.parametrize("name", [*SSL_PROFILES, "linear", "none"])
def test_native_agrees_with_the_definition(name, lanes):
    for side in (64, 33):  # whole vectors, and a rest of every kind
        images = sample_images(25, side)
        for view in range(PROFILES[name].num_views):
            params = draw(name, 5, 0, np.arange(25), view)
            difference = levels_of(native(images, params, lanes=lanes)) - reference(images, params)
            assert difference.abs().max() < TOLERANCE


@needs_native
@pytest.mark.parametrize("side", [2, 3, 5, 15, 16, 17, 31, 65, 224])
def test_native_agrees_on_odd_sizes(side):
    images = sample_images(10, side)
    for lanes in processor_lanes():
        params = draw("byol", 1, 0, np.arange(10), 0)
        assert (levels_of(native(images, params, lanes=lanes)) - reference(images, params)).abs().max() < TOLERANCE


@needs_native
def test_native_handles_images_that_are_not_square():
    images = sample_images(6, 48)[:, :, :21, :]
    params = draw("byol-care", 1, 0, np.arange(6), 1)
    assert (levels_of(native(images, params)) - reference(images, params)).abs().max() < TOLERANCE


def all_orders_table(name: str) -> np.ndarray:
    """(24, 14): every order of the jitter, with changing combinations of the profile's other operations."""
    table = np.zeros((24, len(COLUMNS)), dtype=np.float32)
    for bit, column in enumerate(("flip", "gray", "blur", "solarize")):
        if column in PROFILES[name].operations:
            table[:, COLUMN[column]] = (np.arange(24) * 5 + 3) >> bit & 1
    for column, value in (("brightness", 1.4), ("contrast", 0.6), ("saturation", 1.4), ("hue", -0.4), ("jitter", 1)):
        table[:, COLUMN[column]] = value
    table[:, COLUMN["order0"] : COLUMN["order0"] + 4] = JITTER_ORDERS
    table[:, COLUMN["sigma"]] = 0.1 + np.arange(24) / 13
    return table


@needs_native
@pytest.mark.parametrize("name", ["mocov2", "mocov1", "byol-care", "byol"])
def test_native_keeps_every_order_of_jitter_with_every_other_operation(name):
    images = sample_images(24, 40)
    params = params_from_table(name, all_orders_table(name))
    assert (levels_of(native(images, params)) - reference(images, params)).abs().max() < TOLERANCE


@needs_native
def test_native_output_types():
    images = sample_images(20, 50)
    params = draw("byol", 3, 0, np.arange(20), 1)
    exact = native(images, params)
    assert torch.equal(native(images, params, torch.bfloat16), exact.bfloat16())
    assert torch.equal(native(images, params, torch.float16), exact.half())
    grey_levels = native(images, params, torch.uint8)
    assert (grey_levels - levels_of(exact)).abs().max() <= 0.501
    for result in (exact, grey_levels):
        assert result.is_contiguous(memory_format=torch.channels_last)
    with pytest.raises(ValueError, match="not torch.float64"):
        native(images, params, torch.float64)


@needs_native
def test_native_is_the_same_for_any_layout_threads_and_batch():
    images = sample_images(11, 37)
    params = draw("mocov2", 3, 0, np.arange(11), 0)
    whole = native(images, params, threads=1)
    assert torch.equal(whole, native(images, params, threads=3))
    assert torch.equal(whole, native(images.to(memory_format=torch.channels_last), params))
    for number in range(11):
        alone = native(images[number : number + 1], draw("mocov2", 3, 0, np.array([number]), 0))
        assert torch.equal(alone[0], whole[number])
    assert native(images[:0], draw("mocov2", 3, 0, np.arange(0), 0)).shape == (0, 3, 37, 37)


@needs_native
def test_native_refuses_what_it_cannot_do():
    images, params = sample_images(2, 8), draw("mocov2", 0, 0, np.arange(2), 0)
    with pytest.raises(ValueError, match="8 x 8 px with a blur of 8"):
        augment_native.augment(images, params.table, False, 8)
    with pytest.raises(ValueError, match="no registers of 5 floats"):
        native(images, params, lanes=5)


def test_choice_of_implementation_and_its_reasons():
    cpu = torch.device("cpu")
    fastest = "native" if augment_native.library() is not None else "reference"
    assert augment.choose_implementation(cpu, torch.float32)[0] == fastest
    assert augment.choose_implementation(cpu, torch.float64)[0] == "reference"
    assert augment.choose_implementation(torch.device("cuda"), torch.float16)[0] == "reference"
    with pytest.raises(ValueError, match="choose one of auto, reference, native"):
        augment.choose_implementation(cpu, torch.float32, "fast")
    with pytest.raises(ValueError, match="use 'auto'"):
        augment.choose_implementation(torch.device("cuda"), torch.float32, "native")
    images, params = sample_images(3, 24), draw("byol", 0, 0, np.arange(3), 0)
    definition = apply(images, params, implementation="reference")
    assert torch.equal(apply(images, params), definition) == (fastest == "reference")
    assert (levels_of(apply(images, params)) - levels_of(definition)).abs().max() < TOLERANCE


def test_without_a_compiler_the_definition_takes_over_and_says_so_once(tmp_path):
    program = (
        "import numpy as np, torch\n"
        "from pipeline.augment import apply, draw\n"
        "images = torch.zeros(2, 3, 16, 16, dtype=torch.uint8)\n"
        "for _ in range(3):\n"
        "    params = draw('byol', 0, 0, np.arange(2), 0)\n"
        "    assert torch.equal(apply(images, params), apply(images, params, implementation='reference'))\n"
    )
    preamble = (
        "import pipeline.native_build as build\n"
        "def refuse(*arguments): raise build.NativeUnavailable('no C++ compiler was found')\n"
        "build.build = refuse\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", preamble + program],
        cwd=Path(__file__).resolve().parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stderr.count("many times slower") == 1
