"""Measure one training step on inputs that are already on the device: the model alone.

`python tools/bench_step.py [--method regioncl-m] [--arch resnet50] [--profile]`

Contenders for RegionCL-M and MoCo v2: our port of the released step, "strong eager" (that step with AMP, channels-last
and a fused optimizer), strong eager with one more optimisation each, and ours. For other methods: ours in steps.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:
    # Python puts the script's folder on the path, not the checkout.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
import torchvision
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from models.methods import METHODS
from models.methods.base import Method, StepInputs
from models.methods.moco_v2 import MoCoV2
from models.ops.choice import CHOICES
from pipeline.augmenter import BatchAugmenter
from pipeline.interface import Batch, PipelineConfig
from pipeline.synthetic import SyntheticPipeline
from tools.bench.projection import GPUS
from tools.bench.reference_port import PortedStep, PortOptions
from tools.bench.rows import Report
from tools.bench.timing import add_common_flags, choose_device, peak_mib, time_interleaved
from tools.support import cli
from train.build import build_job, build_method, build_state, compile_heads
from train.checkpoint import run_checkpoints
from train.config import Config
from train.inputs import finished_views
from train.loop import take_step
from train.proving.gradients import gradient_problem
from train.resolve import resolve
from train.runtime import Runtime, start

PORTED = ("regioncl-m", "moco-v2")
"""The methods whose released step `reference_port.py` holds; its trunk is torchvision's ResNet."""
ATTEMPTS = {
    "trunk": "heads and trunks compiled",
    "graph": "forward and backward as a CUDA graph",
    "pool-kernel": "mask pooling by CUDA kernels",
    "attention": "Swin's attention by PyTorch's fused attention",
    "norm-kernel": "batch norm, residual sum and ReLU of the trunks as one operator with CUDA kernels",
    "shared-forward": "queries and region-swapped views in one forward pass",
    "one-group": "batch-norm statistics over the whole batch: what groups cost",
}
KERNELS_OF = {
    "pool-kernel": ("box_pool", "masked_pool"),
    "attention": ("window_attention",),
    "norm-kernel": ("batch_norm_act",),
}
ON_CUDA = {"graph", "pool-kernel", "norm-kernel"}
STEPS_PER_EPOCH = 1000
LOSS_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 3e-2, torch.float16: 1e-2}


def choose_kernels(names: frozenset[str]) -> None:
    """Let the kernels of these operators run from now on, and no others."""
    for name, choice in CHOICES.items():
        choice.set("cuda" if name in names else "auto")


class OurStep:
    """The step of `train/main.py` on prepared inputs.

    Args:
        config: resolved run configuration.
        runtime: device and precision.
        compile_parts: "" for none, "heads" as `--compile` does, "trunk" for heads and trunks.
        graph: forward and backward as a CUDA graph.
        kernels: names in `CHOICES` of the operators whose kernels run.
    """

    def __init__(
        self,
        config: Config,
        runtime: Runtime,
        compile_parts: str = "",
        graph: bool = False,
        kernels: frozenset[str] = frozenset(),
    ) -> None:
        config = replace(config, run=replace(config.run, cuda_graph=graph))
        self.config, self.runtime = config, runtime
        self.kernels = kernels
        self.method: Method = build_method(config, runtime)
        # In place, as `train/main.py` does: names in the state dict stay.
        if compile_parts:
            compile_heads(self.method)
        if compile_parts == "trunk":
            for online, momentum in self.method.momentum_pairs() or [(self.method.encoder, self.method.encoder)]:
                for module in {online, momentum}:
                    if hasattr(module, "forward_stages"):
                        module.compile()
        self.state = build_state(config, runtime, self.method)
        self.job = build_job(
            config,
            runtime,
            self.state,
            SyntheticPipeline(synthetic_settings(config, runtime, STEPS_PER_EPOCH)),
            run_checkpoints(config, {"data_hash": ""}, runtime),
        )
        self.builder = self.job.stream.builder
        self.method.train()
        self.inputs: list[StepInputs] = []

    def prepare(self, batches: int = 2) -> None:
        """Make inputs to use in turn."""
        augment, crops = synthetic_crops(self.config, self.runtime, batches)
        for step, batch in enumerate(crops):
            self.inputs += self.builder.build(augment(batch, 0), step)

    def __call__(self) -> None:
        """Take the next step."""
        # At each call, since contenders take turns and the choices are global.
        choose_kernels(self.kernels)
        step = self.state.step
        take_step(self.job, self.state, step, [self.inputs[step % len(self.inputs)]])
        self.state.step += 1
        # Training starts new sums at each row of metrics; nobody writes rows here.
        if step % 100 == 99:
            self.state.sums, self.state.sum_steps = {}, 0

    def loss_of_last_step(self) -> float:
        """The last step's loss, when sums were cleared before it."""
        return float(self.state.sums["loss"])


