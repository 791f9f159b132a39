"""Un-Mix's draws by their statistics, and what a mixture is made of, pixel by pixel."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from models.mixtures import Mixture, draw_mixture, mix


def test_half_of_the_mixtures_are_global_and_their_shares_uniform() -> None:
    drawn = [draw_mixture(56, 56, 1.0, 0.5, 0, step, 1, 0) for step in range(2000)]
    shares = np.sort([each.share for each in drawn if each.box is None])
    assert abs(len(shares) / 2000 - 0.5) < 4.5 * 0.5 / 2000**0.5
    place = (np.arange(len(shares)) + 0.5) / len(shares)
    assert np.abs(shares - place).max() < 1.95 / len(shares) ** 0.5  # Kolmogorov-Smirnov, once in a thousand


def test_a_box_lies_in_the_image_and_its_pixels_are_the_partner_s_share() -> None:
    for step in range(300):
        drawn = draw_mixture(40, 30, 1.0, 0.0, 7, step, 2, 3)
        assert drawn.box is not None
        top, bottom, left, right = drawn.box
        assert 0 <= top <= bottom <= 40 and 0 <= left <= right <= 30
        assert drawn.share == pytest.approx(1 - (bottom - top) * (right - left) / 1200)


def test_a_draw_is_a_function_of_its_address_alone() -> None:
    address = (40, 30, 1.0, 0.5, 7, 11, 1, 2)
    assert draw_mixture(*address) == draw_mixture(*address)
    others = {draw_mixture(40, 30, 1.0, 0.5, *other) for other in ((8, 11, 1, 2), (7, 12, 1, 2), (7, 11, 2, 2))}
    assert len(others | {draw_mixture(*address)}) == 4


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_mixtures_by_pixels(layout: torch.memory_format) -> None:
    images = torch.randn(4, 3, 6, 5, dtype=torch.float64).contiguous(memory_format=layout)
    before = images.clone()
    whole, boxed = mix(images, Mixture(0.3, None)), mix(images, Mixture(0.9, (1, 4, 2, 5)))
    for i in range(4):
        partner = before[3 - i]
        torch.testing.assert_close(whole[i], 0.3 * before[i] + 0.7 * partner)
        for y in range(6):
            for x in range(5):
                source = partner if 1 <= y < 4 and 2 <= x < 5 else before[i]
                assert torch.equal(boxed[i, :, y, x], source[:, y, x])
    assert torch.equal(images, before) and boxed.is_contiguous(memory_format=layout)
