"""Computes features of exported backbones with other libraries alone; run by test_export.py where regatta is absent.

Usage: python -I export_reader.py REQUEST.json RESULT.npz, the request a list of {name, format, arch, path, images}.
"""

import json
import pickle
import sys

import numpy as np
import torch
import torch.nn.functional as F


def by_torchvision(request, images):
    import torchvision
    from safetensors.torch import load_file

    names = {"resnet50-2x": "wide_resnet50_2", "swin-t": "swin_t"}
    model = getattr(torchvision.models, names.get(request["arch"], request["arch"]))()
    setattr(model, "head" if request["arch"] == "swin-t" else "fc", torch.nn.Identity())
    model.load_state_dict(load_file(request["path"]), strict=True)
    return model.eval()(images)


def by_timm(request, images):
    import timm

    names = {"resnet50-2x": "wide_resnet50_2", "swin-t": "swin_tiny_patch4_window7_224"}
    name = names.get(request["arch"], request["arch"])
    model = timm.create_model(name, pretrained=False, num_classes=0, checkpoint_path=request["path"])
    return model.eval()(images)


def by_hf(request, images):
    import transformers

    transformers.utils.logging.disable_progress_bar()
    model, info = transformers.AutoModel.from_pretrained(request["path"], output_loading_info=True)
    assert not info["missing_keys"], info
    processor = transformers.AutoImageProcessor.from_pretrained(request["path"], backend="pil")
    assert processor.size == {"shortest_edge": 224}
    return model.eval()(images).pooler_output.flatten(1)


def by_onnx(request, images):
    import onnxruntime

    session = onnxruntime.InferenceSession(request["path"])
    pooled, feature_map = session.run(None, {"images": images.numpy()})
    np.testing.assert_allclose(pooled, feature_map.mean(axis=(2, 3)), atol=1e-5)
    return torch.from_numpy(pooled)


class ArraysOnly(pickle.Unpickler):
    """Refuses a pickle that holds anything but arrays and plain values."""

    def find_class(self, module, name):
        if (module, name) in {("numpy", "ndarray"), ("builtins", "bytearray")}:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} is not an array")


def load_detectron2(path):
    with open(path, "rb") as stream:
        document = ArraysOnly(stream).load()
    assert document["__author__"] not in ("", "Caffe2") and document["matching_heuristics"] is True
    assert all(type(value) is np.ndarray for value in document["model"].values())
    return {name: torch.from_numpy(value) for name, value in document["model"].items()}


def by_detectron2(request, images):
    """Globally averaged last feature map of detectron2's backbones, written from their key names."""
    arrays = load_detectron2(request["path"])
    return (swin_by_detectron2 if "patch_embed.proj.weight" in arrays else resnet_by_detectron2)(arrays, images)


def resnet_by_detectron2(arrays, images):
    """The ResNet: stem, res2..res5, convN with norm, shortcut; the stride is that of STRIDE_IN_1X1 = False."""

    def conv(x, name, stride=1, padding=0):
        x = F.conv2d(x, arrays[f"{name}.weight"], stride=stride, padding=padding)
        norm = [arrays[f"{name}.norm.{part}"] for part in ("running_mean", "running_var", "weight", "bias")]
        return F.batch_norm(x, *norm, training=False, eps=1e-5)

    x = F.max_pool2d(conv(images, "stem.conv1", 2, 3).relu(), 3, 2, 1)
    for stage in range(2, 6):
        block = 0
        while f"res{stage}.{block}.conv1.weight" in arrays:
            name, stride = f"res{stage}.{block}", 2 if stage > 2 and block == 0 else 1
            shortcut = conv(x, f"{name}.shortcut", stride) if f"{name}.shortcut.weight" in arrays else x
            if f"{name}.conv3.weight" in arrays:
                y = conv(conv(x, f"{name}.conv1").relu(), f"{name}.conv2", stride, 1).relu()
                y = conv(y, f"{name}.conv3")
            else:
                y = conv(conv(x, f"{name}.conv1", stride, 1).relu(), f"{name}.conv2", 1, 1)
            x, block = (y + shortcut).relu(), block + 1
    return x.mean(dim=(2, 3))


