"""Encoders, heads, losses and methods; knows nothing of where images come from."""
