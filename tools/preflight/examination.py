"""An intended run under examination: what its checks share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from train.config import Config
from train.record.diagnosis import Finding

if TYPE_CHECKING:
    from models.methods.base import Method
    from pipeline.interface import Pipeline
    from train.runtime import Runtime


@dataclass
class Examination:
    """What is known of an intended run so far; later checks leave out what an earlier one could not find.

    Attributes:
        config: of the run.
        runtime: this process, as a process of the run would be: device and precision.
        world_size: processes of the run.
        method: with its weights on the device; None where it cannot be built.
        images: the training images, opened for a look at them; None where they cannot be opened.
        trained_on: number of images that an epoch has; 0 where that is not known.
        loader_rate: source images a second that the loader delivers, over all processes.
        loader_busy: share of the usable cores that it kept busy meanwhile.
        step_rate: source images a second that the steps take, over all processes.
        host_share: share of a step's time that the host takes to launch it; 0 on a CPU.
    """

    config: Config
    runtime: Runtime
    world_size: int
    method: Method | None = None
    images: Pipeline | None = None
    trained_on: int = 0
    loader_rate: float = 0.0
    loader_busy: float = 0.0
    step_rate: float = 0.0
    host_share: float = 0.0

    @property
    def whole(self) -> Config:
        """The run's configuration, with the whole batch of a device where `--micro-batch auto` would settle a part."""
        run = self.config.run
        return self.config if run.micro_batch != "auto" else replace(self.config, run=replace(run, micro_batch=0))


Check = Callable[[Examination], Iterator[Finding]]
