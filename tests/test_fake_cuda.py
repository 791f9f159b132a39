"""The CUDA paths on tensors that only claim to be on a GPU: one device throughout, no wait of the host in a step."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from models.methods import METHODS
from models.methods.base import Method, StepInputs
from models.ops.batch_norm_act import batch_norm_act_backward_definition, batch_norm_act_definition
from models.ops.box_pool import box_pool_backward_definition, box_pool_definition
from models.ops.masked_pool import masked_pool_backward_definition, masked_pool_definition
from models.ops.queue_contrast import queue_sumexp_backward_definition, queue_sumexp_definition
from pipeline import augment
from pipeline.augmenter import BatchAugmenter
from pipeline.cuts import Cuts
from pipeline.epoch import EpochPipeline
from pipeline.interface import Batch, PipelineConfig, ViewSpec
from pipeline.prefetch import deliver_batches
from tests.fake_cuda import DEVICE, HostWaits, fake_gpu, on_gpu
from tests.method_cases import SWIN_METHODS, small_backbones
from tests.runs import last_wins
from train.build import build_method, build_state, feature_grid
from train.config import Config, OptimConfig
from train.eval.detection.losses import mask_loss
from train.eval.linear import LINEAR_RECIPES, LinearHeads, train_heads
from train.eval.segmentation.augment import Crop
from train.eval.segmentation.feed import TrainBatch
from train.inputs import InputBuilder, InputStream, finished_views
from train.loop import take_step
from train.measure.features import _mean_and_scale, normalise
from train.measure.knn import knn_predict
from train.optim import build_optimizer
from train.resolve import resolve
from train.runtime import Runtime
from train.state import TrainState, optimizer_tensors, restore_optimizer

BATCH, SIZE = 8, 64
INDEX = torch.arange(BATCH)  # of a batch; made outside the mode, because its values are read on the host
IMAGE_SIZES = torch.full((BATCH, 2), 80)
CPU = Runtime(0, 1, torch.device("cpu"), torch.float32, False)
SIZES = {
    "queue_size": 40,
    "hidden_dim": 24,
    "dim": 16,
    "c": 16,
    "predictor_hidden_dim": 12,
    "n_blocks": 2,
    "t_bn_group_size": 4,
    "prototypes": 10,
    "small_crops": 2,
    "small_size": 32,
    "queue_start_epoch": 0,
}


def settings(method: str, *flags: str) -> Config:
    """The method's recipe at toy sizes."""
    fields = {field.name for field in dataclasses.fields(METHODS[method].Config)}
    sizes = [f"--{name.replace('_', '-')}={value}" for name, value in SIZES.items() if name in fields]
    small = f"--image-size {SIZE} --global-batch {BATCH} --bn.group-size 4 --data 64 --loader synthetic".split()
    config = resolve(last_wins(["--method", method, *small, *sizes, *flags]))
    arch = "swin-narrow" if method in SWIN_METHODS else "resnet-narrow"
    return dataclasses.replace(config, recipe=dataclasses.replace(config.recipe, arch=arch))


def built(config: Config) -> Method:
    with small_backbones():
        return build_method(config, CPU)


def uint8_batch(specs: Sequence[ViewSpec] = (ViewSpec("view1", SIZE), ViewSpec("view2", SIZE))) -> Batch:
    views = {
        spec.name: torch.empty((BATCH, spec.size, spec.size, 3), dtype=torch.uint8, device=DEVICE).permute(0, 3, 1, 2)
        for spec in specs
    }
    return Batch(views, INDEX, INDEX)


def one_view(batch: Batch) -> Batch:
    return dataclasses.replace(batch, views={"view1": batch.views["view1"]})


def everything(state: TrainState, inputs: list[StepInputs]) -> dict[str, Tensor]:
    """All tensors of a run after its steps, by name, but the key permutations, which belong on the host."""
    named = {**dict(state.method.named_parameters()), **dict(state.method.named_buffers())}
    named |= {f"{name}.grad": p.grad for name, p in state.method.named_parameters() if p.grad is not None}
    for number, held in enumerate(state.optimizer.state.values()):
        named |= {f"optimizer {number} {name}": value for name, value in held.items()}
    for each in inputs:
        named |= {"view1": each.view1, "view2": each.view2, **each.mixed}
        named |= {f"small view {number}": view for number, view in enumerate(each.small_views)}
        named |= {f"box {name}": box for name, box in each.box_cells.items()}
        named |= {f"partner {name}": partner for name, partner in each.partner.items()}
        named |= {f"crop box {name}": box for name, box in each.crop_boxes.items()}
    return {**named, **state.sums, "non_finite": state.non_finite}


