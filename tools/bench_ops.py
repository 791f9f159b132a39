"""Measure the operators and the augmentation against what one would use instead.

`python tools/bench_ops.py [--ops box_pool masked_pool batch_norm_act queue_contrast augment]`
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:
    # Python puts the script's folder on the path, not the checkout.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from models.norm import GroupBatchNorm, norm_relu
from models.ops import batch_norm_act, box_pool, masked_pool, queue_contrast
from models.ops.box_pool import box_masks, box_pool_definition
from models.ops.choice import BOX_POOL, MASKED_POOL, NORM
from models.ops.launcher import CudaModule
from models.ops.masked_pool import masked_pool_definition
from models.ops.queue_contrast import queue_contrast_definition
from pipeline import augment
from tools.bench.augment_contenders import CONTENDERS, installed
from tools.bench.projection import GPUS
from tools.bench.rows import Report
from tools.bench.timing import add_common_flags, check_twice_eager, choose_device, peak_mib, time_interleaved
from tools.support import cli

OPS = ("box_pool", "masked_pool", "batch_norm_act", "queue_contrast", "augment")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


# Ways to pool that one would write without this project's operators.


def two_means(feature_map: Tensor, boxes: Tensor) -> Tensor:
    """Eager PyTorch: a mask multiply for the paste, the total for the rest, as a careful user would write it."""
    paste = box_masks(boxes, *feature_map.shape[2:])[:, None]  # (B, 1, H, W)
    cells, everything = paste.sum(dim=(2, 3)), feature_map.shape[2] * feature_map.shape[3]
    inside, total = (feature_map * paste).sum(dim=(2, 3)), feature_map.sum(dim=(2, 3))
    # A box may cover the whole map; the mean over nothing is then 0 / 1.
    rest = (everything - cells).clamp(min=1)
    return torch.stack([inside / cells.clamp(min=1), (total - inside) / rest, total / everything], dim=1)


def mask_multiply(feature_map: Tensor, boxes: Tensor) -> Tensor:
    """Pool with full-size masks of paste and canvas, one product and sum each, as the released RegionCL code does."""
    mask = torch.zeros_like(feature_map)
    mask[box_masks(boxes, *feature_map.shape[2:])[:, None].expand_as(mask)] = 1.0
    canvas = 1.0 - mask
    parts = [(feature_map * part).sum(dim=(2, 3)) / part.sum(dim=(2, 3)).clamp(min=1) for part in (mask, canvas)]
    return torch.stack([*parts, F.adaptive_avg_pool2d(feature_map, 1).flatten(1)], dim=1)


def einsum_pool(features: Tensor, weights: Tensor) -> Tensor:
    """Eager PyTorch: one einsum over grouped channels, divided by the sums of the maps."""
    batch, channels = features.shape[:2]
    grouped = features.unflatten(1, (weights.shape[1], -1))
    pooled = torch.einsum("bgchw,bgmhw->bmgc", grouped, weights.to(features.dtype))
    return (pooled / weights.sum(dim=(3, 4)).transpose(1, 2)[..., None]).to(features.dtype).reshape(batch, -1, channels)


def multiply_pool(features: Tensor, weights: Tensor) -> Tensor:
    """One mask after the other: multiply the map and sum."""
    per_group = features.shape[1] // weights.shape[1]
    pooled = []
    for mask in range(weights.shape[2]):
        maps = weights[:, :, mask].repeat_interleave(per_group, dim=1)  # (B, C, H, W)
        pooled.append(((features * maps).sum(dim=(2, 3)) / maps.sum(dim=(2, 3))).to(features.dtype))
    return torch.stack(pooled, dim=1)


def _pool_contenders(
    definition: Callable[..., Tensor],
    op: Callable[..., Tensor],
    eager: dict[str, Callable[..., Tensor]],
    device: torch.device,
    compiled: bool,
) -> dict[str, tuple[str, Callable[..., Tensor]]]:
    """Name -> (mode of its `KernelChoice`, function)."""
    contenders = {"definition": ("definition", op)}
    contenders |= {name: ("definition", function) for name, function in eager.items()}
    if device.type == "cuda":
        contenders["CUDA kernel"] = ("cuda", op)
    if compiled:
        contenders["definition, compiled"] = ("definition", torch.compile(definition))
        contenders["eager, compiled"] = ("definition", torch.compile(next(iter(eager.values()))))
    return contenders


class _Differentiated:
    """A contender's forward, and forward with backward, under the implementation it needs."""

    def __init__(
        self,
        contender: tuple[str, Callable[..., Tensor]],
        inputs: Sequence[Tensor],
        wanted: Sequence[Tensor],
        choose: Callable[[str], None],
    ) -> None:
        self.mode, self.function = contender
        self.choose = choose
        self.inputs, self.wanted = inputs, list(wanted)
        with torch.no_grad():
            # Made once: filling it anew would be timed with the backward pass.
            self.grad = torch.ones_like(self.forward())

    def forward(self) -> Tensor:
        # At each call, since contenders take turns and the choice is global.
        self.choose(self.mode)
        return self.function(*self.inputs)

    def forward_only(self) -> None:
        with torch.no_grad():
            self.forward()

    def both(self) -> tuple[Tensor, ...]:
        output = self.forward()
        return (output, *torch.autograd.grad(output, self.wanted, self.grad))