def synthetic_settings(config: Config, runtime: Runtime, count: int) -> PipelineConfig:
    """The settings of `count` batches of synthetic views on the device, augmented as the run's."""
    size = config.recipe.global_batch
    settings = PipelineConfig(
        str(count * size),
        (),
        size,
        seed=config.run.seed,
        rank=runtime.rank,
        world_size=runtime.world_size,
        device=runtime.device,
    )
    return finished_views(settings, config, runtime)


def synthetic_crops(config: Config, runtime: Runtime, count: int) -> tuple[BatchAugmenter, Iterator[Batch]]:
    """The augmenter of a run, and `count` batches of synthetic uint8 crops on the device for it."""
    settings = synthetic_settings(config, runtime, count)
    # The crops come as they are, so that their augmentation can be timed.
    return BatchAugmenter(settings), iter(SyntheticPipeline(replace(settings, augment="")))


class PortStep:
    """The ported step on the inputs of ours."""

    def __init__(self, ours: OurStep, options: PortOptions) -> None:
        config = ours.config
        assert isinstance(ours.method, MoCoV2)
        self.port = PortedStep(
            ours.method,
            config.recipe.arch,
            config.run.method == "regioncl-m",
            ours.state.optimizer.param_groups[0]["lr"],
            options,
        )
        # The released step gets fp32 views; they are converted here, so that the conversion is not timed.
        self.views = [(inputs.view1.float(), inputs.view2.float()) for inputs in ours.inputs]
        self.step = 0

    def __call__(self) -> None:
        """Take the next step."""
        view1, view2 = self.views[self.step % len(self.views)]
        self.step += 1
        self.port(view1, view2)


def port_options(dtype: torch.dtype, compiled: bool) -> dict[str, PortOptions]:
    """The port's contenders by name."""
    strong = PortOptions(None if dtype is torch.float32 else dtype, channels_last=True, fused_sgd=True)
    single = {
        "AMP alone": PortOptions(amp=strong.amp),
        "channels-last alone": PortOptions(channels_last=True),
        "fused SGD alone": PortOptions(fused_sgd=True),
    }
    added = {
        "box pooling": "box_pool",
        "blockwise queue loss": "queue_contrast",
        "fused EMA": "fused_ema",
        "no host waits": "no_waits",
    }
    if compiled:
        added["compiled head"] = "compile_head"
    contenders = {"official port": PortOptions(), **{f"port + {name}": value for name, value in single.items()}}
    contenders["strong eager"] = strong
    for name, field in added.items():
        contenders[f"strong eager + {name}"] = replace(strong, **{field: True})  # type: ignore[arg-type]
    if strong.amp is None:
        del contenders["port + AMP alone"]  # fp32 was asked for: it would be the port itself
    return contenders


def configure(
    options: argparse.Namespace, batch: int, group_size: int | None, precision: str, shared_forward: bool = False
) -> Config:
    """The run configuration of the benchmark.

    Args:
        options: parsed flags.
        batch: images a step.
        group_size: BN group; None keeps the recipe's where it divides the batch, else the whole batch.
        precision: as `--precision`.
        shared_forward: as `--region.shared-forward`.

    Raises:
        ValueError: flags that the trainer refuses.
    """
    flags = [
        "--method",
        options.method,
        "--loader",
        "synthetic",
        "--device",
        choose_device(options.device).type,
        "--global-batch",
        str(batch),
        "--precision",
        precision,
        # All synthetic images alike: none is kept out for health figures.
        "--holdout",
        "0",
    ]
    for name, value in (("--arch", options.arch), ("--image-size", options.image_size)):
        flags += [name, str(value)] if value else []
    if options.queue and hasattr(METHODS[options.method].Config(), "queue_size"):
        flags += ["--queue-size", str(options.queue)]
    if shared_forward:
        flags += ["--region.shared-forward", "true"]
    # Twice: the recipe's group size is known only after resolving, and it may not divide this batch.
    config = resolve(flags)
    size = config.recipe.bn.group_size if group_size is None else group_size
    return resolve([*flags, "--bn.group-size", str(size if size and batch % size == 0 else 0)])


