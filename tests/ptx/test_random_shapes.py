"""All kernels on PTX on random shapes, odd ones included: the checks of memory, order and value of every launch.

python -m pytest tests/ptx/test_random_shapes.py -m slow
python -m tests.ptx.report                                  the same shapes on real threads, too, and the planted faults
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch

from tests import pooling_cases, test_batch_norm_act

from .cases import BF16, F16, F32, Case, augmented, box, norm, soft
from .module import PtxModule, need_tools, watched_tensors
from .test_ptx import on

DTYPES = (F32, F16, BF16)
EACH = 60
"""Shapes of each family of kernels."""


def near(name: str, ours: torch.Tensor, eager: torch.Tensor, exact: torch.Tensor) -> None:
    """Few values: PyTorch's own error may happen to be almost none, so rounding of the values counts as well."""
    ours, eager, exact = (each.detach().double() for each in (ours, eager, exact))
    allowed = 4 * (eager - exact).abs().max() + 1e-5 * exact.abs().max() + 1e-5
    assert (ours - exact).abs().max() <= allowed, f"value: {name}"


def random_norm(draw: random.Random) -> tuple[str, Case]:
    groups = draw.randint(1, 3)
    images, channels = groups * draw.randint(1, 3), draw.choice([1, 3, 5, 8, 16, 24, 33, 40, 64, 72, 264])
    height, width = draw.randint(1, 7), draw.randint(2, 9)
    shape, dtype = (images, channels, height, width, groups), draw.choice(DTYPES)
    return f"norm {shape} {dtype}", norm(shape, dtype, draw.choice([4, 64]))


def random_soft(draw: random.Random) -> tuple[str, Case]:
    groups, masks = draw.choice([1, 2, 3, 4]), draw.randint(1, 11)
    channels = groups * draw.choice([1, 3, 4, 8, 16, 21, 40, 72])
    shape = (draw.randint(1, 3), channels, groups, masks, draw.randint(1, 9), draw.randint(1, 9))
    dtype = draw.choice(DTYPES)
    return f"soft {shape} {dtype}", soft(shape, dtype)


def random_box(draw: random.Random) -> tuple[str, Case]:
    channels = draw.choice([1, 3, 7, 8, 16, 33, 64, 136, 264, 520])
    shape, dtype = (draw.randint(1, 6), channels, draw.randint(1, 12), draw.randint(1, 12)), draw.choice(DTYPES)
    return f"box {shape} {dtype}", box(shape, dtype)


def random_augmented(draw: random.Random) -> tuple[str, Case]:
    shape, profile = (draw.randint(2, 70), draw.randint(2, 140)), draw.choice(["byol", "mocov2", "mocov1"])
    dtype = draw.choice(DTYPES)
    return f"augmentation {shape} {profile} {dtype}", augmented(shape, dtype, profile, batch=2)


def cases(each: int = EACH) -> Iterator[tuple[str, Case]]:
    """Name and case of `each` random shapes of every family of kernels."""
    draw = random.Random(20)
    for family in (random_norm, random_soft, random_box, random_augmented):
        for number in range(each):
            name, case = family(draw)
            yield f"{number} {name}", case


@pytest.mark.slow
@pytest.mark.parametrize("case", [pytest.param(case, id=name) for name, case in cases()])
def test_kernels_on_a_random_shape(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(test_batch_norm_act, "check_twice_eager", near)
    monkeypatch.setattr(pooling_cases, "check_twice_eager", near)
    need_tools()
    modules: list[PtxModule] = []
    with watched_tensors():
        case(on((8, 0), modules))
    assert any(module.launched for module in modules)
