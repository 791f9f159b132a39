"""The training application."""
