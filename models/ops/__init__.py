"""Operators with a PyTorch definition and, where it pays, a kernel of our own."""
