"""CARE: a transformer stream beside the last CNN stage, whose embedding the CNN's learns to follow."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attention_stream import AttentionStream
from ..heads import global_pool, mlp_head
from ..hyperparameters import AttentionLoss, CareConfig
from ..losses import unit
from ..momentum import copy_and_freeze, follow
from ..norm import convert_batch_norm
from ..resnet import ResNetTrunk, build_backbone
from .base import CompileTarget, Method, StepInputs, StepOutput

STREAMS = {"parallel": ("conv", "attn"), "sequential": ("attn",), "conv": ("conv",)}
"""The heads of each design."""
_BETWEEN_STREAMS = ("lambda_att", "att_loss", "att_teacher_terms", "t_input")
_OF_ATTENTION = ("n_blocks", "heads", "pos", "t_zero_init")
_WITHOUT_MEANING = {"parallel": (), "sequential": _BETWEEN_STREAMS, "conv": (*_BETWEEN_STREAMS, *_OF_ATTENTION)}


def check_design(config: CareConfig) -> None:
    """Refuse settings that the design has no use for, so that no run is taken for an ablation that it is not.

    Raises:
        ValueError: naming the flag.
    """
    default = CareConfig()
    for name in _WITHOUT_MEANING[config.design]:
        value = getattr(config, name)
        if value != getattr(default, name):
            raise ValueError(
                f"--{name.replace('_', '-')} {value} has no meaning with --design {config.design}; leave it out"
            )


class Streams(NamedTuple):
    """Unit embeddings (B, D) of the CNN stream and of the transformer stream, None where the design has it not."""

    conv: Tensor | None
    attn: Tensor | None


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
    define: attention blocks follow layer4 and feed the only head, so that L_t alone remains. The design "conv" is the
    CNN stream alone, L = L_c, which the paper's section 3.4 and Fig. 4 compare with.
    """

    Config = CareConfig
    reads_positions = True
    ema_index_offset = 1

    def __init__(
        self, config: CareConfig, *, arch: str, image_size: int, bn_mode: str = "sync", bn_group_size: int = 0
    ) -> None:
        super().__init__()
        check_design(config)
        self.config = config
        trunk = build_backbone(arch, config.conv_init, config.zero_init_residual)
        if not isinstance(trunk, ResNetTrunk):
            raise ValueError(f"--arch {arch} has no layer3 for CARE's transformer stream; choose a ResNet")
        self.encoder = trunk
        _, last = trunk.stage_dims
        if "attn" in self.streams:
            self.attention_stream = self._new_attention_stream(trunk, image_size)
        for stream in self.streams:
            sizes = (last, config.hidden_dim, config.dim)
            setattr(self, f"{stream}_projector", mlp_head(sizes, biases=(True, True), hidden_norm=True))
            sizes = (config.dim, config.hidden_dim, config.dim)
            setattr(self, f"{stream}_predictor", mlp_head(sizes, biases=(True, True), hidden_norm=True))
        # The transformer stream's batch norms have groups of their own size, whatever the recipe's mode.
        for name, child in self.named_children():
            own = name == "attention_stream"
            convert_batch_norm(child, "group" if own else bn_mode, config.t_bn_group_size if own else bn_group_size)
        for name in self._averaged:
            setattr(self, f"momentum_{name}", copy_and_freeze(getattr(self, name)))

    def _new_attention_stream(self, trunk: ResNetTrunk, image_size: int) -> AttentionStream:
        config = self.config
        middle, last = trunk.stage_dims
        return AttentionStream(
            last if self._from_last_stage else middle,
            last,
            _cells(image_size, trunk.stride if self._from_last_stage else trunk.stride // 2),
            blocks=config.n_blocks,
            heads=config.heads,
            pos=config.pos,
            downsample=not self._from_last_stage,
            zero_init=config.t_zero_init,
        )

    @property
    def streams(self) -> tuple[str, ...]:
        """The streams that have a head, "conv" before "attn"."""
        return STREAMS[self.config.design]

    @property
    def _from_last_stage(self) -> bool:
        return self.config.t_input == "layer4" or self.config.design == "sequential"

    @property
    def _averaged(self) -> tuple[str, ...]:
        """Modules with a momentum copy: all but the predictors."""
        blocks = ("attention_stream",) if "attn" in self.streams else ()
        return ("encoder", *blocks, *(f"{stream}_projector" for stream in self.streams))

    def compile_targets(self) -> list[CompileTarget]:
        """Heads and transformer streams."""
        prefixes = ("", "momentum_") if "attn" in self.streams else ()
        return [*super().compile_targets(), *(getattr(self, f"{prefix}attention_stream") for prefix in prefixes)]

    def forward(self, inputs: StepInputs) -> StepOutput:
        """L_c + L_t + lambda L_att with its three parts as metrics."""
        views = (inputs.view1, inputs.view2)
        online = [self.embed(view) for view in views]
        with torch.no_grad():
            momentum = [self.embed(view, momentum=True) for view in views]
        # In float32: lambda would multiply the rounding of a bfloat16 distance by a hundred.
        with torch.autocast(inputs.view1.device.type, enabled=False):
            # Attention first: the order of the sum is that of the golden curves.
            terms: dict[str, Tensor] = {
                stream: cross_view_loss(_of(stream, online), _of(stream, momentum))
                for stream in ("attn", "conv")
                if stream in self.streams
            }
            if len(self.streams) == 2:
                terms["att"] = self.config.lambda_att * self._supervision(online, momentum)
        return StepOutput(
            functools.reduce(torch.add, terms.values()), {name: term.detach() for name, term in terms.items()}
        )

    def embed(self, images: Tensor, momentum: bool = False) -> Streams:
        """Both streams' unit embeddings of images (B, 3, S, S): predictions, or projections of the momentum network."""
        prefix = "momentum_" if momentum else ""

        def head(stream: str, feature_map: Tensor) -> Tensor:
            projected = getattr(self, f"{prefix}{stream}_projector")(global_pool(feature_map))
            return unit(projected if momentum else getattr(self, f"{stream}_predictor")(projected))

        middle, last = getattr(self, f"{prefix}encoder").forward_stages(images)
        conv = head("conv", last) if "conv" in self.streams else None
        if "attn" not in self.streams:
            return Streams(conv, None)
        attended = getattr(self, f"{prefix}attention_stream")(last if self._from_last_stage else middle)
        return Streams(conv, head("attn", attended))

    def _supervision(self, online: list[Streams], momentum: list[Streams]) -> Tensor:
        """L_att: the online network's two views, and the momentum network's where they are reported."""
        pairs = online + (momentum if self.config.att_teacher_terms else [])
        terms = [
            attention_loss(conv, attn, self.config.att_loss)
            for conv, attn in zip(_of("conv", pairs), _of("attn", pairs), strict=True)
        ]
        return torch.stack(terms).sum()

    @torch.no_grad()
    def after_step(self, output: StepOutput, ema_momentum: float) -> None:
        """EMA of the parameters of all pairs."""
        follow(self.momentum_pairs(), ema_momentum)


def _cells(image_size: int, stride: int) -> int:
    """Side of the map after halving the image until `stride`, rounding up each time as padded convolutions do."""
    return -(-image_size // stride)


def _of(stream: str, embeddings: list[Streams]) -> list[Tensor]:
    return [getattr(each, stream) for each in embeddings]
