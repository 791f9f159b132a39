"""Augmentation profiles of the papers: what is drawn for each view, and how it is applied to a batch of views.

A loader delivers uint8 crops; everything after the crop happens here, on whatever device the views are on. `draw` makes
all parameters on the host from counters, so which images an operation touches is known without asking the device.
`apply` is the definition in PyTorch; `augment_native` and `kernels` compute the same in fewer passes.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import torch
from torch import Tensor

from . import augment_native
from .blur import blur_radius, gaussian_blur
from .color import (
    WHITE,
    adjust_brightness,
    adjust_contrast,
    adjust_hue,
    adjust_saturation,
    solarize,
    to_gray,
)
from .interface import ViewSpec
from .kernels import fused_augment
from .profiles import Profile, get_profile
from .rng import SLOT_APPLY, SLOT_JITTER, SLOT_ORDER, uniform

IMPLEMENTATIONS = ("auto", "reference", "native", "kernel")

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)

JITTER_OPS: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (
    adjust_brightness,
    adjust_contrast,
    adjust_saturation,
    adjust_hue,
)
JITTER_ORDERS = np.array(list(itertools.permutations(range(4))), dtype=np.int64)
"""(24, 4): the orders of the four jitter operations, in lexicographic order; what an order draw indexes."""

# Columns of `AugmentParams.table`.
COLUMNS = (
    "flip",
    "jitter",
    "gray",
    "blur",
    "solarize",
    "brightness",
    "contrast",
    "saturation",
    "hue",
    "order0",
    "order1",
    "order2",
    "order3",
    "sigma",
)
COLUMN = {name: position for position, name in enumerate(COLUMNS)}


def view_specs(profile: Profile | str, image_size: int) -> tuple[ViewSpec, ...]:
    """What a loader has to cut for this profile: views "view1", "view2", ... of `image_size` pixels a side."""
    profile = get_profile(profile)
    return tuple(
        ViewSpec(
            name=f"view{number + 1}",
            size=image_size,
            kind=profile.crop,
            scale=profile.crop_scale,
            interpolation=profile.interpolation,
            draw_id=number,
        )
        for number in range(profile.num_views)
    )


@dataclass(frozen=True)
class AugmentParams:
    """All parameters of one view of a batch.

    Attributes:
        profile: whose order of operations holds.
        table: (B, 14) float32, the columns of `COLUMNS`; on the device of the images. Flags are 0 or 1; brightness,
            contrast and saturation are factors, hue a fraction of the circle; order0..3 index `JITTER_OPS`.
        members: name -> (n,) int64 rows of the batch that an operation touches, on the device of the images. The
            four places of the jitter order are "jitter00" (place 0, brightness) to "jitter33" (place 3, hue). A name
            is absent where there are no rows.
    """

    profile: Profile
    table: Tensor
    members: dict[str, Tensor]

    def __len__(self) -> int:
        return len(self.table)

    def column(self, name: str) -> Tensor:
        """One column of the table, (B,) float32."""
        return self.table[:, COLUMN[name]]

    def blur_radius(self, images: Tensor) -> int:
        """Taps on each side of the blur's centre for images of this size; 0 where none is blurred."""
        return blur_radius(min(images.shape[2:]), self.profile.sigma_range[1]) if "blur" in self.members else 0

    def to(self, device: torch.device | str, non_blocking: bool = False) -> AugmentParams:
        """The same on another device, in two copies (from pinned memory where they need not be waited for)."""
        device = torch.device(device)
        if self.table.device == device:
            return self
        # Sixteen small copies would each cost a launch.
        packed = torch.cat(list(self.members.values())) if self.members else torch.empty(0, dtype=torch.int64)
        lengths = [len(rows) for rows in self.members.values()]
        pieces = _copied(packed, device, non_blocking).split(lengths)
        members = dict(zip(self.members, pieces, strict=True))
        return replace(self, table=_copied(self.table, device, non_blocking), members=members)

    def with_table_on(self, device: torch.device | str, non_blocking: bool = False) -> AugmentParams:
        """The table alone on another device, in one copy: the fused kernel does not look at `members`."""
        device = torch.device(device)
        return self if self.table.device == device else replace(self, table=_copied(self.table, device, non_blocking))


