"""A second look at JPEG files that libjpeg has decoded and nobody vouches for.

libjpeg passes over some damage in silence: a run of zeros that leads beyond the end of its block, up to eight coded
bytes that are left over at the end of a pass, or a first pass that never came. The picture is then a wrong one. Our own
decoder notices such damage, but it reads baseline files only and leaves all others to libjpeg. So `check_jpeg`, which
the packers use too, reads what libjpeg has decoded. Whether a file is damaged then does not depend on its reader.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np

from .jpeg import check_jpeg
from .layouts import DAMAGED, LIBJPEG, OK, WHOLE_IMAGE
from .refusal import ImageRefused
from .stores import Store


class SecondLook:
    """Reads each record that libjpeg decodes once more, the first time that it is decoded.

    Args:
        store: where the records are.
        threads: of the look; the compiled reading of codes does not hold Python's lock.
    """

    def __init__(self, store: Store, threads: int):
        self._store = store
        # A look at a progressive file takes as long as libjpeg's decoding of it, so it is taken once, not each epoch.
        self._sound = np.zeros(len(store.labels), dtype=bool)
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="second-look")

    def status(self, jobs: np.ndarray, sources: np.ndarray) -> np.ndarray:
        """What became of the jobs of a batch, once their files have been looked at.

        Args:
            jobs: (B,) `JOB` rows that the native decoder went through.
            sources: (B,) int64, the record of each.

        Returns:
            (B,) int32: the jobs' own status, but `DAMAGED` where libjpeg made pixels of a damaged file.
        """
        status = jobs["status"].copy()
        # Records with a checksum of the packer were looked at when they were packed, so only whole reads are doubtful.
        doubtful = (status == OK) & (jobs["decoder"] == LIBJPEG) & ((jobs["flags"] & WHOLE_IMAGE) != 0)
        rows = np.flatnonzero(doubtful & ~self._sound[sources])
        if len(rows):
            sound = np.fromiter(self._threads.map(self._is_sound, sources[rows].tolist()), dtype=bool, count=len(rows))
            self._sound[sources[rows]] = sound
            status[rows[~sound]] = DAMAGED
        return status

    def _is_sound(self, source: int) -> bool:
        try:
            check_jpeg(self._store.read(source))
        except (ImageRefused, OSError):
            # The general path reads the file again and says what is wrong with it.
            return False
        return True

    def close(self) -> None:
        """Stop the threads; may be called twice."""
        self._threads.shutdown()
