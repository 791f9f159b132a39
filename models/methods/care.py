"""CARE: a transformer stream beside the last CNN stage, whose embedding the CNN's learns to follow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attention_stream import AttentionStream, Position
from ..heads import mlp_head
from ..losses import unit
from ..momentum import copy_and_freeze, follow
from ..norm import convert_batch_norm
from ..options import option
from ..resnet import ConvInit, ResNetTrunk, build_backbone
from .base import Method, StepInputs, StepOutput

AttentionLoss = Literal["mse_mean", "l2norm"]


@dataclass(frozen=True)
class CareConfig:
    """Hyper-parameters of CARE."""

    design: Literal["parallel", "sequential"] = option(
        "parallel", "two streams side by side, or the CNN followed by the attention blocks and one head"
    )
    t_input: Literal["layer3", "layer4"] = option(
        "layer3",
        "stage that feeds the transformer stream: beside layer4 (the code), or the last one (the paper's text)",
    )
    n_blocks: int = option(5, "attention blocks (n)", above=0)
    heads: int = option(4, "attention heads", above=0)
    pos: Position = option("absolute", "position encoding of the attention blocks")
    lambda_att: float = option(100.0, "weight of the attention loss (lambda)")
    att_loss: AttentionLoss = option(
        "mse_mean",
        "attention loss: mean squared error over all elements (the code), or length of the difference (Eq. 4)",
    )
    att_teacher_terms: bool = option(
        True, "add the momentum network's attention loss, a constant, to the reported value"
    )
    t_zero_init: bool = option(False, "start the last batch norm of each attention block at gamma 0")
    t_bn_group_size: int = option(
        128, "images that share batch-norm statistics in the transformer stream; 0 is the rank's whole batch"
    )
    hidden_dim: int = option(4096, "width of the hidden layer of projectors and predictors", above=0)
    dim: int = option(256, "width of the embeddings", above=0)
    conv_init: ConvInit = option("fan_out", "how the backbone's convolutions start: Kaiming-normal or as in PyTorch")
    zero_init_residual: bool = option(False, "start every residual branch of a ResNet at zero")


class Streams(NamedTuple):
    """Unit embeddings (B, D) of the CNN stream (None in the sequential design) and of the transformer stream."""

    conv: Tensor | None
    attn: Tensor


def attention_loss(conv: Tensor, attn: Tensor, form: AttentionLoss) -> Tensor:
    """How far the CNN stream's embedding is from the transformer stream's, which gets no gradient.

    Args:
        conv: (B, D) unit rows.
        attn: (B, D) unit rows of the same images by the same network.
        form: "mse_mean" is the mean over all B * D squared differences, "l2norm" the mean over B of the distances.

    Returns:
        Scalar in the inputs' dtype.

    Source: CARE (arXiv 2110.05340) Eq. 4 for "l2norm"; its code for "mse_mean" and for the stopped gradient.
    """
    if form == "mse_mean":
        return F.mse_loss(conv, attn.detach())
    return torch.linalg.vector_norm(conv - attn.detach(), dim=1).mean()


def cross_view_loss(online: list[Tensor], momentum: list[Tensor]) -> Tensor:
    """4 - 2 (q1.k2 + q2.k1), batch mean, for unit rows (B, D) of view 1 and 2: scalar in 0..8."""
    similarity = (online[0] * momentum[1].detach()).sum(1) + (online[1] * momentum[0].detach()).sum(1)
    return (4.0 - 2.0 * similarity).mean()


class Care(Method):
    """Two BYOL-like streams on shared early stages, the CNN one supervised by the attention one.

    L = L_c + L_t + lambda L_att, with L_c and L_t the cross-view regressions of each stream, in both directions, and
    L_att the distance between the two streams' embeddings of the same view by the same network.

    Args:
        config: hyper-parameters.
        arch: a ResNet of `BACKBONES`.
        image_size: side of a view in pixels; position tables belong to it.
        bn_mode: batch norm of CNN and heads, "sync" in the paper; the transformer stream has groups of its own.
        bn_group_size: consecutive images that share statistics of CNN and heads in mode "group".

    Raises:
        ValueError: an architecture without residual stages, or settings that do not fit it.

    Source: CARE (arXiv 2110.05340) Eq. 1-5, Fig. 2; ChongjianGE/CARE for what the text leaves open.
    Differs: T-stream statistics over `t_bn_group_size` images instead of a device's; any image size and ResNet; EMA
    after the optimizer step, which gives the same weights as at the start of the next. The sequential design is ours to
    define: attention blocks follow layer4 and feed the only head, so that L_t alone remains.
    """

    Config = CareConfig
    ema_index_offset = 1

    def __init__(
        self, config: CareConfig, *, arch: str, image_size: int, bn_mode: str = "sync", bn_group_size: int = 0
    ) -> None:
        super().__init__()
        self.config = config
        trunk = build_backbone(arch, config.conv_init, config.zero_init_residual)
        if not isinstance(trunk, ResNetTrunk):
            raise ValueError(f"--arch {arch} has no layer3 for CARE's transformer stream; choose a ResNet")
        self.encoder = trunk
        middle, last = trunk.stage_dims
        self.attention_stream = AttentionStream(
            last if self._from_last_stage else middle,
            last,
            _cells(image_size, trunk.stride if self._from_last_stage else trunk.stride // 2),
            blocks=config.n_blocks,
            heads=config.heads,
            pos=config.pos,
            downsample=not self._from_last_stage,
            zero_init=config.t_zero_init,
        )
        streams = ("conv", "attn") if self.two_streams else ("attn",)
        for stream in streams:
            sizes = (last, config.hidden_dim, config.dim)
            setattr(self, f"{stream}_projector", mlp_head(sizes, biases=(True, True), hidden_norm=True))
            sizes = (config.dim, config.hidden_dim, config.dim)
            setattr(self, f"{stream}_predictor", mlp_head(sizes, biases=(True, True), hidden_norm=True))
        for name, child in self.named_children():
            own = name == "attention_stream"
            convert_batch_norm(child, "group" if own else bn_mode, config.t_bn_group_size if own else bn_group_size)
        for name in self._averaged:
            setattr(self, f"momentum_{name}", copy_and_freeze(getattr(self, name)))

    @property
    def two_streams(self) -> bool:
        """Whether the CNN stream has a head of its own."""
        return self.config.design == "parallel"

    @property
    def _from_last_stage(self) -> bool:
        return self.config.t_input == "layer4" or not self.two_streams

    @property
    def _averaged(self) -> tuple[str, ...]:
        """Modules with a momentum copy: all but the predictors."""
        heads = ("conv_projector", "attn_projector") if self.two_streams else ("attn_projector",)
        return ("encoder", "attention_stream", *heads)

    def momentum_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        """CNN, transformer stream and projectors with their momentum copies."""
        return [(getattr(self, name), getattr(self, f"momentum_{name}")) for name in self._averaged]

    def compile_targets(self) -> list[nn.Module]:
        """Heads and transformer streams."""
        streams: list[nn.Module] = [getattr(self, f"{prefix}attention_stream") for prefix in ("", "momentum_")]
        return super().compile_targets() + streams

    def forward(self, inputs: StepInputs) -> StepOutput:
        """L_c + L_t + lambda L_att with its three parts as metrics."""
        views = (inputs.view1, inputs.view2)
        online = [self.embed(view) for view in views]
        with torch.no_grad():
            momentum = [self.embed(view, momentum=True) for view in views]
        with torch.autocast(inputs.view1.device.type, enabled=False):
            loss = cross_view_loss([s.attn for s in online], [s.attn for s in momentum])
            metrics = {"attn": loss.detach()}
            if self.two_streams:
                conv = cross_view_loss(_conv(online), _conv(momentum))
                supervision = self.config.lambda_att * self._supervision(online, momentum)
                metrics |= {"conv": conv.detach(), "att": supervision.detach()}
                loss = loss + conv + supervision
        return StepOutput(loss, metrics)

    def embed(self, images: Tensor, momentum: bool = False) -> Streams:
        """Both streams' unit embeddings of images (B, 3, S, S): predictions, or projections of the momentum network."""
        prefix = "momentum_" if momentum else ""

        def head(stream: str, feature_map: Tensor) -> Tensor:
            projected = getattr(self, f"{prefix}{stream}_projector")(feature_map.mean(dim=(2, 3)))
            return unit(projected if momentum else getattr(self, f"{stream}_predictor")(projected))

        middle, last = getattr(self, f"{prefix}encoder").forward_stages(images)
        stream = getattr(self, f"{prefix}attention_stream")(last if self._from_last_stage else middle)
        return Streams(head("conv", last) if self.two_streams else None, head("attn", stream))

    def _supervision(self, online: list[Streams], momentum: list[Streams]) -> Tensor:
        """L_att: the online network's two views, and the momentum network's where they are reported."""
        pairs = online + (momentum if self.config.att_teacher_terms else [])
        terms = [
            attention_loss(conv, s.attn, self.config.att_loss) for conv, s in zip(_conv(pairs), pairs, strict=True)
        ]
        return torch.stack(terms).sum()

    @torch.no_grad()
    def after_step(self, output: StepOutput, ema_momentum: float) -> None:
        """EMA of the parameters of all pairs."""
        follow(self.momentum_pairs(), ema_momentum)


def _cells(image_size: int, stride: int) -> int:
    """Side of the map after halving the image until `stride`, rounding up each time as padded convolutions do."""
    return -(-image_size // stride)


def _conv(streams: list[Streams]) -> list[Tensor]:
    return [stream.conv for stream in streams if stream.conv is not None]
