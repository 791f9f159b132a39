"""Augmentation profiles of the papers as data: probabilities, strengths and the order of operations.

Nothing here imports PyTorch, so that a command line is checked before the seconds that PyTorch takes.
"""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass


@dataclass(frozen=True)
class Profile:
    """One row of the papers' augmentation table.

    Attributes:
        crop: "random" resized crop or "center".
        crop_scale: area of the random crop relative to the image's.
        interpolation: of the crop's resize.
        operations: names from `OPERATIONS` in the order in which they are applied after the crop.
        jitter_probability: for all four jitter operations together.
        jitter_strength: brightness, contrast, saturation, hue.
        gray_probability: share of images turned grey.
        blur_probability: by view.
        solarize_probability: by view.
        sigma_range: of the blur, in pixels.
    """

    crop_scale: tuple[float, float] = (0.2, 1.0)
    crop: str = "random"
    interpolation: str = "bilinear"
    operations: tuple[str, ...] = ()
    jitter_probability: float = 0.8
    jitter_strength: tuple[float, float, float, float] = (0.4, 0.4, 0.4, 0.1)
    gray_probability: float = 0.2
    blur_probability: tuple[float, ...] = (0.0, 0.0)
    solarize_probability: tuple[float, ...] = (0.0, 0.0)
    flip_probability: float = 0.5
    sigma_range: tuple[float, float] = (0.1, 2.0)

    @property
    def num_views(self) -> int:
        """How many views the profile describes."""
        return len(self.blur_probability)

    @property
    def gray_first(self) -> bool:
        """Whether gray comes before jitter. All other differences in order between the profiles change nothing but
        float rounding: gray and blur are linear, and a flip is the same before or after anything.
        """
        gray, jitter = (self.operations.index(name) if name in self.operations else 9 for name in ("gray", "jitter"))
        return gray < jitter

    def probability(self, operation: str, view: int) -> float:
        """How often `operation` is applied to view number `view`; 0 where the profile does not have it."""
        if operation not in self.operations:
            return 0.0
        value = getattr(self, f"{operation}_probability")
        return float(value[view] if isinstance(value, tuple) else value)


PROFILES: dict[str, Profile] = {
    # Source: facebookresearch/moco main_moco.py --aug-plus; RegionCL, DenseCL, SimSiam and LEWEL-M use it unchanged.
    "mocov2": Profile(
        operations=("jitter", "gray", "blur", "flip"),
        blur_probability=(0.5, 0.5),
    ),
    # Source: facebookresearch/moco main_moco.py without --aug-plus.
    "mocov1": Profile(
        operations=("gray", "jitter", "flip"),
        jitter_probability=1.0,
        jitter_strength=(0.4, 0.4, 0.4, 0.4),
    ),
    # Source: facebookresearch/moco-v3 main_moco.py; crop scale of its R50 recipes (the code's default is 0.08).
    "byol-mocov3": Profile(
        operations=("jitter", "gray", "blur", "solarize", "flip"),
        jitter_strength=(0.4, 0.4, 0.2, 0.1),
        blur_probability=(1.0, 0.1),
        solarize_probability=(0.0, 0.2),
    ),
    # Source: SwinTransformer/Transformer-SSL; zdaxie/PixPro (--aug BYOL --crop 0.08) has the same.
    "byol-moby": Profile(
        crop_scale=(0.08, 1.0),
        operations=("flip", "jitter", "gray", "blur", "solarize"),
        jitter_strength=(0.4, 0.4, 0.2, 0.1),
        blur_probability=(1.0, 0.1),
        solarize_probability=(0.0, 0.2),
    ),
    # Source: LayneH/LEWEL; its paper says 0.08 for the crop, its code and logs 0.2.
    "byol-lewel": Profile(
        operations=("flip", "jitter", "gray", "blur", "solarize"),
        jitter_strength=(0.4, 0.4, 0.2, 0.1),
        blur_probability=(1.0, 0.1),
        solarize_probability=(0.0, 0.2),
    ),
    # Source: ChongjianGE/CARE: blur comes before gray, the flip before solarize.
    "byol-care": Profile(
        crop_scale=(0.08, 1.0),
        operations=("jitter", "blur", "gray", "flip", "solarize"),
        jitter_strength=(0.4, 0.4, 0.2, 0.1),
        blur_probability=(1.0, 0.1),
        solarize_probability=(0.0, 0.2),
    ),
    # Source: BYOL (Grill et al., NeurIPS 2020), appendix B.
    "byol": Profile(
        crop_scale=(0.08, 1.0),
        interpolation="bicubic",
        operations=("flip", "jitter", "gray", "blur", "solarize"),
        jitter_strength=(0.4, 0.4, 0.2, 0.1),
        blur_probability=(1.0, 0.1),
        solarize_probability=(0.0, 0.2),
    ),
    # Source: google-research/simclr data_util.py, colour strength 1.0; the blur comes last, on the finished views.
    "simclr": Profile(
        crop_scale=(0.08, 1.0),
        interpolation="bicubic",
        operations=("flip", "jitter", "gray", "blur"),
        jitter_strength=(0.8, 0.8, 0.8, 0.2),
        blur_probability=(0.5, 0.5),
    ),
    # Source: facebookresearch/swav src/multicropdataset.py. Small crops differ in their area alone. Red is normalised
    # with a deviation of 0.228 there and, as everywhere, 0.229 here.
    "swav": Profile(
        crop_scale=(0.14, 1.0),
        operations=("flip", "jitter", "gray", "blur"),
        jitter_strength=(0.8, 0.8, 0.8, 0.2),
        blur_probability=(0.5, 0.5),
    ),
    # Training a linear probe: random crop and flip.
    "linear": Profile(
        crop_scale=(0.08, 1.0),
        operations=("flip",),
        blur_probability=(0.0,),
        solarize_probability=(0.0,),
    ),
    # Evaluation: the centre, normalised.
    "none": Profile(crop="center", blur_probability=(0.0,), solarize_probability=(0.0,)),
}


def with_views(profile: Profile, count: int) -> Profile:
    """The profile for another number of views: its own, in turn."""
    turn = [number % profile.num_views for number in range(count)]
    return dataclasses.replace(
        profile,
        blur_probability=tuple(profile.blur_probability[number] for number in turn),
        solarize_probability=tuple(profile.solarize_probability[number] for number in turn),
    )


def get_profile(profile: Profile | str) -> Profile:
    """The profile of that name, or the one given.

    Raises:
        ValueError: for an unknown name.
    """
    if isinstance(profile, Profile):
        return profile
    if profile not in PROFILES:
        nearest = difflib.get_close_matches(profile, PROFILES, n=1)
        hint = f"did you mean {nearest[0]!r}?" if nearest else f"choose one of {', '.join(PROFILES)}"
        raise ValueError(f"unknown augmentation profile {profile!r}; {hint}")
    return PROFILES[profile]