def swin_by_detectron2(arrays, images):
    """The Swin transformer: windows of 7, shifted by 3 in every second block, merging at the end of a layer; norm3."""
    window, heads = 7, (3, 6, 12, 24)

    def linear(x, name):
        return F.linear(x, arrays[f"{name}.weight"], arrays.get(f"{name}.bias"))

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], arrays[f"{name}.weight"], arrays[f"{name}.bias"], 1e-5)

    def windows(x):  # (B, S, S, C) -> (B * windows, 49, C)
        b, side, _, c = x.shape
        cut = x.view(b, side // window, window, side // window, window, c).transpose(2, 3)
        return cut.reshape(-1, window * window, c)

    def attention(x, name, count, shift):
        b, side, _, c = x.shape
        x = x.roll((-shift, -shift), (1, 2))
        q, k, v = linear(windows(x), f"{name}.qkv").unflatten(-1, (3, count, c // count)).permute(2, 0, 3, 1, 4)
        index = arrays[f"{name}.relative_position_index"].flatten().long()
        table = arrays[f"{name}.relative_position_bias_table"]
        scores = q @ k.transpose(-2, -1) * (c // count) ** -0.5
        scores = scores + table[index].view(window**2, window**2, count).permute(2, 0, 1)
        if shift:
            # Tokens that the roll brought together from two edges do not see each other.
            band = torch.zeros(side)
            band[-window:-shift], band[-shift:] = 1, 2
            region = windows((3 * band[:, None] + band[None, :]).view(1, side, side, 1))[:, :, 0]
            apart = (region[:, None, :] != region[:, :, None]).repeat(b, 1, 1)
            scores = scores.masked_fill(apart[:, None], -100.0)
        y = linear((scores.softmax(-1) @ v).transpose(1, 2).flatten(2), f"{name}.proj")
        y = y.view(b, side // window, side // window, window, window, c).transpose(2, 3).reshape(b, side, side, c)
        return y.roll((shift, shift), (1, 2))

    weight, bias = arrays["patch_embed.proj.weight"], arrays["patch_embed.proj.bias"]
    x = norm(F.conv2d(images, weight, bias, stride=4).permute(0, 2, 3, 1), "patch_embed.norm")
    for layer, count in enumerate(heads):
        block = 0
        while f"layers.{layer}.blocks.{block}.norm1.weight" in arrays:
            name = f"layers.{layer}.blocks.{block}"
            # Even where the map is one window, which torchvision, timm and transformers then leave unshifted.
            shift = 3 if block % 2 else 0
            x = x + attention(norm(x, f"{name}.norm1"), f"{name}.attn", count, shift)
            x = x + linear(F.gelu(linear(norm(x, f"{name}.norm2"), f"{name}.mlp.fc1")), f"{name}.mlp.fc2")
            block += 1
        if f"layers.{layer}.downsample.reduction.weight" in arrays:
            name = f"layers.{layer}.downsample"
            corners = [x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
            x = linear(norm(torch.cat(corners, -1), f"{name}.norm"), f"{name}.reduction")
    return norm(x, "norm3").mean(dim=(1, 2))


READERS = {
    "torchvision": by_torchvision,
    "timm": by_timm,
    "hf": by_hf,
    "onnx": by_onnx,
    "detectron2": by_detectron2,
}


def main():
    for absent in ("train", "tools", "models", "pipeline", "regatta"):
        try:
            __import__(absent)
        except ImportError:
            continue
        raise SystemExit(f"{absent} can be imported here, so nothing would be proven")
    with open(sys.argv[1]) as stream:
        requests = json.load(stream)
    features = {}
    for request in requests:
        images = torch.from_numpy(np.load(request["images"]))
        with torch.no_grad():
            features[request["name"]] = READERS[request["format"]](request, images).numpy()
    np.savez(sys.argv[2], **features)


if __name__ == "__main__":
    main()
