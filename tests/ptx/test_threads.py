"""The kernels' sources, a thread or fiber for each CUDA thread, under the sanitizers; see `threaded.py`."""

from __future__ import annotations

from pathlib import Path

import pytest

from .cases import DEFAULT, F16, F32, Case, augmented, box, norm, soft
from .faults import FAULTS
from .threaded import ORDERS, SANITIZERS, complaints

CASES: dict[str, Case] = {
    "boxes, odd": box((2, 7, 3, 5), F16),
    "norm": norm((4, 7, 3, 3, 2), F32),
    "norm, vectors": norm((6, 48, 2, 2, 3), F16),
    "running statistics": DEFAULT["norm, running statistics"],
    "soft maps": soft((2, 36, 12, 11, 3, 3), F32),
    "augmentation": augmented((36, 68), F16, batch=1),
}
QUICK = "boxes, odd"
PARAMETERS = [pytest.param(name, marks=[] if name == QUICK else [pytest.mark.slow]) for name in CASES]


@pytest.mark.parametrize("form", ORDERS)
@pytest.mark.parametrize("sanitizer", SANITIZERS)
@pytest.mark.parametrize("name", PARAMETERS)
def test_no_sanitizer_complains(name: str, sanitizer: str, form: str, tmp_path: Path) -> None:
    assert complaints(CASES[name], sanitizer, form, tmp_path) == ""


@pytest.mark.slow
@pytest.mark.parametrize("form", ORDERS)
@pytest.mark.parametrize(
    ("fault", "sanitizer", "word"),
    [
        ("no barrier before a box is summed", "threads", "data race"),
        ("no barrier between the two passes of the blur", "threads", "data race"),
        ("box means past the last channel", "addresses", "heap-buffer-overflow"),
        ("return before a barrier", "threads", "divergence"),
    ],
)
def test_a_sanitizer_sees_a_planted_fault(fault: str, sanitizer: str, word: str, form: str, tmp_path: Path) -> None:
    planted = FAULTS[fault]
    assert word in complaints(planted.case, sanitizer, form, tmp_path, planted.plant)
