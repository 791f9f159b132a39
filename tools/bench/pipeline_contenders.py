"""What `bench_pipeline.py` measures itself against: stock FFCV, and PyTorch's DataLoader with PIL or torchvision v2.

Each contender is one epoch over a packed file that makes views of every image, two in most, and throws them away.
"""

from __future__ import annotations

import io
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import v2

from pipeline.beton import BetonReader
from pipeline.interface import ViewSpec

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class _Blur:
    """MoCo v2's blur: PIL's, with a sigma of its own for each image."""

    def __call__(self, image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))


def moco_v2_transform(size: int) -> Callable[[Image.Image], torch.Tensor]:
    """The whole augmentation of MoCo v2 as its authors run it, one PIL image at a time.

    Source: Chen et al., "Improved Baselines with Momentum Contrastive Learning", 2020; facebookresearch/moco.
    """
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(size, scale=(0.2, 1.0)),
            transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
            transforms.RandomGrayscale(p=0.2),
            transforms.RandomApply([_Blur()], p=0.5),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )


def crops_transform(size: int) -> Callable[[Image.Image], torch.Tensor]:
    """Random resized crop to a uint8 tensor, nothing else."""
    return transforms.Compose([transforms.RandomResizedCrop(size, scale=(0.2, 1.0)), transforms.PILToTensor()])


def moco_v2_transform_v2(size: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """The whole augmentation of MoCo v2 in torchvision's second version of its transforms, on a uint8 tensor."""
    return v2.Compose(
        [
            v2.RandomResizedCrop(size, scale=(0.2, 1.0), antialias=True),
            v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
            v2.RandomGrayscale(p=0.2),
            # Three standard deviations of the widest blur: a wider kernel would only make this contender slower.
            v2.RandomApply([v2.GaussianBlur(13, sigma=(0.1, 2.0))], p=0.5),
            v2.RandomHorizontalFlip(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )


def _pil_image(record: np.ndarray) -> Image.Image:
    return Image.open(io.BytesIO(record.tobytes())).convert("RGB")


def _tensor_image(record: np.ndarray) -> torch.Tensor:
    return decode_image(torch.from_numpy(np.array(record)), ImageReadMode.RGB)


class PackedPhotos(Dataset):
    """The first `count` records of a packed file as two transformed views of an image, decoded once."""

    def __init__(self, path: Path, transform: Callable[[Any], torch.Tensor], count: int, tensors: bool):
        self.path, self.transform, self.count = path, transform, count
        self.decode: Callable[[np.ndarray], Any] = _tensor_image if tensors else _pil_image
        self.reader: BetonReader | None = None

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        if self.reader is None:  # in the worker process
            self.reader = BetonReader(self.path)
        image = self.decode(self.reader.record(index % len(self.reader)))
        return self.transform(image), self.transform(image)


def dataloader_epoch(
    path: Path,
    transform: Callable[[Any], torch.Tensor],
    batch: int,
    workers: int,
    images: int,
    tensors: bool = False,
) -> Callable[[], int]:
    """An epoch of `images` images through a DataLoader whose workers stay; returns how many were delivered.

    With `tensors` torchvision decodes to a uint8 (3, H, W) tensor, else PIL to an image of its own.
    """
    torch.set_num_threads(max(torch.get_num_threads(), 1))
    loader = DataLoader(
        PackedPhotos(path, transform, images, tensors),
        batch_size=batch,
        shuffle=True,
        num_workers=workers,
        drop_last=True,
        # Starting processes at each epoch would be measured with it.
        persistent_workers=True,
    )
    return lambda: sum(len(views[0]) for views in loader)


MULTI_CROP = tuple(
    ViewSpec(name=f"view{number + 1}", size=size, scale=scale, draw_id=number)
    for number, (size, scale) in enumerate([(224, (0.14, 1.0))] * 2 + [(96, (0.05, 0.14))] * 6)
)
"""Two large and six small crops. Source: SwAV (arXiv 2006.09882) as facebookresearch/swav trains it on ImageNet."""


def stock_ffcv_epoch(
    path: Path, views: Sequence[ViewSpec], batch: int, workers: int, quasi_random: bool = False
) -> Callable[[], int]:
    """An epoch of stock FFCV: its own decoder once per view, in random order; returns how many were delivered.

    Of the views their names, sizes and scales count: FFCV has one way to resize.

    `quasi_random` is what FFCV has for files larger than memory: pages are read into a cache of its own.
    """
    from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.pipeline.pipeline_spec import PipelineSpec
    from ffcv.transforms import ToTensor

    def view(spec: ViewSpec) -> PipelineSpec:
        decoder = RandomResizedCropRGBImageDecoder((spec.size, spec.size), scale=spec.scale)
        return PipelineSpec("image", decoder=decoder, transforms=[ToTensor()])

    # FFCV's Loader sets PyTorch's number of threads, which the other contenders would then run with.
    threads = torch.get_num_threads()
    loader = Loader(
        str(path),
        batch_size=batch,
        num_workers=workers,
        os_cache=not quasi_random,
        drop_last=True,
        order=OrderOption.QUASI_RANDOM if quasi_random else OrderOption.RANDOM,
        pipelines={**{spec.name: view(spec) for spec in views}, "image": None, "label": None},
    )
    torch.set_num_threads(threads)

    def epoch() -> int:
        count = sum(len(views[0]) for views in loader)
        torch.set_num_threads(threads)  # the Loader sets it to its own worker count
        return count

    return epoch