@dataclass(frozen=True)
class Taken:
    """What steps from equal weights on equal inputs gave.

    Attributes:
        losses: of each step.
        gradients: name of the parameter in our method -> gradient of the first step.
    """

    losses: list[float]
    gradients: dict[str, Tensor]


def has_port(options: argparse.Namespace) -> bool:
    """Whether the released step is timed, too."""
    if options.ours_only or options.method not in PORTED:
        return False
    arch = configure(options, options.batch, None, options.precision).recipe.arch
    return arch in torchvision.models.list_models(torchvision.models) and arch.startswith("resnet")


def check_steps(options: argparse.Namespace, runtime: Runtime) -> None:
    """Two steps of every contender must give the losses of the fp32 port, and the first of them its gradients.

    In fp16 the losses alone are compared.

    Raises:
        RuntimeError: one does not.
    """
    # Small, because this checks values, not speed, and one group, because the port knows no groups.
    config = configure(options, min(options.batch, 32), 0, "fp32")
    fp32 = replace(runtime, dtype=torch.float32)
    source = OurStep(config, fp32)
    source.prepare()
    # The port as released, in fp32, is what everything else is held against.
    expected = _port_steps(source, PortOptions())
    for name, ours_runtime in {"ours, fp32": fp32, f"ours, {str(runtime.dtype)[6:]}": runtime}.items():
        # With --precision fp32 both entries are the same step.
        if name == "ours, fp32" or ours_runtime.dtype is not torch.float32:
            _compare(name, _our_steps(OurStep(config, ours_runtime), source.inputs), expected, ours_runtime.dtype)
    for names in options.attempt:
        if "trunk" not in names:  # whose compilation takes longer than a check on other shapes is worth
            tried = attempted_step(names, options, runtime, config.recipe.global_batch, 0, "")
            _compare(_label(names), _our_steps(tried, source.inputs), expected, runtime.dtype)
    for name, port in port_options(runtime.dtype, False).items():
        if name != "official port" and _wanted(options, name):
            _compare(name, _port_steps(source, port), expected, port.amp or torch.float32)


def _port_steps(source: OurStep, options: PortOptions) -> Taken:
    """A fresh port's steps on the inputs of ours."""
    step = PortStep(source, options)
    assert isinstance(source.method, MoCoV2)
    # The port gets the regions that ours drew: another draw would be another loss.
    boxes = [inputs.box_cells.get("view1") for inputs in source.inputs]
    regions = [None if box is None else tuple(box[0].tolist()) for box in boxes]
    online = step.port.online
    losses: list[float] = []
    gradients: dict[str, Tensor] = {}
    for views, region in zip(step.views, regions, strict=True):
        losses.append(float(step.port(*views, region)))  # type: ignore[arg-type]
        # Later steps start from weights that rounding has moved apart; the port's stay until its next backward pass.
        gradients = gradients or _gradients(source.method, [*online.trunk.parameters(), *online.neck.parameters()])
    return Taken(losses, gradients)


def _our_steps(ours: OurStep, inputs: list[StepInputs]) -> Taken:
    """A fresh step of ours on each of the inputs in turn."""
    losses: list[float] = []
    gradients: list[dict[str, Tensor]] = []
    ours.inputs, method = inputs, ours.method
    assert isinstance(method, MoCoV2)
    trained = [*method.encoder.parameters(), *method.projector.parameters()]
    # As the optimizer finds them, unscaled and clipped; the step drops them afterwards.
    hook = ours.state.optimizer.register_step_pre_hook(lambda *_: gradients.append(_gradients(method, trained)))
    for _ in inputs:
        # Cleared before each step, so that the sum is that step's loss.
        ours.state.sums = {}
        ours()
        losses.append(ours.loss_of_last_step())
    hook.remove()
    return Taken(losses, gradients[0])


def _gradients(method: MoCoV2, parameters: Sequence[Tensor]) -> dict[str, Tensor]:
    """Copies of gradients by our names; `parameters` in the order of our encoder and projector."""
    parts = {"encoder": method.encoder, "projector": method.projector}
    names = [f"{part}.{name}" for part, module in parts.items() for name, _ in module.named_parameters()]
    held = zip(names, parameters, strict=True)
    return {name: each.grad.detach().clone() for name, each in held if each.grad is not None}


