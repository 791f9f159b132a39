"""Where in a checkpoint of other projects the backbone is: recognised by its first layer and by key prefixes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from .errors import UserMistake

# The first layer of a backbone, the only tensor of this name with three input channels; the longest that fits counts.
_STEMS = (
    "patch_embed.proj.weight",
    "features.0.0.weight",
    "features.conv0.weight",
    "features.0.weight",
    "conv_stem.weight",
    "conv_proj.weight",
    "stem.conv1.weight",
    "stem.conv.weight",
    "stem.0.weight",
    "conv1.0.weight",
    "conv1.weight",
)
# The network that follows another one, or the one that is averaged.
_MOMENTUM = re.compile(r"(^|[._])(momentum|target|teacher|ema|key|encoder_k)([._]|$)")
# Prefix of the trained network -> whose layout it is. The first one that a file has counts: OpenSelfSup's methods hold
# their backbone under two names.
_FAMILIES = (
    (r"(encoder_q|online_net)\.backbone\.", "LEWEL"),
    (r"(encoder_q|online_net)\.0\.", "OpenSelfSup (DenseCL, RegionCL, BYOL)"),
    (r"encoder_q\.", "MoCo"),
    (r"base_encoder\.", "MoCo v3"),
    (r"student_encoder\.", "CARE"),
    (r"(online_encoder|online_network|online_backbone)\.(.+\.)?", "BYOL"),
    (r"(.+\.)?backbone\.", "solo-learn, lightly or Lightning"),
    (r"(.+\.)?encoder\.", "SimSiam, MoBY or Lightning"),
    (r"(model|net|network)\.", "Lightning"),
)
# What projects hang on to a backbone, as a child of it.
_HEADS = re.compile(r"^(fc\d?|heads?|trans|neck|projector|predictor|projection_head|prediction_head)\.")
# lightly makes a Sequential of a ResNet's children, in their order.
_LIGHTLY = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}
SMALL_VIT_WIDTH = 384
_MOCO_V3_ARCHS = {"vit_base": "timm:vit_base_patch16_224"}


@dataclass(frozen=True)
class Extracted:
    """A backbone taken out of a training checkpoint.

    Attributes:
        tensors: by key names without prefix.
        family: whose layout it was; empty where the file holds a backbone alone.
        left: what else the file has, in words; empty where there is nothing.
        arch: architecture that the layout tells; empty where it does not.
    """

    tensors: dict[str, Tensor]
    family: str = ""
    left: str = ""
    arch: str = ""


def extract(tensors: Mapping[str, Tensor], origin: str, recorded_arch: str = "") -> Extracted:
    """The backbone in the tensors of a checkpoint; all of them where its first layer has no prefix or is not found.

    Args:
        tensors: a flat state dict, without the prefixes that all of its keys share.
        origin: where it comes from, for messages.
        recorded_arch: what the file says its architecture is, as MoCo's and SimSiam's do.

    Raises:
        UserMistake: several backbones of which none is known to be the trained one.
    """
    prefixes = _prefixes(tensors)
    if not prefixes or "" in prefixes:
        return Extracted(_from_lightly(tensors))
    prefix, family = _trained(prefixes, origin)
    inside = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    kept = _from_lightly({name: value for name, value in inside.items() if not _HEADS.match(name)})
    others = sorted({name.split(".")[0] for name in tensors if not name.startswith(prefix)})
    left = f"{prefix}* taken; left out {len(inside) - len(kept)} tensors of its head"
    left += f" and {', '.join(others)}" if others else ""
    arch = _moco_v3_arch(kept, recorded_arch) if family == "MoCo v3" else ""
    return Extracted(kept, family, left, arch)


def _prefixes(tensors: Mapping[str, Tensor]) -> list[str]:
    found: dict[str, None] = {}
    for name, value in tensors.items():
        if value.ndim != 4 or value.shape[1] != 3:
            continue
        stem = next((stem for stem in _STEMS if name == stem or name.endswith(f".{stem}")), None)
        if stem is None and f"{name.removesuffix('0.weight')}4.0.conv1.weight" in tensors:
            stem = "0.weight"  # lightly's
        if stem is not None:
            found[name.removesuffix(stem)] = None
    return list(found)


def _trained(prefixes: list[str], origin: str) -> tuple[str, str]:
    """The prefix of the trained network, and whose layout it is."""
    online = [prefix for prefix in prefixes if not _MOMENTUM.search(prefix)] or prefixes
    for pattern, family in _FAMILIES:
        fitting = [prefix for prefix in online if re.fullmatch(pattern, prefix)]
        if len(fitting) == 1:
            return fitting[0], family
    if len(online) > 1:
        raise UserMistake(
            f"checkpoint {origin} holds {len(online)} backbones, {_listed(online)}; save the state_dict of "
            "the one that is meant"
        )
    return online[0], f"prefix {online[0]}"


def _listed(prefixes: Iterable[str]) -> str:
    return ", ".join(f"{prefix}*" for prefix in prefixes)


def _from_lightly(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if not {"0.weight", "1.running_mean", "4.0.conv1.weight"} <= tensors.keys():
        return dict(tensors)
    renamed = {}
    for name, value in tensors.items():
        first, _, rest = name.partition(".")
        renamed[f"{_LIGHTLY.get(first, first)}.{rest}"] = value
    return renamed


def _moco_v3_arch(tensors: Mapping[str, Tensor], recorded_arch: str) -> str:
    """Whose architecture a checkpoint of MoCo v3 has; empty where its tensors tell that."""
    # Its ViT-S has 12 attention heads where timm's has 6, of which no tensor knows.
    if "cls_token" in tensors and tensors["cls_token"].shape[-1] == SMALL_VIT_WIDTH:
        return "vit-s"
    return _MOCO_V3_ARCHS.get(recorded_arch, "")
