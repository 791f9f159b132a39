"""Views augmented on the CPU by the threads that decode them, each image straight after its decoding.

So the crops of an image never leave the cache of the core that made them, and augmentation needs no threads and no
pass over the batch of its own. The pixels are those of `augment.apply`, bit for bit.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np
import torch

from . import augment, augment_native
from .blur import blur_radius
from .decoder import ViewDecoder, image_sizes
from .interface import PipelineConfig
from .layouts import AUGMENTATION, FINISH, OUTPUTS, PARAMETERS


class HostAugmenter:
    """Decodes batches into augmented views, with as many batches under way as there are places in its ring.

    Args:
        config: profile, dtype, views and seed.
        decoder: decodes with compiled code.
        rows: images of a full batch.
        ring: batches whose plans are kept at a time.

    Attributes:
        finishes: (ring,) what the decoder is given for a batch in each place.
    """

    def __init__(self, config: PipelineConfig, decoder: ViewDecoder, rows: int, ring: int = 1):
        library = augment_native.library()
        assert library is not None and config.dtype in OUTPUTS
        self._config, self._decoder, self._rows = config, decoder, rows
        self._profile = augment.get_profile(config.augment)
        count = len(config.views)
        self._sizes = np.array([spec.size for spec in config.views], dtype=np.int32)
        # The blur's reach follows from the profile's largest sigma, so one radius serves every image of a view.
        largest = self._profile.sigma_range[1]
        self._radii = np.array([blur_radius(spec.size, largest) for spec in config.views], dtype=np.int32)
        # The structures hold addresses of these arrays, which therefore are made once and kept.
        self._tables = np.zeros((ring, count, rows, PARAMETERS), dtype=np.float32)
        addresses = [[view.ctypes.data for view in place] for place in self._tables]
        self._table_addresses = np.array(addresses, dtype=np.uint64)
        self._outs = np.zeros((ring, count), dtype=np.uint64)
        self._plans = np.zeros(ring, dtype=AUGMENTATION)
        self.finishes = np.zeros(ring, dtype=FINISH)
        for place in range(ring):
            plan = self._plans[place]
            plan["sizes"], plan["radii"] = self._sizes.ctypes.data, self._radii.ctypes.data
            plan["tables"], plan["outs"] = self._table_addresses[place].ctypes.data, self._outs[place].ctypes.data
            plan["views"], plan["gray_first"] = count, self._profile.gray_first
            plan["output"] = OUTPUTS[config.dtype]
        # The decoder calls this address from its own threads; Python takes no part in it.
        self.finishes["call"] = ctypes.cast(library.regatta_augment_image, ctypes.c_void_p).value
        self.finishes["context"] = self._plans.ctypes.data + AUGMENTATION.itemsize * np.arange(ring)
        # For images that only the general path decodes, whose crops come to Python first.
        self._crops: list[np.ndarray] | None = None

    def prepare(self, place: int, epoch: int, index: np.ndarray, outs: Sequence[np.ndarray]) -> None:
        """Draw the parameters of a batch and say where its views go; the arrays must live until it is decoded."""
        self._outs[place] = [out.ctypes.data for out in outs]
        for view in range(len(self._config.views)):
            table = augment.draw_table(self._profile, self._config.seed, epoch, index, view)
            self._tables[place, view, : len(index)] = table

    def decode(self, epoch: int, index: np.ndarray, outs: Sequence[np.ndarray]) -> np.ndarray:
        """Cut and augment all views of a batch, through place 0 of the ring.

        Args:
            epoch: epoch number.
            index: (B,) int64 samples.
            outs: per view a C-contiguous array of at least (B, size, size, 3) of the config's dtype, bfloat16 as int16.

        Returns:
            (B, 2) height and width of the image that each row was cut from.

        Raises:
            RuntimeError: a bad record, and 64 others drawn for its place are bad too.
        """
        self.prepare(0, epoch, index, outs)
        jobs = self._decoder.hand_over(epoch, index, self.finishes.ctypes.data)
        return self.repair(epoch, index, jobs, outs)

    def repair(self, epoch: int, index: np.ndarray, jobs: np.ndarray, outs: Sequence[np.ndarray]) -> np.ndarray:
        """Finish a batch that the native decoder went through: see `ViewDecoder.repair`.

        Args:
            epoch: epoch number.
            index: (B,) int64 samples.
            jobs: (B,) of `JOB`, what the native decoder said of each.
            outs: as for `decode`.

        Returns:
            As `decode`.

        Raises:
            RuntimeError: a bad record, and 64 others drawn for its place are bad too.
        """
        # Images with status 0 were augmented on the thread that decoded them.
        rows = np.flatnonzero(jobs["status"])
        if not len(rows):
            return image_sizes(jobs)
        if self._crops is None:  # few data sets need them
            self._crops = [np.empty((self._rows, size, size, 3), dtype=np.uint8) for size in self._sizes]
        sizes = self._decoder.repair(epoch, index, jobs, self._crops)
        for view, (crops, out) in enumerate(zip(self._crops, outs, strict=True)):
            # Drawn anew for the few rows: draws are keyed by the sample, so these are the draws of the first pass.
            table = augment.draw_table(self._profile, self._config.seed, epoch, index[rows], view)
            images = torch.from_numpy(crops[rows]).permute(0, 3, 1, 2)
            radius, dtype = int(self._radii[view]), self._config.dtype
            made = augment_native.augment(images, torch.from_numpy(table), self._profile.gray_first, radius, dtype)
            # The buffers hold rows of interleaved pixels.
            made = made.permute(0, 2, 3, 1)
            out[rows] = (made.view(torch.int16) if dtype == torch.bfloat16 else made).numpy()
        return sizes