def _copied(tensor: Tensor, device: torch.device, non_blocking: bool) -> Tensor:
    if non_blocking and device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()  # from any other memory the copy would make the host wait
    return tensor.to(device, non_blocking=non_blocking)


def draw(profile: Profile | str, seed: int, epoch: int, index: np.ndarray, view: int) -> AugmentParams:
    """Parameters of view number `view` (0 or 1) of the samples `index`.

    Args:
        profile: profile or its name.
        seed: run seed.
        epoch: epoch number.
        index: (B,) integer sample indices; a sample's parameters do not depend on the others.
        view: number of the view.

    Returns:
        Parameters on the CPU.

    Raises:
        ValueError: for an unknown profile or a view that it does not have.
    """
    profile = get_profile(profile)
    return params_from_table(profile, draw_table(profile, seed, epoch, index, view))


def draw_table(profile: Profile, seed: int, epoch: int, index: np.ndarray, view: int) -> np.ndarray:
    """The parameters of `draw` as their (B, 14) float32 table alone, with the columns of `COLUMNS`."""
    if not 0 <= view < profile.num_views:
        raise ValueError(
            f"the profile has {profile.num_views} views; choose view 0 to {profile.num_views - 1}, not {view}"
        )
    index = np.asarray(index, dtype=np.int64)
    # Every word is drawn whether or not the profile uses it: profiles with an operation less keep the others' draws.
    chance = uniform(seed, index, epoch, view, SLOT_APPLY)
    strength = uniform(seed, index, epoch, view, SLOT_JITTER) * 2.0 - 1.0
    rest = uniform(seed, index, epoch, view, SLOT_ORDER)
    table = np.empty((len(index), len(COLUMNS)), dtype=np.float32)
    table[:, COLUMN["flip"]] = rest[:, 1] < profile.probability("flip", view)
    for word, operation in enumerate(("jitter", "gray", "blur", "solarize")):
        table[:, COLUMN[operation]] = chance[:, word] < profile.probability(operation, view)
    first = COLUMN["brightness"]
    table[:, first : first + 4] = np.array([1.0, 1.0, 1.0, 0.0]) + strength * np.array(profile.jitter_strength)
    low, high = profile.sigma_range
    table[:, COLUMN["sigma"]] = low + (high - low) * rest[:, 2]
    first = COLUMN["order0"]
    # One draw chooses among the 24 orders, as a shuffle of four would with three.
    table[:, first : first + 4] = JITTER_ORDERS[(rest[:, 0] * len(JITTER_ORDERS)).astype(np.int64)]
    return table


def params_from_table(profile: Profile | str, table: np.ndarray) -> AugmentParams:
    """Parameters on the CPU from a (B, 14) table with the columns of `COLUMNS`.

    Raises:
        ValueError: if the table asks for an operation that the profile does not have.
    """
    profile = get_profile(profile)
    table = np.ascontiguousarray(table, dtype=np.float32)
    for name in OPERATIONS:
        if name not in profile.operations and table[:, COLUMN[name]].any():
            raise ValueError(f"the profile has no {name}; its operations are {', '.join(profile.operations) or 'none'}")
    members = {name: np.flatnonzero(table[:, COLUMN[name]]) for name in ("flip", "gray", "blur", "solarize")}
    jittered = table[:, COLUMN["jitter"]] != 0
    for place in range(4):
        chosen = table[:, COLUMN[f"order{place}"]]
        for operation in range(4):
            members[f"jitter{place}{operation}"] = np.flatnonzero(jittered & (chosen == operation))
    tensors = {name: torch.from_numpy(rows) for name, rows in members.items() if len(rows)}
    return AugmentParams(profile, torch.from_numpy(table), tensors)