def _measure_pool(
    report: Report,
    name: str,
    setting: str,
    calls: dict[str, _Differentiated],
    exact: Sequence[Tensor],
    bytes_moved: tuple[int, int],
    options: argparse.Namespace,
) -> None:
    """Check every contender's result and gradients, then time forward alone and with backward."""
    eager = calls["eager"].both()
    for contender, call in calls.items():
        for ours, plain, truth in zip(call.both(), eager, exact, strict=True):
            # Only ours are judged; the others are what they are held against.
            if contender.startswith(("definition", "CUDA")):
                check_twice_eager(f"{name}, {contender}", ours, plain, truth)
    _time_passes(report, name, setting, calls, bytes_moved, options)


def _time_passes(
    report: Report,
    name: str,
    setting: str,
    calls: dict[str, _Differentiated],
    bytes_moved: tuple[int, int],
    options: argparse.Namespace,
) -> None:
    """Time forward alone and with backward, with the bandwidth that the bytes moved at least then mean."""
    passes: dict[str, list[Callable[[], object]]] = {
        "forward": [call.forward_only for call in calls.values()],
        "forward+backward": [call.both for call in calls.values()],
    }
    for (metric, functions), moved in zip(passes.items(), bytes_moved, strict=True):
        seconds = _time(dict(zip(calls, functions, strict=True)), report, options)
        for contender, values in seconds.items():
            full_name, rates = f"{name}: {contender}", [moved / value / 1e9 for value in values]
            report.add(full_name, metric, "ms", [1000 * value for value in values], setting)
            report.add(full_name, f"{metric} bandwidth", "GB/s", rates, setting)


def _time(
    calls: Mapping[str, Callable[[], object]], report: Report, options: argparse.Namespace
) -> dict[str, list[float]]:
    return time_interleaved(calls, device=report.device, rounds=options.rounds, max_seconds=options.max_seconds)


def bench_box_pool(report: Report, options: argparse.Namespace) -> None:
    """Paste, canvas and global mean."""
    feature_map = _feature_map(options, report.device)
    boxes = _boxes(options.batch, options.grid).to(report.device)
    eager = {"eager": two_means, "mask multiply (official)": mask_multiply}
    contenders = _pool_contenders(box_pool_definition, box_pool, eager, report.device, options.compile)
    calls = {
        name: _Differentiated(each, (feature_map, boxes), (feature_map,), BOX_POOL.set)
        for name, each in contenders.items()
    }
    wide = feature_map.detach().double().requires_grad_()
    exact_output = box_pool_definition(wide, boxes)
    exact = (exact_output, *torch.autograd.grad(exact_output, wide, torch.ones_like(exact_output)))
    size = feature_map.numel() * feature_map.element_size()
    pooled = options.batch * 3 * options.channels * feature_map.element_size()
    _measure_pool(report, "box_pool", _setting(options), calls, exact, (size + pooled, 2 * (size + pooled)), options)


def _boxes(batch: int, grid: int) -> Tensor:
    """Boxes of 3/7 to 5/7 of the grid, a different one for each image: (batch, 4) int64."""
    generator = torch.Generator().manual_seed(1)
    low, high = max(1, round(3 * grid / 7)), max(1, round(5 * grid / 7))
    side = torch.randint(low, high + 1, (batch, 2), generator=generator)
    origin = (torch.rand(batch, 2, generator=generator) * (grid - side + 1)).long()
    return torch.cat([origin, side], dim=1)


