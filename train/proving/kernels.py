"""The trials of our kernels: at the shapes and dtypes of a run, and at odd ones whose tails a kernel may forget."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache, partial

import numpy as np
import torch
from torch import Tensor

from models.norm import GroupBatchNorm, norm_relu
from models.ops import box_pool, masked_pool, queue_contrast
from models.ops.launcher import CudaModule
from models.ops.queue_contrast import queue_contrast_definition
from models.ops.window_attention import window_attention
from pipeline import augment

from .calls import OperatorCall, Shape, operator_calls
from .prover import Call, Candidate, Results, Trial, compare_largest, compare_mean
from .setting import Setting, chosen, method_and_inputs

NEAR_ZERO = 0.05
"""Where a value before the ReLU is nearer to zero, rounding decides what passes; no gradient is sent there."""
AUGMENTED = 64
ODD_NORMS = (((6, 7, 5, 3), 2), ((4, 36, 1, 3), 1), ((2, 40, 7, 7), 1), ((9, 24, 3, 5), 3))
ODD_BOXES = ((3, 7, 5, 3), (1, 264, 7, 7), (2, 36, 1, 2))
ODD_MASKS = (((3, 7, 5, 3), (1, 2)), ((2, 264, 7, 7), (2, 3)), ((1, 36, 3, 1), (4, 9)))
ODD_QUEUES = ((7, 300, 24), (33, 1000, 128))
ODD_WINDOWS = ((2, 4, 3, 9, 8), (1, 6, 1, 25, 32), (3, 1, 2, 49, 4))
ODD_VIEWS = ((3, 45), (1, 67))


def kernel_candidates(setting: Setting) -> list[Candidate]:
    """A candidate for each operator that a step of the run calls, and the augmentation of its views."""
    method, inputs = method_and_inputs(setting)
    calls = operator_calls(setting, method, inputs)
    if setting.several and setting.config.recipe.bn.mode == "sync":
        # Statistics over ranks are never fused, whatever one process alone would do.
        calls = Counter({call: count for call, count in calls.items() if call.name != "batch_norm_act"})
    makers: dict[str, Callable[[OperatorCall, int, Setting], Trial]] = {
        "batch_norm_act": _recorded_norm,
        "box_pool": _recorded_box,
        "masked_pool": _recorded_masks,
        "queue_sumexp": _recorded_queue,
        "window_attention": _recorded_windows,
    }
    candidates = [
        Candidate(_NAMES.get(name, name), partial(_trials, name, make, calls, setting))
        for name, make in makers.items()
        if any(call.name == name for call in calls)
    ]
    # Batch norm first and augmentation next: they save most, and time may run out.
    return [*candidates[:1], Candidate("augmentation", partial(_augmentations, setting)), *candidates[1:]]


_NAMES = {"queue_sumexp": "queue_contrast"}


def _trials(
    name: str,
    make: Callable[[OperatorCall, int, Setting], Trial],
    calls: Counter[OperatorCall],
    setting: Setting,
) -> Iterator[Trial]:
    # Odd shapes first: they take no time, and what they refuse needs no timing.
    yield from _odd(name, setting)
    for call, count in calls.items():
        if call.name == name:
            yield make(call, count, setting)


def _odd(name: str, setting: Setting) -> Iterator[Trial]:
    device, dtype = setting.runtime.device, setting.dtype
    if name == "batch_norm_act":
        for shape, groups in ODD_NORMS:
            for relu, residual in ((False, False), (True, False), (True, True)):
                yield norm_trial(shape, dtype, groups, relu, residual, True, 0, device)
    elif name == "box_pool":
        for shape in ODD_BOXES:
            yield box_trial(shape, dtype, True, 0, device)
    elif name == "masked_pool":
        for shape, groups_masks in ODD_MASKS:
            yield mask_trial(shape, groups_masks, dtype, dtype, 0, device)
    elif name == "window_attention":
        for windows in ODD_WINDOWS:
            yield from (window_trial(windows, dtype, masked, True, 0, device) for masked in (False, True))
    else:
        for rows, keys, width in ODD_QUEUES:
            yield queue_trial(rows, keys, width, dtype, 0.2, 0, device)


def exact_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which the definition is exact beside results in `dtype`."""
    return torch.float64 if dtype in (torch.float32, torch.float64) else torch.float32


