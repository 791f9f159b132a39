"""Random choice of anchors and proposals, a function of what each image's draw is for and of nothing else."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler

from pipeline.rng import SLOT_STEP_SEED, philox

# Third word of the address; 0 is a fine-tuning step's own seed.
ANCHORS, PROPOSALS = 1, 2


class CountedSampler(BalancedPositiveNegativeSampler):
    """At most `per_image` candidates of each image, at most `positive_share` of them positive, chosen at random.

    Torchvision draws from the process's generator, so its choice depends on the rank and on what was drawn before. Here
    it depends on (seed, step, position in the global batch) alone: a resumed run and one on more ranks choose alike.

    Attributes:
        draws: (step, position) of each image of the next call; set before it.
    """

    def __init__(self, per_image: int, positive_share: float, seed: int, purpose: int) -> None:
        super().__init__(per_image, positive_share)
        self.seed, self.purpose = seed, purpose
        self.draws: list[tuple[int, int]] = []

    def __call__(self, matched_idxs: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Masks of the positives and of the negatives that were chosen, one of each for an image.

        Args:
            matched_idxs: for each image (n,), below 0 to be ignored, 0 negative, above 0 positive.

        Raises:
            ValueError: `draws` is not as long as the list.
        """
        chosen: tuple[list[Tensor], list[Tensor]] = ([], [])
        for labels, (step, position) in zip(matched_idxs, self.draws, strict=True):
            low, high = philox(self.seed, step, position, self.purpose, SLOT_STEP_SEED)[:2].tolist()
            # A generator of its own for each image: what it draws does not depend on the images before it.
            generator = torch.Generator(labels.device)
            generator.manual_seed((high << 32 | low) >> 1)
            positive, negative = torch.where(labels >= 1)[0], torch.where(labels == 0)[0]
            # Negatives fill up what positives leave, as in torchvision's sampler.
            positives = min(len(positive), int(self.batch_size_per_image * self.positive_fraction))
            counts = (positives, min(len(negative), self.batch_size_per_image - positives))
            for candidates, count, masks in zip((positive, negative), counts, chosen, strict=True):
                order = torch.randperm(len(candidates), generator=generator, device=labels.device)
                mask = torch.zeros_like(labels, dtype=torch.uint8)
                mask[candidates[order[:count]]] = 1
                masks.append(mask)
        return chosen
