"""What `bench_pipeline.py` measures itself against: stock FFCV, and PyTorch's DataLoader with PIL.

Each contender is one epoch over a packed file that makes views of every image, two in most, and throws them away.
"""

from __future__ import annotations

import io
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import Image, ImageFilter
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

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


class PackedPhotos(Dataset):
    """The first `count` records of a packed file as two transformed views of a PIL image, decoded once."""

    def __init__(self, path: Path, transform: Callable[[Image.Image], torch.Tensor], count: int):
        self.path, self.transform, self.count = path, transform, count
        self.reader: BetonReader | None = None

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        if self.reader is None:  # in the worker process
            self.reader = BetonReader(self.path)
        image = Image.open(io.BytesIO(self.reader.record(index % len(self.reader)).tobytes())).convert("RGB")
        return self.transform(image), self.transform(image)


def dataloader_epoch(
    path: Path, transform: Callable[[Image.Image], torch.Tensor], batch: int, workers: int, images: int
) -> Callable[[], int]:
    """An epoch of `images` images through a DataLoader whose workers stay; returns how many were delivered."""
    torch.set_num_threads(max(torch.get_num_threads(), 1))
    loader = DataLoader(
        PackedPhotos(path, transform, images),
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