def attempted_step(
    names: frozenset[str],
    options: argparse.Namespace,
    runtime: Runtime,
    batch: int,
    group_size: int | None,
    compile_parts: str,
) -> OurStep:
    """Our step with what `--try` named.

    Args:
        names: of `ATTEMPTS`.
        options: parsed flags.
        runtime: device and precision.
        batch: images a step.
        group_size: BN group, as for `configure`.
        compile_parts: what is compiled unless the trunk is to be.
    """
    # Zero is the whole batch.
    group_size = 0 if "one-group" in names else group_size
    return OurStep(
        configure(options, batch, group_size, options.precision, "shared-forward" in names),
        runtime,
        "trunk" if "trunk" in names else compile_parts,
        graph="graph" in names,
        kernels=frozenset().union(*(KERNELS_OF.get(name, ()) for name in names)),
    )


def _label(names: frozenset[str]) -> str:
    return "ours + " + " + ".join(name for name in ATTEMPTS if name in names)


def parse_attempt(text: str) -> frozenset[str]:
    """Names joined by "+", as `--try` takes them.

    Raises:
        argparse.ArgumentTypeError: an unknown one.
    """
    names = frozenset(text.split("+"))
    unknown = names - set(ATTEMPTS)
    if unknown:
        raise argparse.ArgumentTypeError(f"{min(unknown)!r} is unknown; choose from {', '.join(ATTEMPTS)}")
    return names


def check_attempts(options: argparse.Namespace) -> None:
    """Refuse what the device or the method does not have, before anything is built.

    Raises:
        ValueError: naming it.
    """
    names = frozenset().union(*options.attempt)
    if choose_device(options.device).type != "cuda" and names & ON_CUDA:
        raise ValueError(f"--try {min(names & ON_CUDA)} needs a CUDA device; leave it out on the CPU")
    if "shared-forward" in names and not hasattr(METHODS[options.method].Config(), "region"):
        raise ValueError(f"--try shared-forward: {options.method} swaps no regions; choose a regioncl method")


def _wanted(options: argparse.Namespace, name: str) -> bool:
    return not options.contenders or name in options.contenders


def _compare(name: str, found: Taken, expected: Taken, dtype: torch.dtype) -> None:
    tolerance = LOSS_TOLERANCE[dtype]
    for step, (loss, wanted) in enumerate(zip(found.losses, expected.losses, strict=True)):
        # Written so that NaN is refused as well.
        if not abs(loss - wanted) <= tolerance * abs(wanted):
            raise RuntimeError(f"{name}: loss {loss:.6g} at step {step}, the fp32 port has {wanted:.6g}")
    # In fp16 the loss scale may skip our first step, and the port has no loss scale: its gradients underflow.
    if dtype is torch.float16:
        return
    # A wrong gradient moves the second loss by less than its tolerance, so the gradients are compared themselves.
    problem = gradient_problem(found.gradients, expected.gradients, dtype)
    if problem:
        raise RuntimeError(f"{name}: {problem}; the reference is the fp32 port")


def build_contenders(options: argparse.Namespace, runtime: Runtime) -> dict[str, Callable[[], None]]:
    """Everything that is timed, ready to be called."""
    config = configure(options, options.batch, None, options.precision)
    ours = {"ours, not compiled": OurStep(config, runtime)}
    if options.compile:
        ours["ours"] = OurStep(config, runtime, "heads")
    heads = "heads" if options.compile else ""
    for names in options.attempt:
        ours[_label(names)] = attempted_step(names, options, runtime, options.batch, None, heads)
    contenders: dict[str, Callable[[], None]] = {}
    first = ours["ours, not compiled"]
    # One set of inputs for all contenders: each has the same work, and they are held in memory once.
    first.prepare()
    if has_port(options):
        for name, port in port_options(runtime.dtype, options.compile).items():
            if _wanted(options, name):
                contenders[name] = PortStep(first, port)
    for name, step in ours.items():
        step.inputs = first.inputs
        contenders[name] = step
    contenders["ours with augmentation"] = _WithAugmentation(first)
    return contenders


class _WithAugmentation:
    """Augmentation and region swapping of a resident uint8 batch, then the step, on one stream."""

    def __init__(self, ours: OurStep) -> None:
        self.ours = ours
        self.augment, crops = synthetic_crops(ours.config, ours.runtime, 1)
        self.batch = next(crops)

    def __call__(self) -> None:
        # The step is shared with another contender, which must find its inputs again.
        kept = self.ours.inputs
        self.ours.inputs = self.ours.builder.build(self.augment(self.batch, 0), self.ours.state.step)
        self.ours()
        self.ours.inputs = kept


