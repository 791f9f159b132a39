"""Choosing what runs on this card: candidates are compared with their definition and timed before the first step."""
