"""Small backbones, small configurations and hand-made step inputs on which every method can be tested in a moment."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from models.methods import METHODS
from models.methods.base import Method, StepInputs
from models.resnet import BACKBONES, BasicBlock, ResNetTrunk, initialise_convolutions
from models.swin import SwinTrunk
from models.vit import VitTrunk

SIZE, BATCH, GROUP = 64, 8, 4  # pixels; images of a global batch; images of a batch-norm group
SMALL = {
    "queue_size": 40,
    "hidden_dim": 24,
    "dim": 16,
    "c": 16,
    "predictor_hidden_dim": 12,
    "n_blocks": 2,
    "t_bn_group_size": GROUP,
    "prototypes": 10,
    "small_crops": 2,
    "small_size": 32,
    "queue_start_epoch": 0,
}
OWN_SMALL = {"swav": {"queue_size": 2 * BATCH}}  # full after two steps, so that short runs use it
SWIN_METHODS = ("moby", "regioncl-moby")


class NarrowResNet(ResNetTrunk):
    """A ResNet of one narrow block a stage: every kind of layer, in milliseconds."""

    def __init__(self, conv_init: Any = "fan_out", zero_init_residual: bool = False) -> None:
        nn.Module.__init__(self)
        self._norm_layer, self.inplanes, self.dilation, self.groups, self.base_width = nn.BatchNorm2d, 8, 1, 1, 64
        self.conv1 = nn.Conv2d(3, 8, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1, self.relu = nn.BatchNorm2d(8), nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        self.layer1 = self._make_layer(BasicBlock, 8, 1)
        self.layer2 = self._make_layer(BasicBlock, 16, 1, stride=2)
        self.layer3 = self._make_layer(BasicBlock, 16, 1, stride=2)
        self.layer4 = self._make_layer(BasicBlock, 32, 1, stride=2)
        self.feature_dim, self.stage_dims = 32, (16, 32)
        initialise_convolutions(self, conv_init)
        if zero_init_residual:
            for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
                nn.init.zeros_(stage[0].bn2.weight)


def _narrow_swin(conv_init: Any = "torch", zero_init_residual: bool = False) -> SwinTrunk:
    return SwinTrunk(embed_dim=8, depths=(1, 1, 2, 1), num_heads=(1, 1, 2, 2))


def _narrow_vit(conv_init: Any = "torch", zero_init_residual: bool = False) -> VitTrunk:
    return VitTrunk(dim=16, depth=2, heads=2)


@contextmanager
def small_backbones() -> Iterator[None]:
    """Within the block `BACKBONES` knows "resnet-narrow", "swin-narrow" and "vit-narrow"."""
    added = {"resnet-narrow": NarrowResNet, "swin-narrow": _narrow_swin, "vit-narrow": _narrow_vit}
    BACKBONES.update(added)  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name in added:
            del BACKBONES[name]


def small_config(name: str, **changes: Any) -> Any:
    """The method's default configuration at toy sizes; `changes` may set any field, `region_<field>` a nested one."""
    config = METHODS[name].Config()
    fields = {field.name for field in dataclasses.fields(config)}
    region = {key.removeprefix("region_"): changes.pop(key) for key in list(changes) if key.startswith("region_")}
    if region:
        changes["region"] = dataclasses.replace(config.region, **region)
    small = {key: SMALL[key] for key in fields & set(SMALL)} | OWN_SMALL.get(name, {})
    return dataclasses.replace(config, **small | changes)


def build(name: str, config: Any = None, seed: int = 0, arch: str = "", **options: Any) -> Method:
    """A small method with weights of its own seed; batch-norm mode is the method's default unless given."""
    torch.manual_seed(seed)
    arch = arch or ("swin-narrow" if name in SWIN_METHODS else "resnet-narrow")
    options = {"bn_group_size": GROUP, **options}
    with small_backbones():
        return METHODS[name](config or small_config(name), arch=arch, image_size=SIZE, **options)  # type: ignore[call-arg]


def randomise_norms(method: nn.Module, seed: int = 1) -> None:
    """Give every batch norm random gamma and beta, so that zero-initialised branches take part."""
    generator = torch.Generator().manual_seed(seed)
    for module in method.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine:
            module.weight.data = 1 + 0.3 * torch.randn(module.weight.shape, generator=generator).to(module.weight)
            if module.bias is not None:
                module.bias.data = 0.3 * torch.randn(module.bias.shape, generator=generator).to(module.bias)


def _views(seed: int, step: int, count: int, size: int) -> tuple[Tensor, Tensor]:
    """Two noisy views of smooth random images; which images come is a function of (seed, step)."""
    generator = torch.Generator().manual_seed(1000 * seed + step)
    coarse = torch.randn(count, 3, 4, 4, generator=generator)
    image = nn.functional.interpolate(coarse, size=(size, size), mode="bilinear")
    noise = 0.3 * torch.randn(2, count, 3, size, size, generator=generator)
    return image + noise[0], image.flip(3) + noise[1]