def bench_masked_pool(report: Report, options: argparse.Namespace) -> None:
    """Soft maps: G groups of M masks."""
    features = _feature_map(options, report.device)
    generator = torch.Generator().manual_seed(2)
    shape = (options.batch, options.groups, options.masks, options.grid, options.grid)
    weights = torch.rand(shape, generator=generator).to(report.device).requires_grad_()
    eager = {"eager": einsum_pool, "mask multiply": multiply_pool}
    contenders = _pool_contenders(masked_pool_definition, masked_pool, eager, report.device, options.compile)
    wanted = (features, weights)
    calls = {name: _Differentiated(each, wanted, wanted, MASKED_POOL.set) for name, each in contenders.items()}
    # float64 stands for the exact result: errors of both sides are measured from it.
    wide = [tensor.detach().double().requires_grad_() for tensor in wanted]
    exact_output = masked_pool_definition(*wide)
    exact = (exact_output, *torch.autograd.grad(exact_output, wide, torch.ones_like(exact_output)))
    size = features.numel() * features.element_size() + weights.numel() * weights.element_size()
    pooled = options.batch * options.masks * options.channels * features.element_size()
    setting = f"{_setting(options)}, {options.groups} groups of {options.masks} masks"
    _measure_pool(report, "masked_pool", setting, calls, exact, (size + pooled, 3 * size + 2 * pooled), options)


def bench_norm(report: Report, options: argparse.Namespace) -> None:
    """Batch norm, residual sum and ReLU of a training step, statistics by groups and over the whole batch."""
    shape = (options.batch, options.norm_channels, options.norm_grid, options.norm_grid)
    generator = torch.Generator().manual_seed(5)
    x, residual, cotangent = (
        torch.randn(shape, generator=generator)
        .to(report.device, DTYPES[options.dtype])
        .contiguous(memory_format=torch.channels_last)
        for _ in range(3)
    )
    maps = (x.requires_grad_(), residual.requires_grad_())
    calls: dict[str, _Differentiated] = {}
    try:
        for groups, suffix in ((options.norm_groups, ""), (1, ", one group")):
            norm = GroupBatchNorm(shape[1]).to(report.device)
            norm.group_size = options.batch // groups
            # Ones would hide a forgotten scale.
            torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
            several = {}
            for name, contender in _norm_contenders(norm, report.device, options.compile).items():
                call = _Differentiated(contender, maps, (*maps, norm.weight, norm.bias), NORM.set)
                call.grad = cotangent  # a gradient of ones would come out as zeros
                several[name] = call
            _check_norm(several, norm, groups, cotangent)
            calls |= {f"{name}{suffix}": call for name, call in several.items()}
        size = x.numel() * x.element_size()
        # Forward reads x twice and the residual, and writes y; backward reads x and the gradient twice, and writes two.
        setting = f"{' x '.join(map(str, shape))}, {options.dtype}, channels-last, {options.norm_groups} groups"
        _time_passes(report, "batch_norm_act", setting, calls, (4 * size, 10 * size), options)
    finally:
        NORM.set("auto")


def _norm_contenders(
    norm: GroupBatchNorm, device: torch.device, compiled: bool
) -> dict[str, tuple[str, Callable[..., Tensor]]]:
    """Name -> (implementation for `NORM.set`, function of map and residual)."""
    block = partial(norm_relu, norm)
    contenders: dict[str, tuple[str, Callable[..., Tensor]]] = {
        "eager": ("auto", block),
        "definition": ("definition", block),
    }
    if device.type == "cuda":
        contenders["CUDA kernel"] = ("cuda", block)
    if compiled:
        contenders["eager, compiled"] = ("auto", torch.compile(partial(norm_relu, norm)))
    return contenders


def _check_norm(calls: Mapping[str, _Differentiated], norm: GroupBatchNorm, groups: int, cotangent: Tensor) -> None:
    """Refuse one of ours whose result or gradients err more than twice as much as eager's."""
    eager = calls["eager"].both()
    maps = calls["eager"].inputs
    for name in [name for name in calls if not name.startswith("eager")]:
        ours = calls[name].both()
        leaves = [t.detach().double().requires_grad_() for t in (*maps, norm.weight, norm.bias)]
        x, residual, weight, bias = leaves
        NORM.set("definition")
        y = batch_norm_act(x, weight, bias, groups=groups, eps=norm.eps, residual=residual)[0]
        y = y * (ours[0] > 0)  # where rounding decides what the ReLU passes, float64 must not decide otherwise
        exact = (y, *torch.autograd.grad(y, leaves, cotangent.double()))
        for result, plain, truth in zip(ours, eager, exact, strict=True):
            check_twice_eager(f"batch_norm_act, {name}", result, plain, truth)


