"""Regatta: self-supervised vision training built for images per second."""
