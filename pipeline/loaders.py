"""Which loader serves which data: the literal table, and the choice of `--loader auto`."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from .copies import is_single_file, local_copies
from .endings import is_packed, is_table
from .interface import Pipeline, PipelineConfig
from .native_build import NativeUnavailable, load
from .stores import data_parts, is_shard_pattern


def _need(module: str, loader: str, extra: str) -> None:
    # Looked for, not imported: importing some of them takes seconds or changes global state.
    if importlib.util.find_spec(module) is None:
        raise ValueError(
            f"--loader {loader} needs {module}, which is not installed; run: bash tools/setup.sh --retry (beside an "
            f"installed wheel: pip install 'regatta[{extra}]'), or choose --loader auto"
        )


def _ffcv(config: PipelineConfig) -> Pipeline:
    _need("ffcv", "ffcv", "ffcv")
    try:
        load("views")  # FFCV calls our decoder by pointer; there is no other to fall back on
    except NativeUnavailable as reason:
        raise ValueError(f"--loader ffcv needs our native decoder: {reason}; or choose --loader folder") from reason
    return _ffcv_pipeline()(config)


def _ffcv_pipeline() -> Callable[[PipelineConfig], Pipeline]:
    """The class, imported without a side effect: FFCV's import leaves torch with a single thread for its own work."""
    threads = torch.get_num_threads()
    from .ffcv_loader import FfcvPipeline

    torch.set_num_threads(threads)
    return FfcvPipeline


def _dali(config: PipelineConfig) -> Pipeline:
    _need("nvidia.dali" if importlib.util.find_spec("nvidia") else "nvidia", "dali", "dali")
    from .dali_loader import DaliPipeline

    return DaliPipeline(config)


def _webdataset(config: PipelineConfig) -> Pipeline:
    from .wds_loader import WebDatasetPipeline

    return WebDatasetPipeline(config)


def _files_or_packed(config: PipelineConfig) -> Pipeline:
    from .store_loader import StorePipeline

    return StorePipeline(config)


def _reference(config: PipelineConfig) -> Pipeline:
    from .store_loader import StorePipeline

    return StorePipeline(config, native=False)


def _synthetic(config: PipelineConfig) -> Pipeline:
    from .synthetic import SyntheticPipeline

    return SyntheticPipeline(config)


PIPELINES: dict[str, Callable[[PipelineConfig], Pipeline]] = {
    "ffcv": _ffcv,
    "dali": _dali,
    "webdataset": _webdataset,
    "folder": _files_or_packed,
    "reference": _reference,
    "synthetic": _synthetic,
}


def _ffcv_lacks() -> str | None:
    """What keeps the FFCV loader from working here; None where nothing does."""
    if importlib.util.find_spec("ffcv") is None:
        return "FFCV is not installed"
    try:
        load("views")
    except NativeUnavailable:
        return "our native decoder cannot be built"
    return None


def choose_loader(data: str) -> tuple[str, str]:
    """The loader that `auto` takes for this data, and the reason in a few words."""
    if not data:
        raise ValueError("no data was named; give --data a packed file, a folder, a list or a shard pattern")
    # Before the path is looked at: an address or a pattern is no path.
    if is_shard_pattern(data):
        return "webdataset", "the data is tar shards"
    parts = data_parts(data)
    if len(parts) > 1:
        return "folder", f"the data is {len(parts)} folders or files"
    path = Path(parts[0])
    if not path.exists():
        raise ValueError(f"{data} does not exist; check the path, or pack images with tools/make_ffcv_dataset.py")
    if is_packed(parts[0]):
        # Our own reader gives the same pixels, so a missing FFCV changes no run.
        missing = _ffcv_lacks()
        if missing is None:
            return "ffcv", "the data is a packed file"
        return "folder", f"the data is a packed file and {missing}, so our own reader serves it"
    if is_table(parts[0]):
        return "folder", "the data is a parquet file; packed, it is read faster"
    return "folder", "the data is a folder" if path.is_dir() else "the data is a list of files"


def build_pipeline(name: str, config: PipelineConfig, quiet: bool = False) -> Pipeline:
    """The named loader over `config.data`.

    Args:
        name: a key of `PIPELINES`, or "auto" to choose by the data; the choice and its reason are printed on rank 0.
        config: what to deliver.
        quiet: print nothing about the choice.

    Raises:
        ValueError: unknown name, missing extra, or data that does not fit; the message carries the remedy.
    """
    if name == "auto":
        name, reason = choose_loader(config.data)
        if config.rank == 0 and not quiet:
            print(f"loader: {name} ({reason})", file=sys.stderr)
    if name not in PIPELINES:
        raise ValueError(f"unknown loader {name!r}; choose auto, {', '.join(PIPELINES)}")
    # A wrong rank would silently read another rank's samples.
    if config.world_size < 1 or not 0 <= config.rank < config.world_size:
        raise ValueError(f"rank {config.rank} of {config.world_size} does not exist; ranks count from 0")
    data = str(config.data)
    if is_single_file(data):
        data = ",".join(local_copies(data))  # loaders take paths
    return PIPELINES[name](replace(config, data=data))