def bench_queue(report: Report, options: argparse.Namespace) -> None:
    """InfoNCE of query, canvas and paste rows against the queue: time and peak memory, forward and backward."""
    generator = torch.Generator().manual_seed(3)
    dtype, count = DTYPES[options.dtype], 3 * options.batch
    rows, queue = (F.normalize(torch.randn(n, 128, generator=generator), dim=1) for n in (count, options.queue))
    rows, queue = rows.to(report.device, dtype).requires_grad_(), queue.to(report.device, dtype)
    positives, extra = (torch.rand(n, generator=generator).to(report.device) for n in (count, (count, 1)))  # type: ignore[call-overload]

    def both(function: Callable[..., Tensor], *, inputs: Tensor = rows, keys: Tensor = queue) -> tuple[Tensor, Tensor]:
        losses = function(inputs, keys, positives.to(keys.dtype), 0.2, extra.to(keys.dtype))
        return losses, torch.autograd.grad(losses.sum(), inputs)[0]

    contenders = {"by blocks": queue_contrast, "materialised": queue_contrast_definition}
    if options.compile:
        contenders["materialised, compiled"] = torch.compile(queue_contrast_definition)
    exact = both(queue_contrast_definition, inputs=rows.detach().double().requires_grad_(), keys=queue.double())
    eager = both(queue_contrast_definition)
    for ours, plain, truth in zip(both(queue_contrast), eager, exact, strict=True):
        check_twice_eager("queue_contrast", ours, plain, truth)
    calls = {name: partial(both, function) for name, function in contenders.items()}
    setting = f"{count} rows, queue {options.queue} x 128, {options.dtype}"
    for name, values in _time(calls, report, options).items():
        report.add(f"queue_contrast: {name}", "forward+backward", "ms", [1000 * value for value in values], setting)
    for name, call in calls.items():
        # Apart from the timing, because the profiler slows a call.
        memory = [peak_mib(call, report.device) for _ in range(3)]
        report.add(f"queue_contrast: {name}", "peak memory", "MiB", memory, setting)


def bench_augment(report: Report, options: argparse.Namespace) -> None:
    """Two views of every source image, uint8 crops to normalised tensors."""
    rng = np.random.default_rng(4)
    # Smooth pictures: on noise, blur and jitter would be checked on values that no photograph has.
    coarse = torch.from_numpy(rng.uniform(0, 255, (options.batch, 3, 8, 8)).astype(np.float32))
    images = F.interpolate(coarse, size=options.size, mode="bilinear").round().to(torch.uint8).to(report.device)
    images = images.contiguous(memory_format=torch.channels_last)
    params = augment.draw("mocov2", 0, 0, np.arange(options.batch), 0).to(report.device)
    # Every implementation must compute the reference's pixels before it is timed.
    reference = augment.apply(images, params, implementation="reference")
    calls: dict[str, Callable[[], object]] = {}
    for name in augment.IMPLEMENTATIONS:
        if name == "auto":
            continue
        try:
            result = augment.apply(images, params, implementation=name, load=CudaModule)
        except ValueError as reason:
            print(f"augment, {name}: left out, {reason}")
            continue
        # A tenth of a grey level, in units of the normalised image.
        if not float((result - reference).abs().max()) <= 0.1 / (255 * min(augment.STD)) + 1e-5:
            raise RuntimeError(f"augment, {name}: differs from the reference by more than a tenth of a grey level")
        calls[f"ours, {name}"] = partial(augment.apply, images, params, implementation=name, load=CudaModule)
    for name, (module, build) in CONTENDERS.items():
        if not installed(module):
            print(f"augment, {name}: left out, {module} is not installed")
            continue
        call = build(images)
        result = call()
        # Other libraries draw differently, so only shape and brightness can be held against ours.
        shift = float(result.mean() - reference.mean())
        if result.shape != reference.shape or not abs(shift) < 0.5:
            raise RuntimeError(f"augment, {name}: {tuple(result.shape)}, mean off by {shift:.3f}: not the same work")
        calls[name] = call
    setting = f"{options.batch} sources x 2 views, {options.size} px, {torch.get_num_threads()} threads"
    for name, values in _time(calls, report, options).items():
        report.add(f"augment: {name}", "two views", "ms", [2000 * value for value in values], setting)
        report.add(f"augment: {name}", "throughput", "images/s", [options.batch / (2 * v) for v in values], setting)