def augment_view(
    images: Tensor,
    profile: Profile | str,
    seed: int,
    epoch: int,
    index: np.ndarray,
    view: int,
    dtype: torch.dtype = torch.float32,
    implementation: str = "auto",
    load: fused_augment.LoadKernels | None = None,
) -> Tensor:
    """Draw the parameters of one view of a batch and apply them: `draw`, then `apply`.

    Args:
        images: (B, 3, S, S) uint8 on any device.
        profile: profile or its name.
        seed: run seed.
        epoch: epoch number.
        index: (B,) integer sample indices.
        view: number of the view.
        dtype: of the result.
        implementation: one of `IMPLEMENTATIONS`.
        load: as for `apply`.

    Returns:
        (B, 3, S, S) `dtype`, channels-last, normalised, on the device of `images`.

    Raises:
        ValueError: as `draw` and `apply`.
    """
    params = draw(profile, seed, epoch, index, view)
    chosen, _ = choose_implementation(images.device, dtype, implementation)
    move = params.with_table_on if chosen == "kernel" else params.to
    return apply(images, move(images.device, non_blocking=True), dtype, implementation, load)


def choose_implementation(device: torch.device, dtype: torch.dtype, implementation: str = "auto") -> tuple[str, str]:
    """Which implementation `apply` uses on a device, and why, as (name, reason).

    Raises:
        ValueError: for an unknown name, or one that cannot do this device or dtype.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"unknown implementation {implementation!r}; choose one of {', '.join(IMPLEMENTATIONS)}")
    on_cpu = device.type == "cpu"
    if implementation == "auto":
        if on_cpu and dtype != torch.float64:
            if augment_native.library() is not None:
                return "native", "compiled C++ is the fastest on a CPU"
            return "reference", "the C++ pass could not be built"
        if on_cpu:
            return "reference", "float64 is for checking"
        return "reference", "the fused GPU kernel runs where it is asked for with 'kernel'"
    if implementation == "native" and (not on_cpu or dtype == torch.float64):
        raise ValueError(f"'native' is for the CPU and not for float64, but asked for {device} and {dtype}; use 'auto'")
    if implementation == "kernel":
        if device.type != "cuda":
            raise ValueError(f"'kernel' is for a CUDA device, but the views are on {device}; use 'auto'")
        return "kernel", "asked for"
    return implementation, "asked for"


def apply(
    images: Tensor,
    params: AugmentParams,
    dtype: torch.dtype = torch.float32,
    implementation: str = "auto",
    load: fused_augment.LoadKernels | None = None,
) -> Tensor:
    """Augment and normalise one view of a batch.

    Args:
        images: (B, 3, S, S) uint8, any memory layout.
        params: of the same batch, on the device of `images`.
        dtype: of the result. The work is done in float32, or in float64 where that is asked for.
        implementation: one of `IMPLEMENTATIONS`: "reference" is the PyTorch definition, "native" the C++ pass on the
            CPU, "kernel" the fused GPU kernel, "auto" as `choose_implementation` says. All agree to a few thousandths
            of a grey level before they round to `dtype`.
        load: compiles and launches the fused GPU kernel, `models.ops.launcher.CudaModule`; only "kernel" needs it.

    Returns:
        (B, 3, S, S) `dtype`, channels-last, normalised with `MEAN` and `STD`; `images` is not changed.

    Raises:
        ValueError: for images that are not uint8, or an implementation that cannot do this.
    """
    # Augmenting twice would go unnoticed: floats in a plausible range give plausible pictures.
    if images.dtype != torch.uint8:
        raise ValueError(f"views must be uint8, not {images.dtype}: augmentation normalises them itself")
    chosen, reason = choose_implementation(images.device, dtype, implementation)
    if chosen == "native":
        radius = params.blur_radius(images)
        return augment_native.augment(images, params.table, params.profile.gray_first, radius, dtype)
    if chosen == "kernel":
        return _apply_kernel(images, params, dtype, reason, load)
    return _apply_reference(images, params, dtype)


@cache
def _say_once(message: str) -> None:
    print(message, file=sys.stderr)


def _apply_kernel(
    images: Tensor, params: AugmentParams, dtype: torch.dtype, reason: str, load: fused_augment.LoadKernels | None
) -> Tensor:
    if load is None:
        raise ValueError("the fused kernel needs load=models.ops.launcher.CudaModule, which compiles and launches it")
    _say_once(f"augmentation on {images.device.type}: kernel ({reason})")
    radius, launch = params.blur_radius(images), fused_augment.loaded(load, images.device)
    return fused_augment.augment(images, params.table, params.profile.gray_first, radius, dtype, launch=launch)


def _apply_reference(images: Tensor, params: AugmentParams, dtype: torch.dtype) -> Tensor:
    # Half precision is only for the result: a chain of operations in it would lose whole grey levels.
    work = torch.float64 if dtype == torch.float64 else torch.float32
    levels = images.to(work, memory_format=torch.contiguous_format)
    for operation in params.profile.operations:
        levels = OPERATIONS[operation](levels, params)
    scale, offset = _normalisation(levels.device, work)
    return torch.addcmul(offset, levels, scale).to(dtype, memory_format=torch.channels_last)


@cache
def _normalisation(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scale and offset (1, 3, 1, 1) from grey levels to normalised values."""
    mean, std = (torch.tensor(values, dtype=torch.float64).view(1, 3, 1, 1) for values in (MEAN, STD))
    scale, offset = 1.0 / (WHITE * std), -mean / std
    return scale.to(device, dtype), offset.to(device, dtype)


