"""Other libraries' ways to turn uint8 views into augmented, normalised ones: what `bench_ops.py` compares ours with.

Each contender applies the MoCo v2 augmentation (jitter, grey, blur, flip, normalise) with parameters drawn for each
sample, as ours does. Their draws are their own, so they agree with ours in distribution, not in value.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pipeline.augment import MEAN, STD

Contender = Callable[[], Tensor]
BLUR_KERNEL = 23  # odd pixels at 224 px, a tenth of the side, as SimCLR has it


def torchvision_v2(images: Tensor) -> Contender:
    """torchvision.transforms.v2 on each sample in turn: it draws once a call, so a batch would share its parameters."""
    from torchvision.transforms import v2

    kernel = min(BLUR_KERNEL, images.shape[3] // 2 * 2 - 1)
    transform = v2.Compose(
        [
            v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
            v2.RandomGrayscale(p=0.2),
            v2.RandomApply([v2.GaussianBlur(kernel, (0.1, 2.0))], p=0.5),
            v2.RandomHorizontalFlip(p=0.5),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )
    return lambda: torch.stack([transform(image) for image in images])


def kornia_batched(images: Tensor) -> Contender:
    """Kornia's batched augmentation with per-sample parameters; the order of the jitter is drawn once a batch."""
    import kornia.augmentation as K

    kernel = min(BLUR_KERNEL, images.shape[3] // 2 * 2 - 1)
    transform = torch.nn.Sequential(
        K.ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8, same_on_batch=False),
        K.RandomGrayscale(p=0.2),
        K.RandomGaussianBlur((kernel, kernel), (0.1, 2.0), p=0.5, same_on_batch=False),
        K.RandomHorizontalFlip(p=0.5),
        K.Normalize(torch.tensor(MEAN), torch.tensor(STD)),
    ).to(images.device)
    return lambda: transform(images.float() / 255)


def dali_pipeline(images: Tensor) -> Contender:
    """DALI's jitter, grey, blur, flip and normalisation, fed with the same uint8 views; 4 CPU threads or the GPU."""
    import nvidia.dali.fn as fn
    from nvidia.dali import pipeline_def
    from nvidia.dali.plugin.pytorch import feed_ndarray
    from nvidia.dali.types import DALIDataType

    device, size = ("gpu" if images.is_cuda else "cpu"), images.shape[3]
    source = images.permute(0, 2, 3, 1).contiguous()  # (B, S, S, 3)
    given = source if images.is_cuda else source.numpy()
    out = torch.empty_like(images, dtype=torch.float32, memory_format=torch.contiguous_format)

    where: dict[str, Any] = {"device_id": 0 if images.is_cuda else None, "num_threads": 4}

    @pipeline_def(batch_size=len(images), prefetch_queue_depth=1, **where)
    def build() -> Any:
        x = fn.external_source(source=lambda: given, device=device, layout="HWC", batch=True)
        on = fn.cast(fn.random.coin_flip(probability=0.8), dtype=DALIDataType.FLOAT)
        gray = fn.cast(fn.random.coin_flip(probability=0.2), dtype=DALIDataType.FLOAT)
        blur = fn.cast(fn.random.coin_flip(probability=0.5), dtype=DALIDataType.FLOAT)

        def factor() -> object:
            return 1.0 + on * fn.random.uniform(range=(-0.4, 0.4))

        x = fn.color_twist(
            x,
            brightness=factor(),
            contrast=factor(),
            saturation=factor() * (1.0 - gray),
            hue=on * fn.random.uniform(range=(-36.0, 36.0)),
        )
        # A sigma of 0.01 px is the identity: DALI has no per-sample switch inside a batch.
        x = fn.gaussian_blur(x, sigma=blur * fn.random.uniform(range=(0.1, 2.0)) + 0.01, window_size=_odd(size))
        return fn.crop_mirror_normalize(
            x,
            mirror=fn.random.coin_flip(probability=0.5),
            mean=[255 * value for value in MEAN],
            std=[255 * value for value in STD],
            dtype=DALIDataType.FLOAT,
            output_layout="CHW",
        )

    pipeline = build()
    pipeline.build()

    def run() -> Tensor:
        (result,) = pipeline.run()
        tensor = result.as_tensor()
        if images.is_cuda:
            feed_ndarray(tensor, out, cuda_stream=torch.cuda.current_stream())
        else:
            feed_ndarray(tensor, out)
        return out

    return run


def _odd(size: int) -> int:
    return min(BLUR_KERNEL, size // 2 * 2 - 1)


CONTENDERS: dict[str, tuple[str, Callable[[Tensor], Contender]]] = {
    "torchvision v2": ("torchvision", torchvision_v2),
    "kornia": ("kornia", kornia_batched),
    "DALI": ("nvidia.dali", dali_pipeline),
}
"""Name -> (module that it needs, builder)."""


def installed(module: str) -> bool:
    """Whether a module can be imported, without importing it."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False