def _feature_map(options: argparse.Namespace, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    feature_map = torch.randn(options.batch, options.channels, options.grid, options.grid, generator=generator)
    feature_map = feature_map.relu_().to(device, DTYPES[options.dtype])  # what a trunk ends with
    return feature_map.contiguous(memory_format=torch.channels_last).requires_grad_()


def _setting(options: argparse.Namespace) -> str:
    return f"{options.batch} x {options.channels} x {options.grid} x {options.grid}, {options.dtype}, channels-last"


def conclusion(report: Report) -> str:
    """One line: how ours compares with the fastest other way, operator by operator, and the share of bandwidth."""
    parts = []
    definitions = [(op, "definition") for op in ("box_pool", "masked_pool", "batch_norm_act")]
    for op, ours in (*definitions, ("queue_contrast", "by blocks")):
        times = _times(report, op, "forward+backward")
        others = {name: value for name, value in times.items() if name in ("eager", "materialised")}
        chosen = "CUDA kernel" if "CUDA kernel" in times else ours
        if chosen in times and others:
            parts.append(f"{op} ({chosen}) {min(others.values()) / times[chosen]:.2f} x eager")
    augmentation = _times(report, "augment", "two views")
    own = {name: value for name, value in augmentation.items() if name.startswith("ours")}
    other = {name: value for name, value in augmentation.items() if not name.startswith("ours")}
    if own and other:
        best, rival = min(own, key=own.__getitem__), min(other, key=other.__getitem__)
        parts.append(f"augmentation ({best}) {other[rival] / own[best]:.1f} x {rival}")
    return "bottleneck: " + ("; ".join(parts) or "nothing was compared") + _bandwidth_share(report)


def _times(report: Report, op: str, metric: str) -> dict[str, float]:
    prefix = f"{op}: "
    return {
        row.contender.removeprefix(prefix): row.value.median
        for row in report.rows
        if row.contender.startswith(prefix) and row.metric == metric
    }


def _bandwidth_share(report: Report) -> str:
    if report.device.type != "cuda":
        return "; on a CPU memory and cores limit alike (--device cuda measures the GPU's own limit)"
    name = torch.cuda.get_device_name(report.device)
    peak = next((gpu.bandwidth for key, gpu in GPUS.items() if key in name), None)
    wanted = [row for row in report.rows if row.metric == "forward bandwidth" and "kernel" in row.contender]
    if peak is None or not wanted:
        return ""
    share = max(row.value.median for row in wanted) * 1e9 / peak
    return f"; the kernels reach {share:.0%} of {name}'s memory bandwidth (aim 60%; larger --batch fills the GPU)"


BENCHES = {
    "box_pool": bench_box_pool,
    "masked_pool": bench_masked_pool,
    "batch_norm_act": bench_norm,
    "queue_contrast": bench_queue,
    "augment": bench_augment,
}


def main(argv: Sequence[str]) -> int:
    """Run the benchmarks that the flags ask for."""
    parser = cli.make_parser("Measure operators and augmentation against what one would use instead.")
    parser.add_argument("--ops", nargs="+", default=list(OPS), choices=OPS, help="what to measure")
    parser.add_argument("--batch", type=int, default=256, help="images")
    parser.add_argument("--channels", type=cli.positive, default=2048, help="channels of the feature map")
    parser.add_argument("--grid", type=int, default=7, help="cells a side of the feature map")
    parser.add_argument("--groups", type=cli.positive, default=1, help="channel groups of masked_pool; LEWEL has 4")
    parser.add_argument("--masks", type=cli.positive, default=2, help="masks of each group; LEWEL-B has 64")
    parser.add_argument("--norm-channels", type=int, default=256, help="channels of batch_norm_act's map")
    parser.add_argument("--norm-grid", type=int, default=56, help="cells a side of batch_norm_act's map")
    parser.add_argument("--norm-groups", type=int, default=8, help="groups of images of batch_norm_act")
    parser.add_argument("--queue", type=int, default=65536, help="keys in the queue")
    parser.add_argument("--size", type=int, default=224, help="side of an augmented view in pixels")
    parser.add_argument("--dtype", default="auto", choices=("auto", *DTYPES), help="auto: bf16 on CUDA, fp32 on CPU")
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="compiled contenders too; none: on CUDA only",
    )
    add_common_flags(parser)
    options = cli.parse(parser, argv)
    device = choose_device(options.device)
    if min(options.batch, options.grid, options.size - 7, options.queue) < 1 or options.channels % options.groups:
        raise ValueError("sizes must be positive (--size at least 8) and --channels a multiple of --groups")
    if "batch_norm_act" in options.ops and (options.norm_groups < 1 or options.batch % options.norm_groups):
        raise ValueError(f"--batch {options.batch} is not a multiple of --norm-groups {options.norm_groups}")
    options.dtype = ("bf16" if device.type == "cuda" else "fp32") if options.dtype == "auto" else options.dtype
    options.compile = device.type == "cuda" if options.compile is None else options.compile
    report = Report("bench_ops", device)
    for op in options.ops:
        BENCHES[op](report, options)
    report.finish(conclusion(report), options.output, write=not options.no_csv)
    return 0


if __name__ == "__main__":
    cli.run_main(main)