def flops_per_image(ours: OurStep) -> float:
    """Floating-point operations of forward and backward for one source image, multiply and add counted apart."""
    counter = FlopCounterMode(display=False)
    # Without the optimizer: a roofline counts what grows with the images.
    with counter, ours.runtime.autocast():
        ours.method(ours.inputs[0]).loss.backward()
    ours.state.optimizer.zero_grad(set_to_none=True)
    return counter.get_total_flops() / ours.config.recipe.global_batch


class PartTimer:
    """Seconds by part of a step, with the device waited for at every border; parts nest, inner ones are subtracted."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}
        self._inner = [0.0]

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time the block as `name`."""
        started = self._now()
        self._inner.append(0.0)
        yield
        # Inner parts have counted their own time, so it is taken off here; the part outside is told of the whole.
        spent = self._now() - started
        self.seconds[name] = self.seconds.get(name, 0.0) + spent - self._inner.pop()
        self._inner[-1] += spent

    def wrap(self, module: nn.Module, name: str) -> Callable[[], None]:
        """Time every forward of `module` as `name`; returns what undoes it."""
        original = module.forward

        def timed(*args: Tensor, **keywords: Tensor) -> Tensor:
            with self.part(name):
                return original(*args, **keywords)

        module.forward = timed  # type: ignore[method-assign]
        return lambda: module.__dict__.pop("forward", None)  # type: ignore[return-value]


def profile_parts(ours: OurStep, steps: int) -> dict[str, list[float]]:
    """Seconds of each part in each of `steps` steps."""
    augment, crops = synthetic_crops(ours.config, ours.runtime, 1)
    batch = next(crops)
    parts: dict[str, list[float]] = {}
    method, optimizer = ours.method, ours.state.optimizer
    # On CUDA the first steps choose convolutions and compile.
    settle = 2 if ours.runtime.device.type == "cuda" else 0
    for step in range(steps + settle):
        timer = PartTimer(ours.runtime.device)
        # Wrapped for one step at a time: a timer holds the seconds of its own step alone.
        undo = [timer.wrap(method.encoder, "online trunk, forward")]
        undo += [timer.wrap(m, "momentum trunk, forward") for o, m in method.momentum_pairs() if o is method.encoder]
        with timer.part("augmentation and regions"):
            inputs = ours.builder.build(augment(batch, 0), step)[0]
        with timer.part("heads and losses, forward"), ours.runtime.autocast():
            output = method(inputs)
        with timer.part("backward"):
            output.loss.backward()
        with timer.part("optimizer"):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        with timer.part("EMA and queue"):
            method.after_step(output, 0.999)
        for restore in undo:
            restore()
        if step >= settle:
            for name, seconds in timer.seconds.items():
                parts.setdefault(name, []).append(seconds)
    return parts


def conclusion(report: Report, parts: dict[str, list[float]]) -> str:
    """One line: the rate, the ratios to the other contenders, and what takes longest."""
    rates = {row.contender: row.value.median for row in report.rows if row.metric == "throughput"}
    own = "ours" if "ours" in rates else "ours, not compiled"
    line = f"bottleneck: {own} {rates[own]:.4g} images/s"
    for other in ("strong eager", "official port"):
        if other in rates:
            line += f", {rates[own] / rates[other]:.2f} x {other}"
    if parts:
        medians = {name: float(np.median(values)) for name, values in parts.items()}
        slowest = max(medians, key=medians.__getitem__)
        return f"{line}; longest part: {slowest}, {medians[slowest] / sum(medians.values()):.0%} of a step"
    return f"{line}; --profile shows the parts of a step"