def one_step(config: Config, dtype: torch.dtype) -> dict[str, Tensor]:
    """Augmentation, forward, backward, optimizer, EMA, queue and sums of a step; all tensors there are then."""
    method = built(config)
    with fake_gpu() as watch:
        on_gpu(method)
        runtime = Runtime(0, 1, DEVICE, dtype, False)
        state = build_state(config, runtime, method)
        augment._normalisation.cache_clear()
        augment._normalisation(DEVICE, torch.float32)  # made once in a run; the host may wait for that
        pipeline_config = finished_views(PipelineConfig("", (), BATCH, device=DEVICE), config, runtime)
        builder = InputBuilder(config, method, runtime, feature_grid(method, SIZE))
        job: Any = SimpleNamespace(
            config=config, runtime=runtime, wrapped=method, graphed=None, total_steps=10, steps_per_epoch=5
        )
        with watch:
            batch = BatchAugmenter(pipeline_config)(uint8_batch(pipeline_config.views), 0)
            batch.cuts = Cuts(pipeline_config, 0, INDEX.numpy(), IMAGE_SIZES.numpy())
            inputs = builder.build(batch, 0)
            assert inputs[0].view1.dtype == dtype
            take_step(job, state, 0, inputs)
        augment._normalisation.cache_clear()  # what it holds now is of no use to other tests
        return everything(state, inputs)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_stays_on_the_device_and_never_waits(method: str) -> None:
    held = one_step(settings(method), torch.bfloat16)
    elsewhere = {name: str(tensor.device) for name, tensor in held.items() if tensor.device != DEVICE}
    assert not elsewhere
    assert any(name.startswith("optimizer") for name in held) and "loss" in held
    assert ("crop box view2" in held) == METHODS[method].reads_crop_boxes


