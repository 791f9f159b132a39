"""Counter-based random numbers: every draw is a pure function of what it is for.

A draw is addressed by (seed; a, b, c, slot), so worker count, order of work and resumption cannot change it. The same
function exists in C++ (`native/philox.h`) and the two agree bit for bit.

Source: Philox4x32-10 of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

import numpy as np

_MULTIPLIER_0 = np.uint64(0xD2511F53)
_MULTIPLIER_1 = np.uint64(0xCD9E8D57)
_WEYL_0 = 0x9E3779B9
_WEYL_1 = 0xBB67AE85
_LOW_32 = np.uint64(0xFFFFFFFF)
_SHIFT_32 = np.uint64(32)

# The fourth counter word says what a draw is for. Sample draws use (a, b, c) = (sample, epoch, view).
SLOT_CROP = 0  # + attempt, 0..15
SLOT_APPLY = 16  # whether each stochastic operation is applied: jitter, gray, blur, solarize
SLOT_JITTER = 17  # brightness, contrast, saturation, hue
SLOT_ORDER = 18  # the random order of the four jitter operations (word 0), flip (word 1), blur sigma (word 2)
# Step draws use (a, b, c) = (step, direction, 0).
SLOT_REGION = 32
SLOT_PAIRING = 33
SLOT_SHUFFLE = 34
# Order draws use (a, b, c) = (position, epoch, level).
SLOT_EPOCH_ORDER = 48
SLOT_HOLDOUT = 49
# Fallback for a record that cannot be decoded: (sample, epoch, attempt).
SLOT_SUBSTITUTE = 50
# Seed of a fine-tuning step's own draws: (step, rank, 0).
SLOT_STEP_SEED = 51
# Segmentation samples, (sample, epoch, 0): size and flip, colours, then crops + attempt, 0..9.
SLOT_SEGMENT_SIZE = 56
SLOT_SEGMENT_COLOUR = 57  # + 0..2: which apply, how much, in which order
SLOT_SEGMENT_CROP = 60


def philox(seed: int, a: object, b: object, c: object, slot: object) -> np.ndarray:
    """Four random words for each address.

    Args:
        seed: 64-bit run seed; its two halves are the key.
        a: first counter word, an integer or integer array below 2**32; the other three likewise, broadcast together.
        b: second counter word.
        c: third counter word.
        slot: fourth counter word, one of the `SLOT_` constants.

    Returns:
        uint32 array of the broadcast shape with a trailing axis of 4.
    """
    words = np.broadcast_arrays(*(np.asarray(word, dtype=np.uint64) for word in (a, b, c, slot)))
    x0, x1, x2, x3 = (word & _LOW_32 for word in words)
    key_0, key_1 = int(seed) & 0xFFFFFFFF, (int(seed) >> 32) & 0xFFFFFFFF
    for _ in range(10):
        product_0 = _MULTIPLIER_0 * x0
        product_1 = _MULTIPLIER_1 * x2
        x0, x1, x2, x3 = (
            (product_1 >> _SHIFT_32) ^ x1 ^ np.uint64(key_0),
            product_1 & _LOW_32,
            (product_0 >> _SHIFT_32) ^ x3 ^ np.uint64(key_1),
            product_0 & _LOW_32,
        )
        key_0, key_1 = (key_0 + _WEYL_0) & 0xFFFFFFFF, (key_1 + _WEYL_1) & 0xFFFFFFFF
    return np.stack([x0, x1, x2, x3], axis=-1).astype(np.uint32)


def uniform(seed: int, a: object, b: object, c: object, slot: object) -> np.ndarray:
    """Four float64 uniforms in [0, 1) for each address, 32 random bits each; arguments as for `philox`."""
    return philox(seed, a, b, c, slot).astype(np.float64) * 2.0**-32


def permutation(seed: int, n: int, b: int, c: int, slot: int) -> np.ndarray:
    """A permutation of range(n) as int64, a pure function of (seed, n, b, c, slot)."""
    words = philox(seed, np.arange(n), b, c, slot).astype(np.uint64)
    keys = (words[:, 0] << _SHIFT_32) | words[:, 1]
    return np.argsort(keys, kind="stable")


def integers(words: np.ndarray, low: int, high: int) -> np.ndarray:
    """Integers uniform on [low, high) from uint32 words by the multiply-shift rule (bias below 2**-32 * range)."""
    span = np.uint64(high - low)
    return (low + ((words.astype(np.uint64) * span) >> _SHIFT_32)).astype(np.int64)
