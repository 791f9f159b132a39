"""Draws on the host that methods make inside a step, as pure functions of what they are for."""

from __future__ import annotations


def mixed_seed(*words: int) -> int:
    """One 63-bit seed from several integers by FNV-1a over their bytes, so that near addresses do not collide."""
    state = 0xCBF29CE484222325
    for word in words:
        for byte in (word & (2**64 - 1)).to_bytes(8, "little"):
            state = ((state ^ byte) * 0x100000001B3) & (2**64 - 1)
    return state >> 1
