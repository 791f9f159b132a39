"""DALI's loader joins what our decoder served to DALI's rows on its own stream, never on that of the training."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.interface import ViewSpec

pytestmark = [
    pytest.mark.dali,
    pytest.mark.skipif(importlib.util.find_spec("nvidia.dali") is None, reason="DALI is not installed"),
]

SIZE = 4
WHOLE = np.array([True, False, True])


class Queue(TorchDispatchMode):
    """Notes every operation with the stream that is current."""

    def __init__(self) -> None:
        super().__init__()
        self.stream: object = "training"
        self.queued: list[tuple[str, object]] = []

    @contextmanager
    def on(self, stream: object) -> Iterator[None]:
        before, self.stream = self.stream, stream
        yield
        self.stream = before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.queued.append((func.overloadpacket.__name__, self.stream))
        return func(*args, **(kwargs or {}))


def served(epoch: int, index: np.ndarray, arrays: list[np.ndarray]) -> np.ndarray:
    """Our decoder's part: views of value 7 and sizes."""
    arrays[0][:] = 7
    return np.full((len(index), 2), 9, dtype=np.int32)


def loader(stream: Any) -> Any:
    """A loader on a GPU that is not there, with a batch of three of which the second is no matter for DALI."""
    from pipeline.dali_loader import DaliPipeline

    made: Any = object.__new__(DaliPipeline)
    made.config = SimpleNamespace(device=torch.device("cpu"), views=(ViewSpec("view1", SIZE),))
    made.decoder, made._stream = SimpleNamespace(decode=served), stream
    made._sizes = np.zeros((3, 2), dtype=np.int32)
    made._read, made._classify = lambda index: [b""] * len(index), lambda index, records: WHOLE.copy()
    made._run_dali = lambda *_: [torch.full((2, SIZE, SIZE, 3), 5, dtype=torch.uint8)]
    return made


def test_odd_files_are_joined_off_the_training_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    queue = Queue()
    stream = SimpleNamespace(synchronize=lambda: queue.queued.append(("wait", queue.stream)))
    monkeypatch.setattr(torch.cuda, "stream", queue.on)
    with queue:
        sizes, (view,) = loader(stream)._decode(0, np.arange(3))
    copies = [where for name, where in queue.queued if name == "index_copy_"]
    assert copies == [stream, stream] and queue.queued[-1] == ("wait", "training")
    # A shape that depends on values would keep the host until all that is queued is done.
    assert not any(name in ("nonzero", "index_put_") for name, _ in queue.queued)
    assert view[:, 0, 0, 0].tolist() == [5, 7, 5] and sizes[1].tolist() == [9, 9]
