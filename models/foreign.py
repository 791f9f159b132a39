"""Backbones of other libraries as trunks that end in a feature map: timm's, torchvision's, and anybody's factory.

The library's own class is kept and only its `forward` is put over, so tensors have the library's own names: its weights
load here, and what is trained here loads there.
"""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LIBRARIES = ("timm", "torchvision")
_PROBE_SIZE = 224  # a multiple of every usual stride, and the size that models of a fixed size take


class ForeignTrunk(nn.Module):
    """The part that a library's model becomes: images (B, 3, S, S) -> map (B, feature_dim, S/stride, S/stride).

    Global average pooling of the map gives the pooled features of all methods and evaluations. A class token takes
    part in attention and is not read. `build_foreign` makes instances, which are of the library's class as well.

    Attributes:
        stride: pixels a cell of the map.
        feature_dim: channels of the map.
        map_of: turns the model and a batch of images into the map.
        options: what timm's `create_model` was given so that the model takes any size of images.
    """

    stride: int
    feature_dim: int
    map_of: Callable[[Any, Tensor], Tensor]
    options: dict[str, bool]

    def forward(self, images: Tensor) -> Tensor:
        """Feature map (B, feature_dim, H, W) of images (B, 3, S, S)."""
        return type(self).map_of(self, images)


def is_foreign(arch: str) -> bool:
    """Whether a name is `timm:NAME`, `torchvision:NAME` or `module:factory`."""
    return ":" in arch


def names_code(arch: str) -> bool:
    """Whether a name is `module:factory`, so that building it imports and calls somebody's code."""
    return is_foreign(arch) and arch.partition(":")[0] not in LIBRARIES


def build_foreign(arch: str) -> ForeignTrunk:
    """A new trunk of another library, with the weights that the library draws and without its random layers.

    Dropout and drop-path are switched off: their draws would differ after a resumption and in the momentum network.

    Args:
        arch: `timm:NAME`, `torchvision:NAME`, or `module:factory`, a function without arguments whose module is on
            Python's path or in the current folder and that returns images -> map (B, C, H, W).

    Raises:
        ValueError: a library, module or model that is not there, or one that gives no feature map.
    """
    library, _, name = arch.partition(":")
    map_of: Callable[[Any, Tensor], Tensor] | None = None
    options: dict[str, bool] = {}
    # Also within `torch.device("meta")`: what comes from elsewhere may compute with its weights when it is built.
    with torch.device("cpu"):
        if library == "timm":
            model, options = _timm_model(name)
            map_of = _map_like(model)
        elif library == "torchvision":
            model, map_of = _torchvision_model(name)
        else:
            model = _factory_model(library, name)
        trunk = _as_trunk(model, map_of or type(model).forward)
        trunk.options = options
        _silence(trunk)
        _measure(trunk, arch)
    return trunk


def check_image_size(trunk: nn.Module, arch: str, image_size: int) -> None:
    """Refuse a size of images that a foreign trunk cannot take; our own trunks take any.

    Raises:
        ValueError: naming the library's reason, or the map that it gave.
    """
    if isinstance(trunk, ForeignTrunk):
        _probe(trunk, arch, image_size)


def _as_trunk(model: nn.Module, map_of: Callable[[Any, Tensor], Tensor]) -> ForeignTrunk:
    """The model itself, whose class now also is `ForeignTrunk`; a wrapper would put its own name before every key."""
    kind = type(model)
    model.__class__ = type(kind.__name__, (ForeignTrunk, kind), {"map_of": staticmethod(map_of)})
    assert isinstance(model, ForeignTrunk)
    return model


# Random layers by the attribute that holds their rate: Dropout and StochasticDepth, timm's DropPath, and the numbers
# that attention layers keep for the dropout of their weights.
_RATES = ("p", "drop_prob", "attention_dropout", "dropout")
_RANDOM_LAYERS = (nn.modules.dropout._DropoutNd, nn.MultiheadAttention)
_RANDOM_NAMES = ("StochasticDepth", "DropPath", "ShiftedWindowAttention", "ShiftedWindowAttentionV2")


