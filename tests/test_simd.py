"""The choice of vector instructions: it reaches decoder and augmentation, and ends with its block."""

from __future__ import annotations

import pytest
import torch

from pipeline import augment, augment_native, decoder, simd
from pipeline.profiles import get_profile

pytestmark = pytest.mark.skipif(
    augment_native.library() is None or decoder.native_library() is None, reason="no C++ compiler"
)
LANES = {"plain": 4, "avx2": 8, "avx512": 16}


def augmented(lanes: int = 0) -> torch.Tensor:
    images = torch.randint(0, 256, (2, 3, 40, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    profile = get_profile("mocov2")
    table = torch.from_numpy(augment.draw_table(profile, 0, 0, torch.arange(2).numpy(), 0))
    return augment_native.augment(images, table, profile.gray_first, radius=3, lanes=lanes)


@pytest.mark.parametrize(
    "name", [name for name in simd.LEVELS if simd.LEVELS.index(name) <= simd.LEVELS.index(simd.level())]
)
def test_a_level_is_used_in_its_block_and_given_back(name: str) -> None:
    best, free = simd.level(), augmented()
    with simd.at_most(name):
        assert simd.level() == name
        # The augmentation's own parameter says what the level must have chosen.
        assert torch.equal(augmented(), augmented(LANES[name]))
    assert simd.level() == best and torch.equal(augmented(), free)


def test_a_limit_within_a_limit_gives_back_the_outer_one() -> None:
    with simd.at_most("plain"):
        with simd.at_most("plain"):
            pass
        assert simd.level() == "plain" and torch.equal(augmented(), augmented(LANES["plain"]))


def test_the_levels_of_the_augmentation_can_be_told_apart() -> None:
    if simd.level() == "plain":
        pytest.skip("this processor has no vector kernels to compare")
    # Without a difference in the last bits the test above would pass whatever was chosen.
    assert not torch.equal(augmented(LANES["plain"]), augmented(LANES[simd.level()]))


def test_what_the_processor_lacks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    if simd.level() == "avx512":
        # As on a processor without it: the most that the library admits is AVX2.
        monkeypatch.setattr(simd, "level", lambda: "avx2")
    with (
        pytest.raises(ValueError, match="avx512 cannot be used here; the most there is: (avx2|plain)"),
        simd.at_most("avx512"),
    ):
        pass