def _on_members(levels: Tensor, params: AugmentParams, name: str, function: Callable[[Tensor], Tensor]) -> Tensor:
    """Replace the rows that an operation touches by what `function` makes of them, in place."""
    rows = params.members.get(name)
    if rows is None:
        return levels
    # No gather and scatter where every image is touched, as by a blur of probability 1.
    if len(rows) == len(levels):
        return function(levels)
    return levels.index_copy_(0, rows, function(levels.index_select(0, rows)))


def _flip(levels: Tensor, params: AugmentParams) -> Tensor:
    return _on_members(levels, params, "flip", lambda rows: rows.flip(3))


def _jitter(levels: Tensor, params: AugmentParams) -> Tensor:
    # Images with the same operation at the same place of their order are done together.
    for place, operation in itertools.product(range(4), range(4)):
        name = f"jitter{place}{operation}"
        if name in params.members:
            factor = params.table[params.members[name], COLUMN["brightness"] + operation].to(levels.dtype)
            levels = _on_members(levels, params, name, lambda rows, o=operation, f=factor: JITTER_OPS[o](rows, f))  # type: ignore[misc]
    return levels


def _gray(levels: Tensor, params: AugmentParams) -> Tensor:
    return _on_members(levels, params, "gray", to_gray)


def _blur(levels: Tensor, params: AugmentParams) -> Tensor:
    if "blur" not in params.members:
        return levels
    sigma = params.table[params.members["blur"], COLUMN["sigma"]].to(levels.dtype)
    radius = params.blur_radius(levels)
    return _on_members(levels, params, "blur", lambda rows: gaussian_blur(rows, sigma, radius))


def _solarize(levels: Tensor, params: AugmentParams) -> Tensor:
    return _on_members(levels, params, "solarize", solarize)


OPERATIONS: dict[str, Callable[[Tensor, AugmentParams], Tensor]] = {
    "flip": _flip,
    "jitter": _jitter,
    "gray": _gray,
    "blur": _blur,
    "solarize": _solarize,
}
