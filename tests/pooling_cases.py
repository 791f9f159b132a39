"""Feature maps, soft maps and boxes for the tests of the pooling operators, and the comparison that they share."""

import torch

from tools.bench.timing import check_twice_eager

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BOXES = [[0, 0, 1, 1], [1, 2, 3, 2], [0, 0, 9, 9], [2, 1, 0, 3], [3, 3, 5, 5], [-1, -1, 3, 2]]


def random_features(batch, channels, height, width, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(batch, channels, height, width, generator=generator) + 0.5).to(dtype)


def random_maps(batch, groups, masks, height, width, dtype=torch.float64, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, groups, masks, height, width, generator=generator).to(dtype)


def random_boxes(batch):
    return torch.tensor([BOXES[i % len(BOXES)] for i in range(batch)])


def compare(ours, eager, exact, name="pooled"):
    assert ours.shape == exact.shape and ours.dtype == eager.dtype
    check_twice_eager(name, ours, eager, exact)
