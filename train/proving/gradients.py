"""Are the gradients of a whole step those of an fp32 reference? Parameter by parameter, by direction and length.

A loss hardly moves within one step, so comparing losses does not see a gradient that is doubled, missing or of the
wrong sign. Rounding to 16 bits changes a gradient by up to its own length where it nearly cancels, in no preferred
direction; so direction and length are bounded, not the largest element.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

LIMITS = {torch.float32: (0.98, 1.1), torch.bfloat16: (0.3, 1.7), torch.float16: (0.3, 1.7)}
"""dtype -> smallest cosine with the reference, and largest ratio of lengths, up or down."""
NEGLIGIBLE = 1e-3
"""A gradient shorter than this share of the longest is noise, as that of a bias before a batch norm."""


def gradient_problem(found: Mapping[str, Tensor], reference: Mapping[str, Tensor], dtype: torch.dtype) -> str:
    """What is wrong with the gradients of a step, empty for nothing.

    Args:
        found: name of the parameter -> gradient under test.
        reference: the same of the fp32 step.
        dtype: that the step under test computes in.

    Returns:
        One sentence about the worst parameter, and how many there are.
    """
    if found.keys() != reference.keys():
        odd = sorted(found.keys() ^ reference.keys())
        return f"gradients of {len(odd)} parameters are missing or new, {odd[0]} among them"
    longest = max((float(each.float().norm()) for each in reference.values()), default=0.0)
    wrong = {name: text for name in reference if (text := _problem(found[name], reference[name], dtype, longest))}
    if not wrong:
        return ""
    name, text = next(iter(wrong.items()))
    return f"the gradient of {name} {text}; {len(wrong)} of {len(reference)} parameters are wrong"


def _problem(found: Tensor, reference: Tensor, dtype: torch.dtype, longest: float) -> str:
    if found.shape != reference.shape:
        return f"is {tuple(found.shape)}, not {tuple(reference.shape)}"
    ours, truth = found.detach().float().flatten(), reference.detach().float().flatten()
    length, wanted = float(ours.norm()), float(truth.norm())
    if not math.isfinite(length):
        return "is not finite"
    if wanted <= NEGLIGIBLE * longest:
        return "" if length <= 20 * NEGLIGIBLE * longest else f"has length {length:.3g}, the reference {wanted:.3g}"
    smallest_cosine, largest_ratio = LIMITS[dtype]
    ratio, cosine = length / wanted, float(ours @ truth) / max(length * wanted, 1e-30)
    if not 1 / largest_ratio <= ratio <= largest_ratio:
        return f"has {ratio:.3g} times the reference's length"
    return "" if cosine >= smallest_cosine else f"has a cosine of {cosine:.3g} with the reference"