def _silence(trunk: nn.Module) -> None:
    for layer in trunk.modules():
        if isinstance(layer, _RANDOM_LAYERS) or type(layer).__name__ in _RANDOM_NAMES:
            for rate in _RATES:
                # A submodule of that name is a layer of its own.
                if isinstance(getattr(layer, rate, None), float):
                    setattr(layer, rate, 0.0)


def _probe(trunk: nn.Module, arch: str, size: int) -> Tensor:
    """The map of one grey image, in eval mode so that no statistics move."""
    was_training = trunk.training
    device = next(trunk.parameters()).device
    try:
        with torch.no_grad():
            found = trunk.eval()(torch.zeros(1, 3, size, size, device=device))
    except Exception as reason:  # whatever a library raises for a size that does not suit it
        raise ValueError(f"--arch {arch} cannot take images of {size} x {size}: {str(reason)[:200]}") from None
    finally:
        trunk.train(was_training)
    if not isinstance(found, Tensor) or found.ndim != 4 or found.shape[0] != 1 or found.shape[2] != found.shape[3]:
        shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(
            f"--arch {arch} gives {shape} for one image, and not a square feature map (1, C, H, W); take the model's "
            "output before pooling and classifier"
        )
    return found


def _measure(trunk: ForeignTrunk, arch: str) -> None:
    if not any(True for _ in trunk.parameters()):
        raise ValueError(f"--arch {arch} has no parameters to train; choose another model")
    found = _probe(trunk, arch, _PROBE_SIZE)
    trunk.feature_dim = found.shape[1]
    trunk.stride = max(round(_PROBE_SIZE / found.shape[2]), 1)


# ---------------------------------------------------------------------------------------------------------------------
# timm


def _timm_model(name: str) -> tuple[nn.Module, dict[str, bool]]:
    """Timm's model without pooling and classifier, which timm calls its unpooled features."""
    try:
        import timm
    except ImportError:
        raise ValueError(f"--arch timm:{name} needs timm; run: pip install timm") from None
    if not timm.is_model(name):
        raise ValueError(f"--arch timm:{name} is unknown to timm {timm.__version__}{_near(name, timm.list_models())}")
    return _create_for_any_size(timm.create_model, name)


def _create_for_any_size(create: Callable[..., nn.Module], name: str) -> tuple[nn.Module, dict[str, bool]]:
    # A transformer with a fixed grid would take the images of its published size alone; others know no such option.
    choices: tuple[dict[str, bool], ...] = ({"dynamic_img_size": True}, {"strict_img_size": False}, {})
    for option in choices:
        try:
            return create(name, pretrained=False, num_classes=0, global_pool="", **option), option
        except TypeError as reason:
            if not option:
                raise ValueError(f"--arch timm:{name} has no unpooled features: {reason}; choose another") from None
    raise AssertionError("the last form has no option to refuse")


def _map_like(model: nn.Module) -> Callable[[Any, Tensor], Tensor]:
    forward = type(model).forward
    prefix: int = getattr(model, "num_prefix_tokens", 0)
    channels_last = getattr(model, "output_fmt", "NCHW") == "NHWC"

    def map_of(trunk: Any, images: Tensor) -> Tensor:
        found: Tensor = forward(trunk, images)
        if found.ndim == 3:
            return _tokens_to_map(found, prefix)
        return found.permute(0, 3, 1, 2) if channels_last and found.ndim == 4 else found

    return map_of


def _tokens_to_map(tokens: Tensor, prefix: int) -> Tensor:
    """Tokens (B, prefix + side * side, C) in row-major order -> map (B, C, side, side)."""
    cells = tokens[:, prefix:]
    side = int(cells.shape[1] ** 0.5 + 0.5)
    return cells.transpose(1, 2).unflatten(2, (side, side))


# ---------------------------------------------------------------------------------------------------------------------
# torchvision

# What comes before pooling, in the order of the forward pass; the first row whose names a model has is its own.
_CHAINS = (
    ("features", "norm", "permute"),  # Swin
    ("features",),  # ConvNeXt, EfficientNet, MobileNet, VGG
    ("stem", "trunk_output"),  # RegNet
    ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4"),  # ResNet
)
# What comes after it; without these the tensors are those of the trunk alone.
_AFTER = ("avgpool", "flatten", "classifier", "head", "heads", "fc")


