"""A batch of records to a batch of views: the native decoder and, for what it leaves, the general path.

Every loader with random access decodes through `ViewDecoder`, so all of them give the same pixels, refuse the same
records and fill their places alike.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

from .epoch import SUBSTITUTE_ATTEMPTS, substitute
from .geometry import draw_crops
from .images import decode_rgb
from .interface import ViewSpec
from .layouts import (
    CHECKSUM,
    DAMAGED,
    JOB,
    LOW_64,
    OK,
    PACKED,
    TOO_LARGE,
    UNREADABLE,
    UNSUPPORTED,
    VIEW,
    view_array,
)
from .native_build import load, try_load
from .refusal import MAX_PIXELS, ImageRefused, TooManyBad
from .second_look import SecondLook
from .stores import Store

_REASONS = {
    DAMAGED: "damaged or not a JPEG",
    CHECKSUM: "its bytes changed after packing (checksum)",
    UNREADABLE: "the file cannot be read",
    TOO_LARGE: f"more than {MAX_PIXELS} pixels",
}
_PIL_FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
INSTEAD = "images are decoded by PIL, several times slower"


def declare(library: ctypes.CDLL) -> ctypes.CDLL:
    """The library with the signatures of its functions declared."""
    # Without a declaration ctypes passes every integer as 32 bits and would cut addresses and seeds.
    pointer, u64, u32, i32, i64 = ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_int32, ctypes.c_int64
    library.rg_pool_open.argtypes, library.rg_pool_open.restype = [i32], pointer
    library.rg_pool_close.argtypes, library.rg_pool_close.restype = [pointer], None
    library.rg_decode.argtypes = [pointer, pointer, i32, pointer, i32, pointer, u64, u32, i64]
    library.rg_decode_finish.argtypes = [pointer, pointer, i32, pointer, i32, pointer, u64, u32, i64]
    library.rg_views_of_rgb.argtypes = [pointer, i32, i32, pointer, i32, i32, pointer, u64, u32, u32]
    library.rg_packed_batch.argtypes = [u64, u64, u64, u64]
    library.rg_crc32.argtypes, library.rg_crc32.restype = [pointer, u64], u32
    library.rg_crop.argtypes, library.rg_crop.restype = [pointer, u64, u32, u32, i64, i64, pointer], None
    library.rg_force_level.argtypes, library.rg_force_level.restype = [i32], None
    # A library of another version would write past the end of our arrays.
    assert library.rg_job_bytes() == JOB.itemsize and library.rg_view_bytes() == VIEW.itemsize
    assert library.rg_packed_bytes() == PACKED.itemsize
    return library


def native_library(instead: str | None = INSTEAD) -> ctypes.CDLL | None:
    """The native decoder; None (said once) where it cannot be built.

    Raises:
        NativeUnavailable: it cannot be built and `instead` is None.
    """
    library = load("views") if instead is None else try_load("views", instead)
    # Declared again on each call: the library is one object in the process, and doing it twice changes nothing.
    return None if library is None else declare(library)


def pil_views(pixels: np.ndarray, views: Sequence[ViewSpec], seed: int, epoch: int, index: int) -> list[np.ndarray]:
    """The reference: PIL's crop and antialiased resize of a fully decoded image.

    Args:
        pixels: uint8 (height, width, 3) RGB.
        views: what to cut.
        seed: run seed.
        epoch: epoch number.
        index: the sample that keys the draws.

    Returns:
        One uint8 (size, size, 3) array per view.
    """
    height, width = pixels.shape[:2]
    image = Image.fromarray(pixels)
    cut = []
    for spec in views:
        # Drawn as for a batch of one: a sample's box does not depend on the others.
        sides = np.array([height]), np.array([width])
        top, left, box_height, box_width = draw_crops(spec, seed, epoch, np.array([index]), *sides)[0].tolist()
        # Cropped before it is resized, so that no pixel from outside the box bleeds into the view.
        crop = image.crop((left, top, left + box_width, top + box_height))
        cut.append(np.asarray(crop.resize((spec.size, spec.size), _PIL_FILTERS[spec.interpolation])))
    return cut


def image_sizes(jobs: np.ndarray) -> np.ndarray:
    """(B, 2) int32 height and width of the images of jobs (B,) of `JOB`, right where the status is `OK`."""
    return np.stack([jobs["height"], jobs["width"]], axis=1)


class ViewDecoder:
    """Decodes batches of one store into arrays that the caller owns.

    Args:
        store: where the records are.
        views: what to cut from each.
        seed: run seed.
        population: the samples that substitutes are drawn from.
        threads: threads of the native decoder.
        note_bad: called with (sample, reason) for each bad record.
        native: False for the slow reference, PIL throughout.

    Attributes:
        specs: the views as the C side knows them.
        pool: handle of the native threads, None with PIL.
    """

    def __init__(
        self,
        store: Store,
        views: Sequence[ViewSpec],
        seed: int,
        population: np.ndarray,
        threads: int,
        note_bad: Callable[[int, str], None],
        native: bool = True,
    ):
        self._store, self._views, self._seed, self._population = store, tuple(views), seed, population
        self._note_bad = note_bad
        self._second_look = SecondLook(store, threads)
        self._library = native_library() if native else None
        self.specs = view_array(views)
        self.pool = self._library.rg_pool_open(threads) if self._library else None
        # A container's limit on threads shows here as a null pool.
        if self._library and not self.pool:
            raise ValueError(f"the system refused to start {threads} decoding threads; choose fewer with --workers")

    def decode(self, epoch: int, index: np.ndarray, outs: Sequence[np.ndarray]) -> np.ndarray:
        """Cut all views of a batch.

        Args:
            epoch: epoch number.
            index: (B,) int64 samples.
            outs: per view a C-contiguous uint8 array of at least (B, size, size, 3); rows 0..B-1 are filled.

        Returns:
            (B, 2) int32 height and width of the image that each row was cut from.

        Raises:
            TooManyBad: a bad record, and 64 others drawn for its place are bad too.
        """
        jobs = self._jobs(index, index, np.arange(len(index)))
        self._native_pass(epoch, jobs, index, outs)
        return self.repair(epoch, index, jobs, outs)

    def hand_over(self, epoch: int, index: np.ndarray, finish: int) -> np.ndarray:
        """Decode a batch whose views compiled code takes, image by image, on the thread that made them.

        Args:
            epoch: epoch number.
            index: (B,) int64 samples.
            finish: address of a `Finish` of native/views.cpp.

        Returns:
            (B,) of `JOB`: how each fared; what was handed over counts only where the status is `OK`.
        """
        assert self._library is not None
        jobs = self._jobs(index, index, np.arange(len(index)))
        keep_alive = self._store.fill(jobs, index)
        self._library.rg_decode_finish(
            self.pool,
            jobs.ctypes.data,
            len(jobs),
            self.specs.ctypes.data,
            len(self.specs),
            finish,
            self._seed & LOW_64,
            epoch,
            MAX_PIXELS,
        )
        del keep_alive
        # The views of a file that is found damaged only now were handed over; `repair` writes others in their place.
        self.look_again(jobs, index)
        return jobs

    def look_again(self, jobs: np.ndarray, sources: np.ndarray) -> None:
        """Correct the status of jobs that the native threads went through; see `SecondLook.status`."""
        jobs["status"] = self._second_look.status(jobs, sources)

    def probe(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Read samples to their end, for their views' sake but not for their pixels.

        Returns:
            (n,) status, `UNSUPPORTED` throughout with PIL, and (n, 2) int32 height and width where the status is `OK`.
        """
        # The decoder reads a record to its end only on the way to some view.
        outs = [np.empty((len(index), spec.size, spec.size, 3), dtype=np.uint8) for spec in self._views]
        jobs = self._jobs(index, index, np.arange(len(index)))
        self._native_pass(0, jobs, index, outs)
        return jobs["status"], image_sizes(jobs)

    def repair(self, epoch: int, index: np.ndarray, jobs: np.ndarray, outs: Sequence[np.ndarray]) -> np.ndarray:
        """Finish a batch that the native decoder went through: general path, then substitutes for bad records.

        Args:
            epoch: epoch number.
            index: (B,) int64 samples.
            jobs: (B,) of `JOB`, what the native decoder said of each.
            outs: as for `decode`.

        Returns:
            As `decode`.

        Raises:
            TooManyBad: a bad record, and 64 others drawn for its place are bad too.
        """
        sizes = image_sizes(jobs)
        # The usual case: every image of the batch was decoded.
        if not jobs["status"].any():
            return sizes
        slots = np.flatnonzero(jobs["status"])
        sources, status = index[slots], jobs["status"][slots]
        # First the records themselves by the general path, then one list of substitutes after another for those still
        # bad.
        for attempt in range(SUBSTITUTE_ATTEMPTS + 1):
            bad = self._general_pass(status, epoch, sources, index[slots], slots, outs, sizes)
            if not len(bad):
                return sizes
            slots = slots[bad]
            keys = index[slots]
            sources = np.array([substitute(self._seed, epoch, key, attempt, self._population) for key in keys.tolist()])
            # The substitute's pixels are cut with the draws of the sample whose place it takes.
            jobs = self._jobs(sources, keys, slots)
            self._native_pass(epoch, jobs, sources, outs)
            sizes[slots], status = image_sizes(jobs), jobs["status"]
        raise TooManyBad(
            f"{self._store.name(int(index[slots[0]]))} cannot be used, nor can {SUBSTITUTE_ATTEMPTS} others that were "
            "drawn for its place; copy the images again, or pack them: the packer lists what is wrong with each"
        )

    def _jobs(self, sources: np.ndarray, keys: np.ndarray, slots: np.ndarray) -> np.ndarray:
        """Jobs that decode sample sources[i] with the draws of keys[i] into row slots[i]."""
        jobs = np.zeros(len(sources), dtype=JOB)
        jobs["index"], jobs["slot"] = keys, slots
        return jobs

    def _native_pass(self, epoch: int, jobs: np.ndarray, sources: np.ndarray, outs: Sequence[np.ndarray]) -> None:
        """Run jobs whose records are `sources`; how each fared is in the jobs afterwards."""
        if self._library is None:
            # The general path, which is PIL's, then serves every image.
            jobs["status"] = UNSUPPORTED
            return
        keep_alive = self._store.fill(jobs, sources)
        pointers = np.array([out.ctypes.data for out in outs], dtype=np.uint64)
        self._library.rg_decode(
            self.pool,
            jobs.ctypes.data,
            len(jobs),
            self.specs.ctypes.data,
            len(outs),
            pointers.ctypes.data,
            self._seed & LOW_64,
            epoch,
            MAX_PIXELS,
        )
        del keep_alive
        self.look_again(jobs, sources)

    def _general_pass(
        self,
        status: np.ndarray,
        epoch: int,
        sources: np.ndarray,
        keys: np.ndarray,
        slots: np.ndarray,
        outs: Sequence[np.ndarray],
        sizes: np.ndarray,
    ) -> np.ndarray:
        """The general path for what has a status other than OK; returns the positions that are bad records."""
        bad = []
        for at in np.flatnonzero(status).tolist():
            source = int(sources[at])
            reason = self._general(int(status[at]), epoch, source, int(keys[at]), int(slots[at]), outs, sizes)
            if reason is not None:
                self._note_bad(source, f"{self._store.name(source)}: {reason}")
                bad.append(at)
        return np.array(bad, dtype=np.int64)

    def _general(
        self, status: int, epoch: int, source: int, key: int, slot: int, outs: Sequence[np.ndarray], sizes: np.ndarray
    ) -> str | None:
        """Whatever the native decoder leaves, through the full decode; returns the reason where that fails too."""
        # No other decoder can do better with bytes that are wrong or missing.
        if status in (CHECKSUM, UNREADABLE):
            return _REASONS[status]
        try:
            data = self._store.read(source)
        except OSError as error:
            return f"{_REASONS[UNREADABLE]} ({error.strerror})"
        # The native decoder checks this only where it has the packer's checksum in the job.
        if not self._store.intact(source, data):
            return _REASONS[CHECKSUM]
        try:
            pixels = decode_rgb(data)
        except ImageRefused as error:
            return str(error)
        # Not the header's: a rotated photo was turned, and boxes are drawn for the upright image.
        sizes[slot] = pixels.shape[:2]
        # The reference resizes with PIL; with our library the same kernels cut whatever PIL decoded, so that views do
        # not depend on which decoder an image needed.
        if self._library is None:
            for out, cut in zip(outs, pil_views(pixels, self._views, self._seed, epoch, key), strict=True):
                out[slot] = cut
            return None
        # An upright copy of a rotated image is a transposed view; C++ wants rows.
        pixels = np.ascontiguousarray(pixels)
        pointers = np.array([out.ctypes.data for out in outs], dtype=np.uint64)
        done = self._library.rg_views_of_rgb(
            pixels.ctypes.data,
            *pixels.shape[:2],
            self.specs.ctypes.data,
            len(outs),
            slot,
            pointers.ctypes.data,
            self._seed & LOW_64,
            epoch,
            key,
        )
        return None if done == OK else _REASONS[TOO_LARGE]

    def close(self) -> None:
        """Stop the threads; may be called twice."""
        # Forgotten first, so that a second call cannot close it again.
        pool, self.pool = self.pool, None
        self._second_look.close()
        if pool and self._library is not None:
            self._library.rg_pool_close(pool)
