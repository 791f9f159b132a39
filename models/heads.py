"""Projectors, predictors and dense heads: plain sequences of layers, so that their weights have predictable names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn

from .hyperparameters import HeadInit

OutputNorm = Literal["none", "affine", "scale", "fixed"]


def global_pool(feature_map: Tensor) -> Tensor:
    """Mean over positions, which projectors read: (B, C, H, W) -> (B, C)."""
    return feature_map.mean(dim=(2, 3))


def mlp_head(
    sizes: Sequence[int],
    *,
    biases: Sequence[bool],
    hidden_norm: bool,
    output_norm: OutputNorm = "none",
) -> nn.Sequential:
    """Linear layers with ReLU between them: rows (N, sizes[0]) -> (N, sizes[-1]).

    Args:
        sizes: width of the input, of every hidden layer and of the output.
        biases: whether each Linear has a bias, in order.
        hidden_norm: a BatchNorm between each hidden Linear and its ReLU.
        output_norm: BatchNorm on the output: "none", "affine" with gamma and beta, "scale" with gamma alone, or "fixed"
            with neither.

    Raises:
        ValueError: the number of bias flags is not the number of Linear layers.
    """
    if len(biases) != len(sizes) - 1:
        raise ValueError(f"{len(sizes) - 1} linear layers need as many bias flags, not {len(biases)}")
    layers: list[nn.Module] = []
    last = len(biases) - 1
    for index, bias in enumerate(biases):
        layers.append(nn.Linear(sizes[index], sizes[index + 1], bias=bias))
        if index == last:
            break
        if hidden_norm:
            layers.append(nn.BatchNorm1d(sizes[index + 1]))
        layers.append(nn.ReLU(inplace=True))
    if output_norm != "none":
        norm = nn.BatchNorm1d(sizes[-1], affine=output_norm != "fixed")
        if output_norm == "scale":
            norm.register_parameter("bias", None)
        layers.append(norm)
    return nn.Sequential(*layers)


def dense_head(in_dim: int, hidden_dim: int, out_dim: int, hidden_norm: bool = False) -> nn.Sequential:
    """Two 1x1 convolutions with a ReLU: map (B, in_dim, H, W) -> (B, out_dim, H, W).

    Args:
        in_dim: channels of the map.
        hidden_dim: channels between the convolutions.
        out_dim: channels of the result.
        hidden_norm: a batch norm before the ReLU.

    Source: DenseCL (arXiv 2011.09157) section 3.2, the dense projection head; with the norm PixPro's
    (zdaxie/PixPro contrast/models/PixPro.py).
    """
    norm = [nn.BatchNorm2d(hidden_dim)] if hidden_norm else []
    return nn.Sequential(
        nn.Conv2d(in_dim, hidden_dim, kernel_size=1),
        *norm,
        nn.ReLU(inplace=True),
        nn.Conv2d(hidden_dim, out_dim, kernel_size=1),
    )


def initialise_linear(module: nn.Module, scheme: HeadInit) -> None:
    """Draw all Linear layers inside `module` anew, in place.

    Args:
        module: a head.
        scheme: "torch" is PyTorch's default, "fan_in" Kaiming-normal with zero bias (OpenSelfSup).
    """
    for layer in module.modules():
        if not isinstance(layer, nn.Linear):
            continue
        if scheme == "torch":
            layer.reset_parameters()
        else:
            nn.init.kaiming_normal_(layer.weight, mode="fan_in", nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
