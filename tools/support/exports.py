"""Backbones in the formats of other libraries: what each wants of names, weights and files, and its example code."""

from __future__ import annotations

import io
import json
import pickle
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from models.foreign import ForeignTrunk, is_foreign
from pipeline.atomic import replacing, write_atomically
from train.backbone_io import LoadedBackbone, backbone_state, torchvision_to_swin
from train.errors import UserMistake
from train.record.model_card import model_card

from .export_place import ENDINGS, check_place
from .foreign_exports import OWN_FORMATS, check_format
from .foreign_exports import usage as foreign_usage

TORCHVISION_NAMES = {
    "resnet18": "resnet18",
    "resnet34": "resnet34",
    "resnet50": "resnet50",
    "resnet101": "resnet101",
    "resnet152": "resnet152",
    "resnet50-2x": "wide_resnet50_2",
    "swin-t": "swin_t",
}
TIMM_NAMES = {
    **TORCHVISION_NAMES,
    "swin-t": "swin_tiny_patch4_window7_224",
    "vit-s": "vit_small_patch16_224",
    "vit-b": "vit_base_patch16_224",
}
RESNET_DEPTHS = {
    "resnet18": (2, 2, 2, 2),
    "resnet34": (3, 4, 6, 3),
    "resnet50": (3, 4, 6, 3),
    "resnet101": (3, 4, 23, 3),
    "resnet152": (3, 8, 36, 3),
    "resnet50-2x": (3, 4, 6, 3),
}
BASIC_BLOCKS = ("resnet18", "resnet34")


# ---------------------------------------------------------------------------------------------------------------------
# Key names


