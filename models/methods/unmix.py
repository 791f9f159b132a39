"""Un-Mix on MoCo v2: mixtures of two images find the keys of both, each in proportion to its share."""

from __future__ import annotations

import torch
from torch import Tensor

from ..heads import global_pool
from ..hyperparameters import UnMixConfig
from ..losses import info_nce, unit
from ..mixtures import Mixture, draw_mixture, mix
from .base import StepInputs
from .moco_v2 import Keys, MoCoV2

_VIEW_NUMBERS = {"view1": 1, "view2": 2}


class UnMix(MoCoV2):
    """MoCo v2 with a second pass of the query network over mixtures of each image and its partner.

    L = L_ins + mean_i [ s l(m_i, k_i) + (1 - s) l(m_i, k_p(i)) ], with m_i the unit embedding of the mixture of image i
    and its partner p(i), s the share of image i in it, l the loss of `info_nce`. Partners and shares belong to groups
    of consecutive images: within a group image i meets the i-th from its end.

    Args:
        config: hyper-parameters.
        arch: key of `BACKBONES`.
        image_size: side of a view in pixels; the network takes any.
        bn_mode: "group", "sync" or "plain" batch norm.
        bn_group_size: consecutive images that share batch-norm statistics and a mixture; 0 is the rank's whole batch.

    Source: Un-Mix (arXiv 2003.05438) section 3; szq0214/Un-Mix, UnMix_MoCo/for_ImageNet.
    Differs: groups of the global batch instead of devices, each of which draws a mixture of its own there too.
    """

    Config = UnMixConfig
    config: UnMixConfig

    def __init__(
        self, config: UnMixConfig, *, arch: str, image_size: int, bn_mode: str = "group", bn_group_size: int = 0
    ) -> None:
        super().__init__(config, arch=arch, image_size=image_size, bn_mode=bn_mode, bn_group_size=bn_group_size)
        self.mixture_group = bn_group_size

    def direction_loss(self, inputs: StepInputs, query_view: str, keys: Keys) -> tuple[Tensor, dict[str, Tensor]]:
        """Instance loss and losses of the mixtures with both keys."""
        loss, terms = super().direction_loss(inputs, query_view, keys)
        images: Tensor = getattr(inputs, query_view)
        size = self.mixture_group or images.shape[0]
        mixtures = self.mixtures(inputs, query_view, images.shape[0] // size)
        mixed = torch.cat([mix(part, each) for part, each in zip(images.split(size), mixtures, strict=True)])
        # A pass of their own, as in the released code: mixtures must not be in the batch statistics of whole images.
        query = unit(self.projector(global_pool(self.encoder(mixed))))  # (B, D)
        partner_key = torch.cat([part.flip(0) for part in keys.key.split(size)])
        queue, temperature = self.queue.rows, self.config.temperature
        share = _on_device([each.share for each in mixtures for _ in range(size)], query)
        own = (share * info_nce(query, keys.key, queue, temperature)).mean()
        partner = ((1 - share) * info_nce(query, partner_key, queue, temperature)).mean()
        return loss + own + partner, terms | {"mix/own": own.detach(), "mix/partner": partner.detach()}

    def mixtures(self, inputs: StepInputs, query_view: str, groups: int) -> list[Mixture]:
        """The mixture of each of this rank's groups in this step."""
        height, width = getattr(inputs, query_view).shape[2:]
        # Numbered over all ranks, so that a group's mixture does not depend on who computes it.
        first = inputs.rank * groups
        return [
            draw_mixture(
                height,
                width,
                self.config.beta,
                self.config.global_mixtures,
                inputs.seed,
                inputs.step,
                _VIEW_NUMBERS[query_view],
                first + group,
            )
            for group in range(groups)
        ]


def _on_device(values: list[float], like: Tensor) -> Tensor:
    """A vector in the dtype and on the device of `like`, copied without a wait of the host."""
    vector = torch.tensor(values, dtype=like.dtype)
    return (vector.pin_memory() if like.is_cuda else vector).to(like.device, non_blocking=True)
