"""What a run leaves behind: written, read, measured, compared with published figures, diagnosed and shown on a page."""