def _noise(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, seed: int) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    values = torch.randn(shape, generator=generator, device=device)
    return values.to(dtype, memory_format=torch.channels_last if len(shape) == 4 else torch.contiguous_format)


def _differentiated(
    function: Callable[..., Tensor],
    inputs: dict[str, Tensor],
    cotangent: Tensor | None,
    result: str,
    parameters: dict[str, Tensor] | None = None,
) -> Results:
    """The result of a function of `inputs`, and, with a cotangent, its gradients for them and for `parameters`."""
    with torch.set_grad_enabled(cotangent is not None):
        leaves = {name: tensor.detach().requires_grad_(cotangent is not None) for name, tensor in inputs.items()}
        output = function(*leaves.values())
    if cotangent is None:
        return {result: output}
    wanted = {**leaves, **(parameters or {})}
    gradients = torch.autograd.grad(output, list(wanted.values()), cotangent.to(output.dtype))
    named = {f"the gradient of {name}": each for name, each in zip(wanted, gradients, strict=True)}
    return {result: output.detach(), **named}


def _fitting_images(shape: tuple[int, ...], groups: int, device: torch.device) -> int:
    """Images of a map that the exact definition has memory for: whole groups of equal size, all where possible."""
    # 128 bytes an element: about ten maps of float64 are alive at once.
    room = (torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 2**33) // 128
    size = shape[0] // groups
    while size > 2 and size * groups * shape[1] * shape[2] * shape[3] > room:
        size = -(-size // 2)
    return size * groups


def norm_trial(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    groups: int,
    relu: bool,
    residual: bool,
    gradient: bool,
    calls: float,
    device: torch.device,
) -> Trial:
    """Batch norm of a map by groups, as the networks call it, with running statistics."""
    whole, images = shape[0], _fitting_images(shape, groups, device)
    shape = (images, *shape[1:])
    inputs = {"x": _noise(shape, dtype, device, 2) + 0.5}
    if residual:
        inputs["the residual"] = _noise(shape, dtype, device, 3)
    cotangent = _noise(shape, dtype, device, 4) if gradient else None
    if relu and cotangent is not None:
        before = _norm(groups, shape, device, torch.float32)(inputs["x"].float())
        before = before + inputs["the residual"].float() if residual else before
        cotangent = torch.where(before.abs() > NEAR_ZERO, cotangent, 0)

    def call(mode: str, wide: torch.dtype | None) -> Call:
        # Made at the first call, and not within the time of the others.
        norm = cache(lambda: _norm(groups, shape, device, wide or torch.float32))

        def run() -> Results:
            with chosen("batch_norm_act", mode):
                given = {name: tensor.to(wide or dtype) for name, tensor in inputs.items()}
                return _run_norm(norm(), given, cotangent, relu)

        return run

    cut = f", {images} of {whole} images" if images < whole else ""
    what = f"{shape} {_short(dtype)}, {groups} groups, relu {relu}, residual {residual}{cut}"
    exact = call("auto", exact_dtype(dtype))
    return Trial(what, call("cuda", None), call("auto", None), exact, calls * whole / images, compare_largest)


def _run_norm(norm: GroupBatchNorm, inputs: dict[str, Tensor], cotangent: Tensor | None, relu: bool) -> Results:
    function: Callable[..., Tensor] = partial(norm_relu, norm) if relu else norm
    parameters: dict[str, Tensor] = {"the weight": norm.weight, "the bias": norm.bias}
    return {**_differentiated(function, inputs, cotangent, "y", parameters), **_running(norm)}


def _running(norm: GroupBatchNorm) -> Results:
    assert norm.running_mean is not None and norm.running_var is not None
    return {"the running mean": norm.running_mean.clone(), "the running variance": norm.running_var.clone()}


def _norm(groups: int, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> GroupBatchNorm:
    norm = GroupBatchNorm(shape[1])
    norm.group_size = shape[0] // groups
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 1.5, generator=generator)
        norm.bias.uniform_(-1, 1, generator=generator)
    return norm.to(device, dtype)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _recorded_norm(call: OperatorCall, count: int, setting: Setting) -> Trial:
    x, residual, _, _, groups, _, relu, gradient = call.arguments
    # Without a gradient to come the network keeps no mask; `keep_mask` says so.
    return norm_trial(
        x.size, x.dtype, groups, relu, residual is not None, gradient, count, torch.device(setting.device)
    )


def box_trial(shape: tuple[int, ...], dtype: torch.dtype, gradient: bool, calls: float, device: torch.device) -> Trial:
    """Box pooling of a map under boxes of all sizes, empty ones and ones over the edge included."""
    whole, images = shape[0], _fitting_images(shape, 1, device)
    inputs = {"the map": _noise((images, *shape[1:]), dtype, device, 2)}
    generator = torch.Generator().manual_seed(3)
    boxes = torch.randint(0, max(shape[2:]) + 2, (images, 4), generator=generator).to(device)
    cotangent = _noise((images, 3, shape[1]), dtype, device, 4) if gradient else None

    what = f"{(images, *shape[1:])} {_short(dtype)}"
    pool = partial(_pooled, "box_pool", lambda maps: box_pool(maps, boxes), inputs, cotangent)
    return _pooling_trial(what, pool, dtype, calls * whole / images)


def _recorded_box(call: OperatorCall, count: int, setting: Setting) -> Trial:
    maps: Shape = call.arguments[0]
    return box_trial(maps.size, maps.dtype, maps.gradient, count, torch.device(setting.device))


def mask_trial(
    shape: tuple[int, ...],
    groups_masks: tuple[int, int],
    dtype: torch.dtype,
    weight_dtype: torch.dtype,
    calls: float,
    device: torch.device,
    gradient: bool = True,
) -> Trial:
    """Mask pooling of a map under soft maps, one of which is zero everywhere."""
    whole, images = shape[0], _fitting_images(shape, 1, device)
    shape = (images, *shape[1:])
    weights = _noise((images, *groups_masks, *shape[2:]), weight_dtype, device, 3).abs()
    weights[0, 0, 0] = 0
    inputs = {"the features": _noise(shape, dtype, device, 2), "the weights": weights}
    cotangent = _noise((images, groups_masks[1], shape[1]), dtype, device, 4) if gradient else None

    what = f"{shape} {_short(dtype)}, {groups_masks[0]} groups of {groups_masks[1]} masks"
    pool = partial(_pooled, "masked_pool", masked_pool, inputs, cotangent)
    return _pooling_trial(what, pool, dtype, calls * whole / images)


def _pooled(
    operator: str,
    function: Callable[..., Tensor],
    inputs: dict[str, Tensor],
    cotangent: Tensor | None,
    mode: str,
    wide: torch.dtype | None,
) -> Results:
    """Means and gradients of a pooling operator in one form; `wide` is the dtype of its inputs, None for their own."""
    with chosen(operator, mode):
        given = {name: tensor.to(wide or tensor.dtype) for name, tensor in inputs.items()}
        return _differentiated(function, given, cotangent, "the means")


def _pooling_trial(what: str, pool: Callable[..., Results], dtype: torch.dtype, calls: float) -> Trial:
    """The kernel, its definition, and that in a wider dtype; `pool` takes the last two arguments of `_pooled`."""
    kernel, definition = partial(pool, "cuda", None), partial(pool, "definition", None)
    return Trial(what, kernel, definition, partial(pool, "definition", exact_dtype(dtype)), calls, compare_largest)


def _recorded_masks(call: OperatorCall, count: int, setting: Setting) -> Trial:
    features, weights = call.arguments
    gradient = features.gradient or weights.gradient
    device = torch.device(setting.device)
    return mask_trial(features.size, weights.size[1:3], features.dtype, weights.dtype, count, device, gradient=gradient)


def queue_trial(
    rows: int, keys: int, width: int, dtype: torch.dtype, temperature: float, calls: float, device: torch.device
) -> Trial:
    """The loss of rows against a queue: block by block, against one matrix of all logits."""
    unit = torch.nn.functional.normalize
    queue = unit(_noise((keys, width), torch.float32, device, 3), dim=1).to(dtype)
    inputs = {
        "the rows": unit(_noise((rows, width), torch.float32, device, 2), dim=1).to(dtype),
        "the positives": _noise((rows,), torch.float32, device, 5).clamp(-1, 1),
    }
    cotangent = _noise((rows,), torch.float32, device, 4)

    def call(mode: str, wide: torch.dtype | None) -> Call:
        def loss(given: Tensor, positives: Tensor) -> Tensor:
            if wide is not None:
                return queue_contrast_definition(given, queue.to(wide), positives, temperature)
            return queue_contrast(given, queue, positives, temperature)

        def run() -> Results:
            with chosen("queue_contrast", mode):
                given = {name: tensor.to(wide or tensor.dtype) for name, tensor in inputs.items()}
                return _differentiated(loss, given, cotangent, "the loss")

        return run

    exact = call("definition", exact_dtype(dtype))
    what = f"{rows} rows, {keys} keys of {width}, {_short(dtype)}"
    return Trial(what, call("cuda", None), call("definition", None), exact, calls, compare_largest)


def _recorded_queue(call: OperatorCall, count: int, setting: Setting) -> Trial:
    rows, queue, temperature = call.arguments
    return queue_trial(
        rows.size[0], queue.size[0], queue.size[1], rows.dtype, temperature, count, torch.device(setting.device)
    )


def window_trial(
    shape: tuple[int, ...], dtype: torch.dtype, masked: bool, gradient: bool, calls: float, device: torch.device
) -> Trial:
    """Attention within the windows of a map; `shape` is images, windows, heads, places and channels of a head."""
    whole, (windows, heads, places, width) = shape[0], shape[1:]
    # The definition holds the weights of all pairs of places, too.
    images = _fitting_images((whole, windows * heads, places, places + 4 * width), 1, device)
    shape = (images, *shape[1:])
    inputs = {f"the {name}": _noise(shape, dtype, device, 2 + seed) for seed, name in enumerate(("queries", "keys"))}
    inputs["the values"] = _noise(shape, dtype, device, 4)
    inputs["the bias"] = _noise((heads, places, places), torch.float32, device, 5)
    mask = _some_unseen(windows, places, device) if masked else None
    cotangent = _noise(shape, dtype, device, 6) if gradient else None

    def call(mode: str, wide: torch.dtype | None) -> Call:
        def run() -> Results:
            with chosen("window_attention", mode):
                given = {name: tensor.to(wide or tensor.dtype) for name, tensor in inputs.items()}
                attend = partial(window_attention, mask=mask if mask is None or wide is None else mask.to(wide))
                return _differentiated(attend, given, cotangent, "the result")

        return run

    what = f"{shape} {_short(dtype)}, {'masked' if masked else 'no mask'}"
    exact = call("definition", exact_dtype(dtype))
    usual = call("definition", None)
    return Trial(what, call("cuda", None), usual, exact, calls * whole / images, compare_largest)


def _some_unseen(windows: int, places: int, device: torch.device) -> Tensor:
    """A mask that hides some places of each window from others, and none from itself."""
    hidden = _noise((windows, places, places), torch.float32, device, 7) > 0
    return (hidden & ~torch.eye(places, dtype=torch.bool, device=device)) * -100.0


def _recorded_windows(call: OperatorCall, count: int, setting: Setting) -> Trial:
    query, *_, mask = call.arguments
    return window_trial(query.size, query.dtype, mask is not None, query.gradient, count, torch.device(setting.device))


def _augmentations(setting: Setting) -> Iterator[Trial]:
    recipe = setting.config.recipe
    views = range(augment.get_profile(recipe.augment.profile).num_views)
    for shape in ODD_VIEWS:
        yield from (augment_trial(*shape, view, 0, setting) for view in views)
    # So many that a GPU is full; the definition in float64 has no memory for any number.
    images = min(recipe.global_batch, AUGMENTED)
    for view in views:
        yield augment_trial(images, recipe.image_size, view, recipe.global_batch / images, setting)


def augment_trial(images: int, size: int, view: int, calls: float, setting: Setting) -> Trial:
    """One view of `images` images as the recipe's profile augments it."""
    device, recipe = setting.runtime.device, setting.config.recipe
    index = np.arange(images)
    generator = torch.Generator(device).manual_seed(2)
    crops = torch.randint(0, 256, (images, size, size, 3), generator=generator, device=device, dtype=torch.uint8)
    crops = crops.permute(0, 3, 1, 2)

    def call(implementation: str, dtype: torch.dtype) -> Call:
        def run() -> Results:
            with torch.no_grad():
                profile, seed = recipe.augment.profile, setting.config.run.seed
                view_of = partial(augment.augment_view, crops, profile, seed, 0, index, view)
                return {"the view": view_of(dtype, implementation, CudaModule)}

        return run

    what = f"view {view + 1} of {images} images of {size} px, {_short(setting.dtype)}"
    usual, exact = call("reference", setting.dtype), call("reference", torch.float64)
    return Trial(what, call("kernel", setting.dtype), usual, exact, calls, compare_mean)
