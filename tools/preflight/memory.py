"""Whether a step fits the memory of its device."""

from __future__ import annotations

from collections.abc import Iterator

from train.inputs import batch_per_device
from train.memory_estimate import estimate, free_bytes, shown
from train.micro_batch import largest_that_fits, micro_batches
from train.record.diagnosis import Finding

from .examination import Examination


def fits(examination: Examination) -> Iterator[Finding]:
    """The estimate of a step's memory against what is free, and the micro-batch that fits where it does not."""
    if examination.method is None:
        return
    planned, runtime, count = examination.whole, examination.runtime, examination.world_size
    found = estimate(planned, count, runtime.device, runtime.dtype)
    sharing = count if runtime.device.type == "cpu" else 1
    free, needed = free_bytes(runtime.device, sharing), found.total(runtime.device)
    text = f"memory: about {shown(needed)} a process of {shown(free)} free on {runtime.device.type} ({found})"
    if needed <= free:
        yield Finding("ok", text)
        return
    sizes = list(micro_batches(planned, count, batch_per_device(planned, count) - 1))
    size = largest_that_fits(planned, sizes, count, runtime.device, runtime.dtype, free)
    if size and examination.config.run.micro_batch == "auto":
        yield Finding("ok", f"{text}; --micro-batch auto will take about {size}")
    elif size:
        yield Finding("fault", text, f"give --micro-batch {size}, or --micro-batch auto")
    else:
        yield Finding(
            "fault", text, "no micro-batch fits: lower --image-size or --bn.group-size, or use a larger device"
        )