FLAGS = {
    "regioncl-m": ("--region.pairing-scope=global", "--region.shared-forward=true", "--region.sampling=official"),
    "lewel-m": ("--align=random", "--optim.clip-grad-norm=1"),
    "care": ("--pos=relative",),
    "regioncl-s": ("--micro-batch=4",),
    "swav": ("--queue-size=8", "--queue-start-epoch=0"),
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_loss_scale_and_full_precision_stay_on_the_device(dtype: torch.dtype) -> None:
    held = one_step(settings("moco-v2"), dtype)
    assert {tensor.device for tensor in held.values()} == {DEVICE}


@pytest.mark.parametrize("method", FLAGS)
def test_rarer_settings_stay_on_the_device(method: str) -> None:
    held = one_step(settings(method, *FLAGS[method]), torch.bfloat16)
    assert {tensor.device for tensor in held.values()} == {DEVICE}


def test_inputs_come_over_side_streams_and_every_stream_is_told() -> None:
    """Copy ahead, augmentation ahead, and the record for the allocator, with streams that only keep a record."""
    config = settings("regioncl-m")
    method = built(config)
    arrays = [np.zeros((BATCH, SIZE, SIZE, 3), dtype=np.uint8) for _ in range(2)]
    runtime = Runtime(0, 1, DEVICE, torch.bfloat16, False)
    pipeline_config = finished_views(PipelineConfig("", (), BATCH, device=DEVICE), config, runtime)

    class Pages(EpochPipeline):
        """Three batches from page-locked arrays, as a loader's."""

        def __init__(self) -> None:
            super().__init__(pipeline_config, np.zeros(3 * BATCH, dtype=np.int64), "")

        def deliver(self, epoch: int, batches: list[np.ndarray]) -> Any:
            assert (epoch, len(batches)) == (0, 3)
            ready = ((np.arange(BATCH), np.full((BATCH, 2), 80), arrays) for _ in batches)
            for batch in deliver_batches(self.config, self.labels, ready):
                yield dataclasses.replace(batch, index=INDEX, sizes=IMAGE_SIZES)

    with fake_gpu() as watch:
        augment._normalisation.cache_clear()
        augment._normalisation(DEVICE, torch.float32)
        for array in arrays:
            watch.pin(torch.from_numpy(array))
        builder = InputBuilder(config, method, runtime, 2)
        stream = InputStream(builder, Pages())
        steps = list(stream.epoch(0, 0, 0))
        augment._normalisation.cache_clear()
    assert [step for step, _ in steps] == [0, 1, 2]
    consumer = torch.Size([BATCH, 3, SIZE, SIZE])
    # Each of the six views: from the copy's stream to the one that augments and mixes; then what the step gets.
    told = [shape for shape, _ in watch.streams]
    assert told.count(consumer) == 3 * (2 + 2 + 1) and told.count(torch.Size([BATCH, 4])) == 3


def test_the_next_batch_is_prepared_after_the_step_is_queued() -> None:
    """While the host prepares a batch the device must have a step to work at."""
    order: list[str] = []

    class Source:
        def set_epoch(self, epoch: int, first: int) -> None: ...

        def stats(self) -> Any:
            return SimpleNamespace(wait_s=0.0)

        def __iter__(self) -> Any:
            for number in range(3):
                order.append(f"batch {number}")
                yield number

    made = [StepInputs(torch.empty(2, 3, 8, 8), torch.empty(2, 3, 8, 8))]
    builder: Any = SimpleNamespace(runtime=Runtime(0, 1, DEVICE, torch.float32, False), build=lambda *_: made)
    with fake_gpu():
        for step, _ in InputStream(builder, Source()).epoch(0, 0, 0):  # type: ignore[arg-type]
            order.append(f"step {step}")
    assert order == ["batch 0", "step 0", "batch 1", "step 1", "batch 2", "step 2"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_definitions_of_our_operators_stay_on_the_device(dtype: torch.dtype) -> None:
    """The mode puts shape rules in their place, so they are called by themselves."""
    with fake_gpu() as watch, watch:
        x = torch.empty(8, 16, 4, 4, dtype=dtype, device=DEVICE)
        boxes = torch.empty(8, 4, dtype=torch.int64, device=DEVICE)
        pooled = box_pool_definition(x, boxes)
        made = [pooled, box_pool_backward_definition(pooled, x, boxes)]
        maps = torch.empty(8, 2, 3, 4, 4, dtype=dtype, device=DEVICE)
        under = masked_pool_definition(x, maps)
        made += [under, *masked_pool_backward_definition(under, x, maps, True, True)]
        rows, queue = (torch.empty(count, 16, dtype=dtype, device=DEVICE) for count in (8, 40))
        total, maximum = queue_sumexp_definition(rows, queue, 0.2)
        made += [total, maximum, queue_sumexp_backward_definition(total, rows, queue, maximum, 0.2)]
        scale = torch.empty(16, device=DEVICE)
        y, mean, variance, mask = batch_norm_act_definition(x, x, scale, scale, 2, 1e-5, True, True)
        made += [y, mean, variance, mask]
        made += batch_norm_act_backward_definition(y, x, scale, scale, mean, variance, mask, 1e-5, True, True)
        assert {tensor.device for tensor in made} == {DEVICE}


@pytest.mark.parametrize("kind", ["sgd", "adamw", "lars"])
def test_a_restored_optimizer_has_its_state_on_the_device(kind: str) -> None:
    """A fused step reads the step count where it runs; how steps are launched is this run's business."""
    config = OptimConfig(kind=kind)  # type: ignore[arg-type]
    module = nn.Linear(3, 2)
    saved = build_optimizer(module, config, BATCH)
    module(torch.ones(1, 3)).sum().backward()
    saved.step()
    tensors, plain = optimizer_tensors(saved)
    with fake_gpu() as watch:
        on_gpu(module)
        optimizer = build_optimizer(module, config, BATCH)
        # A fused first step that is skipped must not leave its buffers as the allocator gave them.
        assert kind != "sgd" or {name for held in optimizer.state.values() for name in held} == {"momentum_buffer"}
        launch = [(group.get("fused"), group.get("foreach")) for group in optimizer.param_groups]
        restore_optimizer(optimizer, tensors, plain)
        held = [value for entries in optimizer.state.values() for value in entries.values()]
        assert held and {value.device for value in held} == {DEVICE}
        assert [(group.get("fused"), group.get("foreach")) for group in optimizer.param_groups] == launch
        for parameter in module.parameters():
            parameter.grad = torch.empty_like(parameter)
        with watch:
            optimizer.step()


@pytest.mark.parametrize("recipe", ["care", "simsiam"])
def test_evaluation_computes_on_the_device(recipe: str) -> None:
    labels = torch.arange(20) % 4
    count = int(labels.max()) + 1
    with fake_gpu() as watch:
        images = normalise(torch.empty(20, 3, SIZE, SIZE, dtype=torch.uint8, device=DEVICE))
        assert images.device == DEVICE
        bank, queries = (torch.empty(rows, 6, device=DEVICE) for rows in (20, 8))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("train.measure.knn._check", lambda *_: None)  # it looks at the labels' values
            weighted, majority = knn_predict(bank, labels, queries, [1, 3], num_classes=count)[3]
        assert weighted.shape == majority.shape == (8,)
        heads = LinearHeads(6, count, 2, LINEAR_RECIPES[recipe].batch_norm, seed=0)
        on_gpu(heads)
        on_device = torch.empty(20, dtype=torch.int64, device=DEVICE)
        with watch:
            train_heads(heads, lambda _: [(bank, on_device)], 1, 1, LINEAR_RECIPES[recipe], [0.1, 1.0])
        assert all(p.grad is not None and p.grad.device == DEVICE for p in heads.parameters())


def test_images_of_an_evaluation_are_normalised_without_a_wait() -> None:
    with fake_gpu() as watch:
        _mean_and_scale.cache_clear()
        images = torch.empty(20, 3, SIZE, SIZE, dtype=torch.uint8, device=DEVICE)
        normalise(images)
        with watch:
            assert normalise(images).device == DEVICE
        _mean_and_scale.cache_clear()
        # The watch speaks where each batch makes its constants: without this, silence would say nothing.
        with watch, pytest.raises(HostWaits):
            normalise(images)
    _mean_and_scale.cache_clear()


def test_the_number_of_terms_of_a_detection_loss_is_made_on_the_device() -> None:
    with fake_gpu() as watch, watch:
        logits = torch.empty(6, 3, 28, 28, device=DEVICE)
        labels = torch.empty(6, dtype=torch.int64, device=DEVICE)
        assert mask_loss(logits, labels, torch.empty(6, 28, 28, device=DEVICE)).device == DEVICE


def test_batches_of_the_protocols_are_made_without_a_wait() -> None:
    side = 160  # large enough that a copy from ordinary memory would wait
    numbers = np.arange(BATCH)
    crop = Crop(np.zeros((side, side, 3), np.uint8), np.zeros((side, side), np.uint8), (side, side - 8))
    with fake_gpu() as watch:
        augment._normalisation.cache_clear()
        augment._normalisation(DEVICE, torch.float32)
        with watch:
            pixels, classes = TrainBatch([crop] * BATCH, numbers, numbers).tensors(0, DEVICE)
            probe = PipelineConfig("", (), BATCH, device=DEVICE, augment="linear")
            probed = BatchAugmenter(probe)(one_view(uint8_batch()), 0).views["view1"]
        augment._normalisation.cache_clear()
        assert {pixels.device, classes.device, probed.device} == {DEVICE}


PLANTED = {
    "two devices": lambda x: x + torch.ones(4),
    "a value on the host": lambda x: float(x.sum()),
    "a decision on the host": lambda x: 1 if (x > 0).any() else 0,
    "a shape that depends on values": lambda x: x[x > 0],
    "a copy to the host": lambda x: x.cpu(),
    "a constant that is copied": lambda x: x + torch.tensor([1.0, 2.0, 3.0, 4.0], device=x.device),
    "a copy that waits": lambda x: x + torch.ones(4).to(x.device),
    "a generator of the host": lambda x: torch.rand(4, device=x.device, generator=torch.Generator()),
}


@pytest.mark.parametrize("fault", PLANTED)
def test_planted_faults_are_noticed(fault: str) -> None:
    with fake_gpu() as watch, watch:
        x = torch.empty(4, device=DEVICE)
        with pytest.raises((RuntimeError, AssertionError)):
            PLANTED[fault](x)
