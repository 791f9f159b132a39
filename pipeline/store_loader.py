"""Plain image files, or a packed file without FFCV: what `--loader folder` and `--loader reference` stand for."""

from __future__ import annotations

from .interface import PipelineConfig
from .native_loader import NativePipeline
from .stores import open_store


class StorePipeline(NativePipeline):
    """A store with random access on this machine.

    Args:
        config: what to deliver; `config.data` is a folder (nested; class folders become labels), a list file with one
            path a line, or a `.beton` file.
        native: False for the slow reference, PIL throughout.
    """

    def __init__(self, config: PipelineConfig, native: bool = True):
        super().__init__(config, open_store(config.data), native=native)
