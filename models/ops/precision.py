"""Products of low-precision tensors whose sums and results stay in float32."""

from __future__ import annotations

import torch
from torch import Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 stays float64 (so that gradcheck works); everything else is summed in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def accumulated_matmul(left: Tensor, right: Tensor) -> Tensor:
    """`left @ right` of 2-D or batched 3-D tensors, with the result in the accumulation dtype.

    Two float16 or two bfloat16 tensors on a GPU enter the tensor cores as they are, whose products are exact and whose
    sums are float32; elsewhere they are cast first. Autocast must be off.
    """
    dtype = accumulation_dtype(torch.promote_types(left.dtype, right.dtype))
    if left.is_cuda and left.dtype == right.dtype and left.dtype in (torch.float16, torch.bfloat16):
        multiply = torch.mm if left.ndim == 2 else torch.bmm
        return multiply(left, right, out_dtype=dtype)  # type: ignore[operator]
    return left.to(dtype) @ right.to(dtype)