def _small_views(seed: int, step: int, count: int, crops: int, size: int) -> tuple[Tensor, ...]:
    """Noisy small views of the images of `_views`."""
    coarse = torch.randn(count, 3, 4, 4, generator=torch.Generator().manual_seed(1000 * seed + step))
    image = nn.functional.interpolate(coarse, size=(size, size), mode="bilinear")
    noise = torch.randn(crops, count, 3, size, size, generator=torch.Generator().manual_seed(1000 * seed + step + 500))
    return tuple(image + 0.3 * each for each in noise)


def _crop_boxes(step: int, count: int) -> dict[str, Tensor]:
    """Boxes (count, 6) of both views in images of 100 x 80 px: the last image's do not meet, some views are flipped."""
    generator = torch.Generator().manual_seed(90 + step)
    image = torch.tensor([100.0, 80.0])
    boxes = {}
    for number, name in enumerate(("view1", "view2")):
        size = (image * (0.5 + 0.4 * torch.rand(count, 2, generator=generator))).round()
        start = ((image - size) * torch.rand(count, 2, generator=generator)).round()
        size[-1], start[-1] = torch.tensor([40.0, 30.0]), torch.tensor([55.0, 5.0]) * number
        edges = torch.cat([start, start + size, image.expand(count, 2)], dim=1)
        flipped = torch.arange(count) % 4 == number
        edges[flipped] = edges[flipped][:, [2, 1, 0, 3, 4, 5]]
        boxes[name] = edges
    return boxes


def composite(view: Tensor, partner: Tensor, box: tuple[int, int, int, int], stride: int = 32) -> Tensor:
    """Canvas of image i with the box of image partner[i] pasted in, pixel by pixel."""
    top, left, height, width = (stride * cells for cells in box)
    mixed = view.clone()
    for host, guest in enumerate(partner.tolist()):
        box_of = (slice(None), slice(top, top + height), slice(left, left + width))
        mixed[host][box_of] = view[guest][box_of]
    return mixed


def partners(scope: str, count: int = BATCH, group: int = GROUP) -> Tensor:
    """A pairing that is no involution: cycles within groups, or one cycle over the global batch."""
    place = torch.arange(count)
    if scope == "global":
        return (place + 3) % count
    return place // group * group + (place % group + 1) % group


def make_inputs(
    method: Method,
    step: int,
    rank: int = 0,
    world_size: int = 1,
    seed: int = 0,
    batch: int = BATCH,
    group: int = GROUP,
) -> StepInputs:
    """One rank's inputs of a step, the same global batch for any number of ranks."""
    views = dict(zip(("view1", "view2"), _views(seed, step, batch, SIZE), strict=True))
    local = batch // world_size
    mine = slice(rank * local, (rank + 1) * local)
    generator = torch.Generator().manual_seed(7 + step)
    config: Any = method.config
    small = _small_views(seed, step, batch, getattr(config, "small_crops", 0), getattr(config, "small_size", SIZE))
    inputs = StepInputs(
        view1=views["view1"][mine],
        view2=views["view2"][mine],
        seed=seed,
        step=step,
        rank=rank,
        world_size=world_size,
        small_views=tuple(view[mine] for view in small),
        key_permutation=tuple(torch.randperm(batch, generator=generator) for _ in range(method.key_directions)),
    )
    if method.reads_crop_boxes:
        inputs.crop_boxes = {name: boxes[mine] for name, boxes in _crop_boxes(step, batch).items()}
    for direction, name in enumerate(("view1", "view2")):
        if name in method.mixed_views:
            scope = method.config.region.pairing_scope  # type: ignore[union-attr]
            partner = partners(scope, batch, group)
            box = ((step + direction) % 2, step // 2 % 2, 1, 1)
            inputs.mixed[name] = composite(views[name], partner, box)[mine]
            inputs.box_cells[name] = torch.tensor([box] * local)
            inputs.partner[name] = partner[mine] - (0 if scope == "global" else rank * local)
    return inputs


def to_double(inputs: StepInputs) -> StepInputs:
    """The same inputs in float64."""
    mixed = {name: image.double() for name, image in inputs.mixed.items()}
    small = tuple(view.double() for view in inputs.small_views)
    boxes = {name: box.double() for name, box in inputs.crop_boxes.items()}
    return dataclasses.replace(
        inputs,
        view1=inputs.view1.double(),
        view2=inputs.view2.double(),
        mixed=mixed,
        small_views=small,
        crop_boxes=boxes,
    )


def online_parameters(method: Method) -> dict[str, nn.Parameter]:
    """Parameters that learn by gradient."""
    return {name: p for name, p in method.named_parameters() if p.requires_grad}


def make_optimizer(method: Method) -> torch.optim.SGD:
    return torch.optim.SGD(online_parameters(method).values(), lr=0.05, momentum=0.9, weight_decay=1e-4)


def take_step(method: Method, module: nn.Module, optimizer: torch.optim.Optimizer, inputs: StepInputs) -> Tensor:
    """One training step through `module` (the method or its DDP wrapper); its loss."""
    output = module(inputs)
    optimizer.zero_grad()
    output.loss.backward()
    optimizer.step()
    method.after_step(output, 0.9)
    return output.loss.detach()