def timm_state(arch: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Timm's key names; for ResNets they are torchvision's. timm computes the window index, so it is left out."""
    if arch != "swin-t":
        return state
    kept = {name: value for name, value in state.items() if not name.endswith("relative_position_index")}
    return {torchvision_to_swin(name): value for name, value in kept.items()}


_D2_BATCH_NORM = (
    (re.compile(r"(^|\.)bn(\d)\."), r"\1conv\2.norm."),
    (re.compile(r"\.downsample\.0\."), ".shortcut."),
    (re.compile(r"\.downsample\.1\."), ".shortcut.norm."),
)


def _resnet_to_detectron2(name: str) -> str:
    for pattern, replacement in _D2_BATCH_NORM:
        name = pattern.sub(replacement, name)
    name = re.sub(r"^layer(\d)\.", lambda match: f"res{int(match[1]) + 1}.", name)
    return name if name.startswith("res") else f"stem.{name}"


def _swin_to_detectron2(name: str) -> str:
    # detectron2 has one LayerNorm for each of its four outputs; ours is the last's.
    return re.sub(r"^norm\.", "norm3.", torchvision_to_swin(name, downsample_offset=2))


def detectron2_arrays(arch: str, state: dict[str, Tensor]) -> dict[str, np.ndarray]:
    """Arrays by the key names of detectron2's `ResNet` and `SwinTransformer`."""
    rename = _swin_to_detectron2 if arch == "swin-t" else _resnet_to_detectron2
    arrays = {}
    for name, value in state.items():
        # The counter changes no feature, and detectron2's frozen batch norm has none.
        if name.endswith("num_batches_tracked"):
            continue
        if name.endswith("relative_position_index"):
            # torchvision stores the index flat, detectron2 as a square table.
            value = value.view(_square_side(value), -1)
        arrays[rename(name)] = value.numpy()
    return arrays


def _square_side(value: Tensor) -> int:
    return round(value.numel() ** 0.5)


_HF_RESNET_STEM = {"conv1": "embedder.embedder.convolution", "bn1": "embedder.embedder.normalization"}


def _resnet_to_hf(name: str) -> str:
    module, tensor = name.rsplit(".", 1)
    if module in _HF_RESNET_STEM:
        return f"{_HF_RESNET_STEM[module]}.{tensor}"
    stage, block, inner = re.match(r"layer(\d)\.(\d+)\.(.+)", module).groups()  # type: ignore[union-attr]
    where = f"encoder.stages.{int(stage) - 1}.layers.{block}"
    if inner.startswith("downsample"):
        return f"{where}.shortcut.{'convolution' if inner.endswith('0') else 'normalization'}.{tensor}"
    kind, number = ("convolution" if inner.startswith("conv") else "normalization"), int(inner[-1]) - 1
    return f"{where}.layer.{number}.{kind}.{tensor}"


_HF_SWIN = (
    (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
    (r"^patch_embed\.norm\.", "embeddings.norm."),
    (r"^layers\.", "encoder.layers."),
    (r"^norm\.", "layernorm."),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.attn\.proj\.", ".attention.output.dense."),
    (r"\.attn\.", ".attention.self."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
)


def hf_state(arch: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Key names of transformers' `ResNetModel`, `SwinModel` or, for the wide ResNet, `TimmWrapperModel`.

    Swin's are those of the models on the hub, which every version reads.
    """
    if arch == "resnet50-2x" or is_foreign(arch):
        return {f"timm_model.{name}": value for name, value in state.items()}
    if arch != "swin-t":
        return {_resnet_to_hf(name): value for name, value in state.items()}
    renamed: dict[str, Tensor] = {}
    for name, value in state.items():
        name = torchvision_to_swin(name, downsample_offset=2)
        for pattern, replacement in _HF_SWIN:
            name = re.sub(pattern, replacement, name)
        if name.endswith("relative_position_index"):
            renamed[name] = value.view(_square_side(value), -1)
        elif ".self.qkv." in name:
            # transformers has three layers where torchvision has one, in this order.
            parts = value.chunk(3)
            for part, label in zip(parts, ("query", "key", "value"), strict=True):
                # A clone: safetensors refuses tensors that share memory.
                renamed[name.replace(".qkv.", f".{label}.")] = part.contiguous().clone()
        else:
            renamed[name] = value
    return renamed


def hf_config(arch: str, image_size: int, options: Mapping[str, bool] = MappingProxyType({})) -> dict[str, Any]:
    """The `config.json` that transformers builds the model from; `options` are those of timm's `create_model`."""
    if arch == "swin-t":
        return {
            "model_type": "swin",
            "architectures": ["SwinModel"],
            "image_size": image_size,
            "patch_size": 4,
            "num_channels": 3,
            "embed_dim": 96,
            "depths": [2, 2, 6, 2],
            "num_heads": [3, 6, 12, 24],
            "window_size": 7,
            "mlp_ratio": 4.0,
            "qkv_bias": True,
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-5,
            "drop_path_rate": 0.0,
            "use_absolute_embeddings": False,
            "hidden_size": 768,
        }
    if arch == "resnet50-2x":
        # transformers' own ResNet has no width factor.
        return {
            "model_type": "timm_wrapper",
            "architectures": ["TimmWrapperModel"],
            "architecture": TIMM_NAMES[arch],
            "do_pooling": True,
            "num_classes": 0,
        }
    if is_foreign(arch):
        # Pooling switched off: timm then gives its normalised map or tokens, which the features are the mean of.
        return {
            "model_type": "timm_wrapper",
            "architectures": ["TimmWrapperModel"],
            "architecture": arch.partition(":")[2],
            "do_pooling": True,
            "num_classes": 0,
            "model_args": {"global_pool": "", **options},
        }
    basic = arch in BASIC_BLOCKS
    return {
        "model_type": "resnet",
        "architectures": ["ResNetModel"],
        "num_channels": 3,
        "embedding_size": 64,
        "hidden_sizes": [64, 128, 256, 512] if basic else [256, 512, 1024, 2048],
        "depths": list(RESNET_DEPTHS[arch]),
        "layer_type": "basic" if basic else "bottleneck",
        "hidden_act": "relu",
        "downsample_in_first_stage": False,
        "downsample_in_bottleneck": False,
    }


def hf_preprocessor(image_size: int) -> dict[str, Any]:
    """Short side to 256/224 of the size, centre crop, ImageNet statistics."""
    return {
        "image_processor_type": "ConvNextImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": image_size},
        "crop_pct": 0.875,
        "resample": 2,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
    }


# ---------------------------------------------------------------------------------------------------------------------
# Writers: (backbone, path to write, image size)


def write_torchvision(loaded: LoadedBackbone, path: Path, image_size: int) -> None:
    """Safetensors with torchvision's key names, without classifier."""
    save_file(backbone_state(loaded.encoder), path, metadata={"format": "pt"})


def write_timm(loaded: LoadedBackbone, path: Path, image_size: int) -> None:
    """Safetensors with timm's key names, without classifier."""
    save_file(timm_state(loaded.arch, backbone_state(loaded.encoder)), path, metadata={"format": "pt"})


class _ArrayPickler(pickle.Pickler):
    """Arrays as `numpy.ndarray(shape, dtype, bytearray)`: numpy 1 and 2 name their own helpers differently."""

    def reducer_override(self, value: Any) -> Any:
        """How an array is rebuilt; anything else is pickled as usual."""
        if isinstance(value, np.ndarray):
            return np.ndarray, (value.shape, value.dtype.str, bytearray(np.ascontiguousarray(value).tobytes()))
        return NotImplemented


def write_detectron2(loaded: LoadedBackbone, path: Path, image_size: int) -> None:
    """A pickle in detectron2's model-zoo format that holds nothing but arrays, two strings and a flag."""
    buffer = io.BytesIO()
    document = {
        "model": detectron2_arrays(loaded.arch, backbone_state(loaded.encoder)),
        "__author__": "regatta",
        "matching_heuristics": True,  # lets detectron2 find the keys under backbone.bottom_up and the like
    }
    _ArrayPickler(buffer, protocol=4).dump(document)
    path.write_bytes(buffer.getvalue())


def write_hf(loaded: LoadedBackbone, path: Path, image_size: int) -> None:
    """A folder for `AutoModel.from_pretrained`."""
    path.mkdir()
    state = hf_state(loaded.arch, backbone_state(loaded.encoder))
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    config = hf_config(loaded.arch, image_size, getattr(loaded.encoder, "options", {}))
    (path / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (path / "preprocessor_config.json").write_text(json.dumps(hf_preprocessor(image_size), indent=2) + "\n")


class _WithPooling(nn.Module):
    """images -> (features (B, C), feature map (B, C, H, W))."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Pooled features and the map they come from."""
        feature_map = self.encoder(images)
        return feature_map.mean(dim=(2, 3)), feature_map


def write_onnx(loaded: LoadedBackbone, path: Path, image_size: int) -> None:
    """One ONNX file with a free batch size; outputs `features` (B, C) and `feature_map` (B, C, H, W)."""
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as reason:
        raise UserMistake(f"--format onnx needs {reason.name}; run: bash tools/setup.sh --retry") from None
    # On the CPU and in the plain layout, like the example that it is traced with.
    encoder = loaded.encoder.to("cpu").to(memory_format=torch.contiguous_format)
    # Two images: a batch of one would be taken for a constant by the exporter.
    example = torch.zeros(2, 3, image_size, image_size)
    free_batch = {"images": {0: torch.export.Dim("batch")}}
    torch.onnx.export(
        _WithPooling(encoder).eval(),
        (example,),
        str(path),
        input_names=["images"],
        output_names=["features", "feature_map"],
        dynamic_shapes=free_batch,
        dynamo=True,
        external_data=False,
        verbose=False,
    )


# ---------------------------------------------------------------------------------------------------------------------
# How each is used; `{out}` is the file's own name, as `_in_quotes` writes it


_PREPARE = "import torch\nimages = torch.zeros(1, 3, {size}, {size})  # normalised as below\n"
_INPUT = (
    "RGB in 0..1, minus mean (0.485, 0.456, 0.406), divided by std (0.229, 0.224, 0.225), channels first, as `images`."
)


def usage_torchvision(arch: str) -> str:
    """Code that loads the export with torchvision."""
    head = "head" if arch == "swin-t" else "fc"
    return _PREPARE + (
        "import torchvision\nfrom safetensors.torch import load_file\n"
        f"model = torchvision.models.{TORCHVISION_NAMES[arch]}()\nmodel.{head} = torch.nn.Identity()\n"
        "model.load_state_dict(load_file('{out}'))\nfeatures = model.eval()(images)"
    )


def usage_timm(arch: str) -> str:
    """Code that loads the export with timm."""
    size = {"swin-t": ", img_size={size}", "vit-s": ", num_heads=12"}.get(arch, "")
    return _PREPARE + (
        f"import timm\nname = '{TIMM_NAMES[arch]}'\n"
        f"model = timm.create_model(name, num_classes=0{size}, checkpoint_path='{{out}}')\n"
        "features = model.eval()(images)"
    )


def usage_hf(arch: str) -> str:
    """Code that loads the export with transformers."""
    return _PREPARE + (
        "from transformers import AutoModel\nmodel = AutoModel.from_pretrained('{out}').eval()\n"
        "features = model(images).pooler_output.flatten(1)"
    )


def usage_onnx(arch: str) -> str:
    """Code that runs the export."""
    return _PREPARE + (
        "import onnxruntime\nsession = onnxruntime.InferenceSession('{out}')\n"
        "features, feature_map = session.run(None, {{'images': images.numpy()}})"
    )


_DETECTRON2_INPUT = (
    "RGB in 0..255 minus mean (123.675, 116.28, 103.53), divided by std (58.395, 57.12, 57.375), channels first: "
    "detectron2 does so with the settings above, which are not its defaults (BGR and other statistics)."
)
_DETECTRON2_SWIN = """\
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import SwinTransformer
backbone = SwinTransformer(
    embed_dim=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24), window_size=7, drop_path_rate=0.0, out_indices=(3,)
)
DetectionCheckpointer(backbone).load("{out}")
# Larger than 224 px: where the last map is a single window, detectron2 shifts it and others do not.
images = torch.zeros(1, 3, 448, 448)  # normalised as below
features = backbone.eval()(images)["p3"].mean(dim=(2, 3))
# A detector takes out_indices=(0, 1, 2, 3), of whose norms the file has norm3 alone, and in its lazy config
#   model.input_format = dataloader.train.mapper.image_format = dataloader.test.mapper.image_format = "RGB"
#   model.pixel_mean = [123.675, 116.28, 103.53]; model.pixel_std = [58.395, 57.12, 57.375]
"""


def usage_detectron2(arch: str) -> str:
    """The settings with which detectron2 computes the same features."""
    if arch == "swin-t":
        return _DETECTRON2_SWIN
    depth = 50 if arch == "resnet50-2x" else int(arch.removeprefix("resnet"))
    width = "RES2_OUT_CHANNELS = 64" if arch in BASIC_BLOCKS else f"WIDTH_PER_GROUP = {128 if '2x' in arch else 64}"
    return f"""\
from detectron2.config import get_cfg
cfg = get_cfg()
cfg.MODEL.WEIGHTS = "{{out}}"
cfg.MODEL.RESNETS.DEPTH = {depth}
cfg.MODEL.RESNETS.{width}
cfg.MODEL.RESNETS.STRIDE_IN_1X1 = False  # the stride is on the 3x3 convolution; the default is for MSRA's models
cfg.INPUT.FORMAT = "RGB"
cfg.MODEL.PIXEL_MEAN = [123.675, 116.28, 103.53]
cfg.MODEL.PIXEL_STD = [58.395, 57.12, 57.375]
# To fine-tune all layers as the papers do; the frozen batch norm of the defaults reads the file as well.
cfg.MODEL.RESNETS.NORM = "SyncBN"
cfg.MODEL.BACKBONE.FREEZE_AT = 0"""


@dataclass(frozen=True)
class Target:
    """One export format: its file ending ("" for a folder), who writes it, how it is used, what images it takes."""

    ending: str
    write: Callable[[LoadedBackbone, Path, int], None]
    usage: Callable[[str], str]
    images: str = _INPUT


TARGETS: dict[str, Target] = {
    "torchvision": Target(ENDINGS["torchvision"], write_torchvision, usage_torchvision),
    "timm": Target(ENDINGS["timm"], write_timm, usage_timm),
    "detectron2": Target(ENDINGS["detectron2"], write_detectron2, usage_detectron2, _DETECTRON2_INPUT),
    "hf": Target(ENDINGS["hf"], write_hf, usage_hf),
    "onnx": Target(ENDINGS["onnx"], write_onnx, usage_onnx),
}


def _usage(loaded: LoadedBackbone, target: str) -> str:
    if isinstance(loaded.encoder, ForeignTrunk) and target != "onnx":
        return _PREPARE + foreign_usage(loaded.encoder, loaded.arch, target)
    return TARGETS[target].usage(loaded.arch)


def _in_quotes(name: str) -> str:
    """A file name as it stands between the quotes, single or double, of a string in Python."""
    shown = (
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in name.replace("\\", "\\\\")
    )
    return "".join(f"\\{char}" if char in "'\"" else char for char in shown)


def export(loaded: LoadedBackbone, out: Path, target: str, image_size: int = 224, overwrite: bool = False) -> Path:
    """Write the export and its model card; returns the card's path.

    Raises:
        UserMistake: the ending does not fit, or something is there already.
    """
    kind = TARGETS[target]
    check_place(out, target, overwrite)
    if is_foreign(loaded.arch) or loaded.arch in OWN_FORMATS:
        check_format(loaded.arch, target)
    if image_size < 32:
        raise UserMistake(f"--image-size {image_size}: at least 32, the stride of the backbone")
    # transformers' hub shows the README of a folder; a single file has its card beside it.
    card = out / "README.md" if target == "hf" else out.with_name(f"{out.name}.md")
    parameters = sum(p.numel() for p in loaded.encoder.parameters())
    code = _usage(loaded, target).format(out=_in_quotes(out.name), size=image_size)
    text = model_card(loaded, target, code, kind.images, parameters)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with replacing(out) as temporary:
            kind.write(loaded, temporary, image_size)
        # After the export: a card without its file would describe nothing.
        write_atomically(card, text.encode())
    except (OSError, SafetensorError) as reason:
        cause = getattr(reason, "strerror", None) or reason
        raise UserMistake(f"OUT {out}: {cause}; choose a place that can be written") from None
    return card