def measure(options: argparse.Namespace, runtime: Runtime) -> None:
    """Check, time, and print."""
    # Before anything is built, which takes minutes.
    unknown = set(options.contenders) - set(port_options(runtime.dtype, options.compile))
    if unknown:
        known = ", ".join(port_options(runtime.dtype, options.compile))
        raise ValueError(f"--contenders {min(unknown)!r} is unknown; choose from {known}")
    if has_port(options):
        check_steps(options, runtime)
    elif not options.ours_only:
        print("the released step is left out: it is there for RegionCL-M and MoCo v2 on a ResNet", file=sys.stderr)
    report = Report("bench_step", runtime.device)
    contenders = build_contenders(options, runtime)
    ours = next(step for step in contenders.values() if isinstance(step, OurStep))
    recipe = ours.config.recipe
    setting = (
        f"{options.method}, {recipe.arch}, {recipe.image_size} px, batch {options.batch}, "
        f"bn {recipe.bn.mode} {recipe.bn.group_size}, {str(runtime.dtype)[6:]}"
    )
    warmup = 3 if runtime.device.type == "cuda" else 1  # on CUDA the first steps choose convolutions and compile
    seconds = time_interleaved(
        contenders, device=runtime.device, rounds=options.rounds, warmup=warmup, max_seconds=options.max_seconds
    )
    flops = flops_per_image(ours)
    for name, values in seconds.items():
        report.add(name, "step", "ms", [1000 * value for value in values], setting)
        rate = report.add(name, "throughput", "images/s", [options.batch / value for value in values], setting)
        report.add(name, "compute", "TFLOP/s", [flops * rate.median / 1e12], setting)
    # After timing, because measuring memory waits for the device.
    for name, call in contenders.items() if runtime.device.type == "cuda" else ():
        report.add(name, "peak memory", "MiB", [peak_mib(call, runtime.device)], setting)
    report.add("step", "flops an image", "FLOP", [flops], setting)
    trained = sum(parameter.numel() for parameter in ours.method.parameters() if parameter.requires_grad)
    report.add("step", "parameters", "count", [trained], setting)
    _add_roofline(report, flops, setting)
    parts = profile_parts(ours, options.rounds) if options.profile else {}
    for name, values in parts.items():
        report.add(f"part: {name}", "time", "ms", [1000 * value for value in values], setting)
    report.finish(conclusion(report, parts), options.output, write=not options.no_csv)


def _add_roofline(report: Report, flops: float, setting: str) -> None:
    """The rate at which a step would run if it did nothing but its multiplications at the data sheet's peak."""
    if report.device.type != "cuda":
        return
    name = torch.cuda.get_device_name(report.device)
    peak = next((gpu.flops for key, gpu in GPUS.items() if key in name), None)
    if peak is not None:
        report.add("bound: dense half precision", "throughput bound", "images/s", [peak / flops], setting)


def main(argv: Sequence[str]) -> int:
    """Run the benchmark that the flags ask for."""
    parser = cli.make_parser("Measure one training step on synthetic inputs, beside what it replaces.")
    parser.add_argument("--method", default="regioncl-m", choices=tuple(METHODS), help="method to train")
    parser.add_argument("--arch", default="", help="backbone; the recipe's when empty")
    parser.add_argument("--image-size", type=int, default=0, help="side of a view; 0 is the recipe's")
    parser.add_argument("--batch", type=int, default=256, help="images a step on this device")
    parser.add_argument("--queue", type=int, default=0, help="keys in the queue; 0 is the method's own")
    parser.add_argument("--precision", default="auto", choices=("auto", "fp32", "bf16", "fp16"), help="as in training")
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="contenders with compiled heads; none: on CUDA only",
    )
    described = "; ".join(f"{name}: {text}" for name, text in ATTEMPTS.items())
    parser.add_argument(
        "--try",
        dest="attempt",
        nargs="*",
        default=[],
        type=parse_attempt,
        metavar="NAME[+NAME]",
        help=f"contenders with what is off by default, alone or joined by +. {described}",
    )
    parser.add_argument("--contenders", nargs="*", default=[], help="which variants of the port to run; all when empty")
    parser.add_argument("--ours-only", action="store_true", help="leave the ported step out")
    parser.add_argument("--profile", action="store_true", help="time the parts of a step")
    add_common_flags(parser)
    options = cli.parse(parser, argv)
    options.compile = choose_device(options.device).type == "cuda" if options.compile is None else options.compile
    check_attempts(options)
    precision = torch.get_float32_matmul_precision()
    try:
        with start(configure(options, options.batch, None, options.precision).run) as runtime:
            if runtime.device.type == "cuda":
                torch.set_float32_matmul_precision("high")  # TF32 for the fp32 contenders, as in the released run
            measure(options, runtime)
    finally:
        torch.set_float32_matmul_precision(precision)
        choose_kernels(frozenset())
    return 0


if __name__ == "__main__":
    cli.run_main(main)
