"""Who augments a pipeline's views, decided once and here.

A pipeline delivers finished views wherever its config names a profile. The threads that decode an image augment it
straight away where compiled code can do all that is asked for on the CPU: the crops are still in the core's cache, and
the step that consumes them waits for nothing. Everything else (a GPU, another implementation, a loader without compiled
threads) is augmented batch by batch, on the device that the views are on. The pixels do not depend on the place.
"""

from __future__ import annotations

from dataclasses import replace

from . import augment, augment_native
from .interface import Batch, PipelineConfig
from .layouts import OUTPUTS

NOBODY, THREADS, BATCHES = "nobody", "threads", "batches"


def augmented_by(config: PipelineConfig, compiled_threads: bool) -> str:
    """Who augments the views of a pipeline.

    Args:
        config: names the profile, the implementation, the dtype and the device.
        compiled_threads: whether the loader decodes with threads of the compiled decoder.

    Returns:
        `NOBODY` where the config names no profile: the pipeline delivers uint8 crops. `THREADS` for the decoding
        threads. `BATCHES` for `BatchAugmenter`, on the device of the views.

    Raises:
        ValueError: for an unknown profile or one with too few views, or an implementation that the device lacks.
    """
    if not config.augment:
        return NOBODY
    profile = augment.get_profile(config.augment)
    if len(config.views) > profile.num_views:
        raise ValueError(
            f"the augmentation profile {config.augment} has {profile.num_views} views, but "
            f"{len(config.views)} were asked for; choose another profile"
        )
    # The threads run the compiled pass and nothing else; whoever asks for another implementation gets it batch by
    # batch.
    chosen, _ = augment.choose_implementation(config.device, config.dtype, config.implementation)
    by_threads = chosen == "native" and compiled_threads and config.dtype in OUTPUTS
    return THREADS if by_threads and augment_native.library() is not None else BATCHES


class BatchAugmenter:
    """Augments batches of crops on the device that they are on.

    Args:
        config: names profile, implementation, dtype and seed.
    """

    def __init__(self, config: PipelineConfig):
        self._config = config
        self._profile = augment.get_profile(config.augment)

    def __call__(self, batch: Batch, epoch: int) -> Batch:
        """The batch with every view augmented and normalised, in the config's dtype; the crops are not changed."""
        config, index, views = self._config, batch.index.numpy(), {}
        for number, (name, crops) in enumerate(batch.views.items()):
            views[name] = augment.augment_view(
                crops,
                self._profile,
                config.seed,
                epoch,
                index,
                number,
                config.dtype,
                config.implementation,
                config.load_kernels,
            )
        # A new batch: the crops' buffers are free as soon as the caller lets go of the old one.
        return replace(batch, views=views)
