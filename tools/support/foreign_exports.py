"""Exports of backbones that come from another library: the formats that fit, and code that computes the features."""

from __future__ import annotations

from models.foreign import ForeignTrunk, chain_of, is_densenet
from train.errors import UserMistake

_FORMATS = {"timm": ("timm", "hf", "onnx"), "torchvision": ("torchvision", "onnx")}
OWN_FORMATS = {
    "vit-s": ("timm", "onnx"),
    "vit-b": ("timm", "onnx"),
    "resnet10-w16": ("onnx",),
    "resnet10-w32": ("onnx",),
}
"""Backbones of our own that only some formats have: torchvision and transformers compute their ViTs otherwise, and no
library has the narrow ResNets."""


def check_format(arch: str, target: str) -> None:
    """Refuse a format that knows no such backbone.

    Args:
        arch: `timm:NAME`, `torchvision:NAME`, `module:factory`, or one of `OWN_FORMATS`.
        target: export format.

    Raises:
        UserMistake: naming the formats that fit.
    """
    fitting = OWN_FORMATS.get(arch) or _FORMATS.get(arch.partition(":")[0], ("onnx",))
    if target not in fitting:
        raise UserMistake(
            f"--format {target} has no {arch}: choose {' or '.join(fitting)}; the run's backbone.safetensors has all "
            "tensors by the names of its own library"
        )


def usage(trunk: ForeignTrunk, arch: str, target: str) -> str:
    """Code that loads an export with its library and computes the pooled features; `{out}` is the file's name."""
    name = arch.partition(":")[2]
    if target == "timm":
        options = "".join(f", {key}={value}" for key, value in trunk.options.items())
        return (
            "import timm\n"
            f"model = timm.create_model('{name}', num_classes=0, global_pool=''{options}, checkpoint_path='{{out}}')\n"
            f"features = {pooled(trunk, 'model.eval()(images)')}"
        )
    if target == "hf":
        return (
            "from transformers import AutoModel\nmodel = AutoModel.from_pretrained('{out}').eval()\n"
            f"features = {pooled(trunk, 'model(images).pooler_output')}"
        )
    return (
        "import torchvision\nfrom safetensors.torch import load_file\n"
        f"model = torchvision.models.{name}()\n"
        "for after in ('avgpool', 'flatten', 'classifier', 'head', 'heads', 'fc'):\n"
        "    if hasattr(model, after):\n        delattr(model, after)\n"
        "model.load_state_dict(load_file('{out}'))\nmodel.eval()\n" + _torchvision_features(trunk)
    )


def pooled(trunk: ForeignTrunk, found: str) -> str:
    """The expression that averages timm's unpooled features over their positions."""
    prefix = getattr(trunk, "num_prefix_tokens", None)
    if prefix is not None:
        return f"{found}[:, {prefix}:].mean(dim=1)"
    dims = "(1, 2)" if getattr(trunk, "output_fmt", "NCHW") == "NHWC" else "(2, 3)"
    return f"{found}.mean(dim={dims})"


def _torchvision_features(trunk: ForeignTrunk) -> str:
    chain = chain_of(trunk)
    if hasattr(trunk, "class_token"):
        return (
            "patches = model._process_input(images)  # of the published size; others need resized positions\n"
            "tokens = torch.cat([model.class_token.expand(len(images), -1, -1), patches], dim=1)\n"
            "features = model.encoder(tokens)[:, 1:].mean(dim=1)"
        )
    steps = "".join(f"feature_map = model.{step}(feature_map)\n" for step in chain)
    relu = "feature_map = feature_map.relu()\n" if is_densenet(trunk) else ""
    return f"feature_map = images\n{steps}{relu}features = feature_map.mean(dim=(2, 3))"
