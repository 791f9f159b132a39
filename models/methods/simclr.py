"""SimCLR: the two views of an image find each other among all views of the global batch; no momentum network."""

from __future__ import annotations

import torch
from torch import Tensor

from ..collectives import gather_with_gradient
from ..heads import global_pool, mlp_head
from ..hyperparameters import SimCLRConfig
from ..losses import nt_xent, unit
from ..norm import convert_batch_norm
from ..resnet import Trunk, build_backbone
from .base import Method, StepInputs, StepOutput


def _gathered(rows: Tensor) -> Tensor:
    """(G, D): the rows (B, D) of all ranks, with gradient; a function of its own, for `torch.compiler.disable`."""
    return gather_with_gradient(rows)


class SimCLR(Method):
    """Normalised-temperature cross entropy of both views of every image against all other views of the global batch.

    z = n(g(GAP f(x))), L = mean over images of l(z1, z2) + l(z2, z1), with l the loss of `nt_xent`. Embeddings of other
    ranks take part with their gradient, so that any number of ranks computes the loss of one.

    Args:
        config: hyper-parameters.
        arch: key of `BACKBONES`.
        image_size: side of a view in pixels; the network takes any.
        bn_mode: "group", "sync" or "plain" batch norm; the paper synchronises.
        bn_group_size: images of a group in mode "group"; 0 is the rank's whole batch.

    Source: SimCLR (arXiv 2002.05709) Eq. 1 and Algorithm 1; google-research/simclr at its first release, whose
    projector has two layers; SimSiam (arXiv 2011.10566) appendix C for `projector_layers` 3. As in SimCLR's code L is
    the sum of both views' terms, twice the mean of Algorithm 1.
    Differs: linear and convolutional weights start as elsewhere in this library, not as truncated normals.
    """

    Config = SimCLRConfig

    config: SimCLRConfig

    def __init__(
        self, config: SimCLRConfig, *, arch: str, image_size: int, bn_mode: str = "sync", bn_group_size: int = 0
    ) -> None:
        super().__init__()
        self.config = config
        self.encoder: Trunk = build_backbone(arch, config.conv_init, config.zero_init_residual)
        self.projector = mlp_head(
            (self.encoder.feature_dim, *[config.hidden_dim] * (config.projector_layers - 1), config.dim),
            biases=[False] * config.projector_layers,
            hidden_norm=True,
            output_norm="scale",
        )
        convert_batch_norm(self, bn_mode, bn_group_size)
        # Not a decorator: that imports the compiler with this module, seconds for whoever only exports a backbone.
        self._gather = torch.compiler.disable(_gathered)

    def forward(self, inputs: StepInputs) -> StepOutput:
        """Both views of this rank's images against all views of all ranks."""
        first, second = (self.embed(view) for view in (inputs.view1, inputs.view2))  # (B, D) each
        all_first, all_second = self._gather(first), self._gather(second)  # (G, D) each
        count = inputs.view1.shape[0]
        own = inputs.rank * count + torch.arange(count, device=first.device)
        temperature = self.config.temperature
        loss = (
            nt_xent(first, all_second, all_first, own, temperature).mean()
            + nt_xent(second, all_first, all_second, own, temperature).mean()
        )
        return StepOutput(loss, {"ins": loss.detach()})

    def embed(self, view: Tensor) -> Tensor:
        """Unit embeddings (B, D) of a view (B, 3, S, S)."""
        return unit(self.projector(global_pool(self.encoder(view))))