def _torchvision_model(name: str) -> tuple[nn.Module, Callable[[Any, Tensor], Tensor]]:
    from torchvision import models

    if name not in models.list_models(module=models):
        known = models.list_models(module=models)
        raise ValueError(f"--arch torchvision:{name} is unknown to torchvision{_near(name, known)}")
    model = models.get_model(name, weights=None)
    map_of = _torchvision_map(model)
    if map_of is None:
        raise ValueError(
            f"--arch torchvision:{name} has no trunk that is known here; choose a ResNet, RegNet, ConvNeXt, "
            f"EfficientNet, MobileNet, Swin or ViT, or --arch timm:{name}"
        )
    for after in _AFTER:
        if hasattr(model, after):
            delattr(model, after)
    return model, map_of


def chain_of(model: nn.Module) -> tuple[str, ...]:
    """The children of a torchvision model that images pass on the way to its map; empty where it has other ones."""
    return next((names for names in _CHAINS if all(hasattr(model, name) for name in names)), ())


def is_densenet(model: nn.Module) -> bool:
    """Whether this is torchvision's DenseNet, whose last activation stands in its `forward` alone."""
    return hasattr(getattr(model, "features", None), "norm5")


def _torchvision_map(model: nn.Module) -> Callable[[Any, Tensor], Tensor] | None:
    if hasattr(model, "encoder") and hasattr(model, "class_token"):
        return _torchvision_vit
    if is_densenet(model):
        return _torchvision_densenet
    chain = chain_of(model)
    if not chain:
        return None

    def map_of(trunk: Any, images: Tensor) -> Tensor:
        x = images
        for name in chain:
            x = getattr(trunk, name)(x)
        return x

    return map_of


def _torchvision_densenet(trunk: Any, images: Tensor) -> Tensor:
    return F.relu(trunk.features(images), inplace=True)


def _torchvision_vit(trunk: Any, images: Tensor) -> Tensor:
    """Torchvision's ViT, at any size that is a whole number of patches."""
    x = trunk.conv_proj(images)  # (B, C, h, w)
    cells = x.flatten(2).transpose(1, 2)
    tokens = torch.cat([trunk.class_token.expand(len(x), -1, -1), cells], dim=1)
    places = _resized_positions(trunk.encoder.pos_embedding, x.shape[2])
    # Not `encoder(...)`, which adds the positions of the published size.
    tokens = trunk.encoder.ln(trunk.encoder.layers(trunk.encoder.dropout(tokens + places)))
    return _tokens_to_map(tokens, 1)


def _resized_positions(positions: Tensor, side: int) -> Tensor:
    """Positions (1, 1 + s * s, C) for a grid of `side` cells a side, the grid's resized bicubically."""
    own = int((positions.shape[1] - 1) ** 0.5 + 0.5)
    if own == side:
        return positions
    grid = _tokens_to_map(positions, 1)
    resized = F.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False, antialias=True)
    return torch.cat([positions[:, :1], resized.flatten(2).transpose(1, 2)], dim=1)


# ---------------------------------------------------------------------------------------------------------------------
# Anybody's


def _factory_model(module: str, factory: str) -> nn.Module:
    # As `python -m` has it: a user's file lies where the command is given, not in this checkout.
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        make = getattr(importlib.import_module(module), factory)
    except (ImportError, AttributeError, ValueError) as reason:
        raise ValueError(
            f"--arch {module}:{factory}: {reason}; give a module of Python's path or of the current folder and a "
            f"function in it, or one of {', '.join(f'{library}:NAME' for library in LIBRARIES)}"
        ) from None
    try:
        model = make()
    except TypeError as reason:
        raise ValueError(f"--arch {module}:{factory} must be callable without arguments: {reason}") from None
    if not isinstance(model, nn.Module):
        raise ValueError(f"--arch {module}:{factory} returns a {type(model).__name__}, not a torch.nn.Module")
    return model


def _near(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"; near are {', '.join(near)}" if near else "; its list_models() names those that there are"
