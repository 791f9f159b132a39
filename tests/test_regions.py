from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pipeline import regions
from pipeline.regions import Region, RegionSampler, make_mixed, rank_partner, region_bounds
from train.errors import UserMistake
from train.inputs import InputBuilder, batch_per_device, check_batch, pairing_group_size
from train.recipes import RECIPES
from train.resolve import resolve

STEPS = 6000


def draw_region(sampling: str, step: int, grid: int = 7, direction: int = 0, rank: int = 0, **settings) -> Region:
    return RegionSampler(grid, 32, sampling=sampling, **settings).region(step, direction, rank)


def draw_pairs(
    pairing: str, scope: str, seed: int, step: int, direction: int, global_batch: int, group_size: int
) -> np.ndarray:
    drawn = RegionSampler(7, 32, seed, pairing=pairing, scope=scope)
    return drawn.partners(step, direction, global_batch, group_size)


def enumerate_official(cells: int) -> dict[tuple[int, int], int]:
    """(first pixel, first cell) -> how many of the 224 pixel draws lead to it."""
    words = ((np.arange(224, dtype=np.uint64) << np.uint64(32)) // np.uint64(224) + np.uint64(1)).astype(np.uint32)
    drawn = [int(w) * 224 >> 32 for w in words]
    assert drawn == list(range(224))
    return dict(Counter(regions._official_axis(word, cells, 7, 32) for word in words))


def test_official_sampling_gives_the_specifications_table():
    assert enumerate_official(3) == {(0, 0): 17, (32, 1): 31, (64, 2): 33, (96, 3): 31, (127, 3): 112}
    assert enumerate_official(4) == {(0, 0): 17, (32, 1): 31, (64, 2): 33, (95, 2): 143}
    assert enumerate_official(5) == {(0, 0): 17, (32, 1): 31, (63, 1): 176}


def test_official_draws_follow_that_table():
    counts: dict[int, Counter] = {3: Counter(), 4: Counter(), 5: Counter()}
    unaligned = 0
    for step in range(STEPS):
        region = draw_region("official", step)
        top, left, height, width = region.box_cells
        counts[height][region.top_px] += 1
        counts[width][region.left_px] += 1
        assert region.top_px + region.height_px <= 223 and region.left_px + region.width_px <= 223
        assert top + height <= 6 and left + width <= 6  # the last cell is never pooled as paste
        unaligned += region.top_px % 32 != 0 or region.left_px % 32 != 0
    assert abs(unaligned / STEPS - 0.87) < 0.02
    for cells, expected in ((3, {127: 112, 0: 17}), (4, {95: 143, 0: 17}), (5, {63: 176, 0: 17})):
        total = counts[cells].total()
        assert abs(total - 2 * STEPS / 3) < 5 * (2 * STEPS * 2 / 9) ** 0.5
        for start, share in expected.items():
            p = share / 224
            assert abs(counts[cells][start] / total - p) < 5 * (p * (1 - p) / total) ** 0.5


def test_paper_draws_are_aligned_and_uniform_over_the_valid_boxes():
    rows = Counter()
    columns = Counter()
    for step in range(STEPS):
        region = draw_region("paper", step, seed=1)
        top, left, height, width = region.box_cells
        assert (region.top_px, region.left_px) == (32 * top, 32 * left)
        assert (region.height_px, region.width_px) == (32 * height, 32 * width)
        rows[height, top] += 1
        columns[width, left] += 1
    for axis in (rows, columns):
        assert set(axis) == {(c, o) for c in (3, 4, 5) for o in range(7 - c + 1)}
        for (cells, _), count in axis.items():
            p = 1 / 3 / (8 - cells)
            assert abs(count / STEPS - p) < 5 * (p * (1 - p) / STEPS) ** 0.5


def test_width_is_drawn_before_height_and_both_are_independent():
    pairs = Counter(draw_region("paper", step, seed=2).box_cells[2:] for step in range(STEPS))
    assert len(pairs) == 9
    assert max(abs(count / STEPS - 1 / 9) for count in pairs.values()) < 0.021
    words = regions.philox(2, 5, 0, 0, regions.SLOT_REGION)
    height, width = draw_region("paper", 5, seed=2).box_cells[2:]
    assert (width, height) == tuple(3 + (int(word) * 3 >> 32) for word in words[:2])


def test_bounds_on_other_grids():
    assert [region_bounds(n) for n in (2, 3, 4, 5, 6, 7, 10, 14)] == [
        (1, 1),
        (1, 2),
        (2, 3),
        (2, 4),
        (3, 4),
        (3, 5),
        (4, 7),
        (6, 10),
    ]
    with pytest.raises(ValueError, match="not 1 x 1"):
        region_bounds(1)
    for grid in (2, 3, 5, 10):
        for sampling in regions.SAMPLINGS:
            for step in range(50):
                region = draw_region(sampling, step, grid)
                top, left, height, width = region.box_cells
                assert min(top, left, region.top_px, region.left_px) >= 0
                assert top + height <= grid and left + width <= grid and height < grid and width < grid
    assert draw_region("paper", 0, lower=2, upper=2).box_cells[2:] == (2, 2)
    with pytest.raises(ValueError, match="lower <= upper <= 6"):
        draw_region("paper", 0, lower=3, upper=7)
    with pytest.raises(ValueError, match="choose one of paper, official"):
        draw_region("uniform", 0)


def test_region_is_a_function_of_seed_step_direction_and_optionally_rank():
    def series(**changed: int) -> list[Region]:
        return [draw_region("paper", s, **changed) for s in range(40)]

    assert series() == series()
    assert series() != series(seed=1)
    assert series() != series(direction=1)
    assert series(rank=0) == series(rank=1)  # the ranks share one region
    assert series(rank=0, per_rank=True) != series(rank=1, per_rank=True)
    assert len(set(series())) > 20


@pytest.mark.parametrize("pairing", regions.PAIRINGS)
@pytest.mark.parametrize("scope", regions.SCOPES)
def test_pairing_is_a_permutation_without_fixed_points_and_its_inverse(pairing, scope):
    partner = draw_pairs(pairing, scope, 3, 7, 0, 24, 6)
    inverse = np.argsort(partner)
    everyone = np.arange(24)
    assert partner.dtype == np.int64
    assert np.array_equal(np.sort(partner), everyone)
    assert np.array_equal(partner[inverse], everyone) and np.array_equal(inverse[partner], everyone)
    assert (partner != everyone).all()
    if scope == "group":
        assert np.array_equal(partner // 6, everyone // 6)
    else:
        assert not np.array_equal(partner // 6, everyone // 6)


def test_pairings_by_hand():
    assert draw_pairs("flip", "group", 0, 0, 0, 8, 4).tolist() == [3, 2, 1, 0, 7, 6, 5, 4]
    assert draw_pairs("flip", "global", 0, 0, 0, 4, 2).tolist() == [3, 2, 1, 0]
    partner = draw_pairs("roll", "group", 0, 0, 0, 6, 3)
    assert partner.tolist() == [1, 2, 0, 4, 5, 3]  # two 3-cycles: not its own inverse
    assert np.argsort(partner).tolist() == [2, 0, 1, 5, 3, 4]
    draws = [draw_pairs("randperm", "group", 0, step, 0, 12, 6).tolist() for step in range(8)]
    assert len({tuple(d) for d in draws}) == 8
    assert draws[3] == draw_pairs("randperm", "group", 0, 3, 0, 12, 6).tolist()
    assert draws[3] != draw_pairs("randperm", "group", 0, 3, 1, 12, 6).tolist()


def test_random_pairing_is_uniform_over_partners():
    counts = np.zeros((5, 5))
    for step in range(2000):
        counts[np.arange(5), draw_pairs("randperm", "global", 0, step, 0, 5, 1)] += 1
    off_diagonal = counts[~np.eye(5, dtype=bool)]
    assert np.abs(off_diagonal / 2000 - 0.25).max() < 0.05


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("flip", "group", 0, 0, 0, 9, 3), 'even group or pairing "roll"'),
        (("roll", "group", 0, 0, 0, 9, 4), "choose a size that divides it"),
        (("roll", "group", 0, 0, 0, 4, 1), "at least 2 images"),
        (("reverse", "group", 0, 0, 0, 4, 2), "flip, roll, randperm"),
        (("flip", "world", 0, 0, 0, 4, 2), "group, global"),
    ],
)
def test_pairings_that_make_no_sense_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        draw_pairs(*arguments)


def numbered(batch: int, side: int) -> torch.Tensor:
    """Every pixel of image i holds i, so that a mixed view shows whose pixels it holds."""
    return torch.arange(float(batch)).view(batch, 1, 1, 1).expand(batch, 3, side, side).contiguous()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_mixed_view_on_a_three_cycle(layout):
    partner = draw_pairs("roll", "group", 0, 0, 0, 3, 3)
    inverse = np.argsort(partner)
    region = Region(32, 64, 96, 64, (1, 2, 3, 2))
    view = numbered(3, 224).to(memory_format=layout)
    before = view.clone()
    mixed = make_mixed(view, torch.from_numpy(partner), region)
    assert torch.equal(view, before)
    assert mixed.is_contiguous(memory_format=torch.channels_last)
    mask = torch.zeros(224, 224, dtype=torch.bool)
    mask[32:128, 64:128] = True
    for composite in range(3):
        assert (mixed[composite][:, mask] == (composite + 1) % 3).all()
        assert (mixed[composite][:, ~mask] == composite).all()
    for source in range(3):  # the inverse finds each image's region
        assert (mixed[inverse[source]][:, mask] == source).all()


@pytest.mark.parametrize("scope", regions.SCOPES)
def test_ranks_together_make_the_mixed_view_of_one_process(scope):
    batch, world = 12, 2
    ranks = RegionSampler(7, 32, 1, "official", pairing="randperm", scope=scope, group_size=3)
    partner = draw_pairs("randperm", scope, 1, 4, 0, batch, 3)
    region = draw_region("official", 4, seed=1)
    view = torch.randn(batch, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    whole = make_mixed(view, torch.from_numpy(partner), region)
    patches = view[
        :, :, region.top_px : region.top_px + region.height_px, region.left_px : region.left_px + region.width_px
    ]

    def gather(patch: torch.Tensor) -> torch.Tensor:
        assert patch.shape == (batch // world, 3, region.height_px, region.width_px)
        assert patch.is_contiguous(memory_format=torch.channels_last)
        return patches

    for rank in range(world):
        drawn = ranks.draw(4, 0, batch // world, rank, world)
        assert drawn.region == region and drawn.across_ranks == (scope == "global")
        rows = slice(rank * batch // world, (rank + 1) * batch // world)
        mine = torch.from_numpy(drawn.partner)
        part = make_mixed(view[rows], mine, drawn.region, gather if drawn.across_ranks else None)
        assert torch.equal(part, whole[rows])


def test_group_that_spans_ranks_is_refused():
    partner = draw_pairs("roll", "group", 0, 0, 0, 12, 6)
    with pytest.raises(ValueError, match="spans two ranks of 4"):
        rank_partner(partner, 1, 4, "group")


def test_sampler_keys_regions_by_the_step_and_pairs_by_the_forward_pass():
    drawn = RegionSampler(7, 32, 5, pairing="randperm")
    first, second = drawn.draw(3, 0, 8, forward_pass=6), drawn.draw(3, 0, 8, forward_pass=7)
    assert first.region == second.region == drawn.region(3)
    assert first.partner.tolist() == drawn.partners(6, 0, 8, 8).tolist()
    assert second.partner.tolist() == drawn.partners(7, 0, 8, 8).tolist() != first.partner.tolist()
    assert drawn.draw(3, 0, 8).partner.tolist() == drawn.partners(3, 0, 8, 8).tolist()


def test_boxes_are_repeated_for_each_image():
    boxes = draw_region("paper", 0).boxes(3)
    assert boxes.shape == (3, 4) and boxes.dtype == torch.int64
    assert (boxes == torch.tensor(draw_region("paper", 0).box_cells)).all()


@pytest.mark.parametrize("method", ["regioncl-m", "regioncl-s", "regioncl-m3", "regioncl-moby"])
def test_composites_do_not_depend_on_the_number_of_ranks(method: str) -> None:
    """With a group size, for synchronised batch norm too, whose recipes have none."""
    config = resolve(["--method", method, "--bn.group-size", "4", "--global-batch", "16", "--image-size", "64"])
    view = torch.randn(16, 3, 64, 64, generator=torch.Generator().manual_seed(0))

    def composites(world_size: int) -> torch.Tensor:
        parts = []
        for rank, images in enumerate(view.chunk(world_size)):
            runtime = SimpleNamespace(rank=rank, world_size=world_size, device=torch.device("cpu"))
            needs = SimpleNamespace(key_directions=0, mixed_views=("view1",))
            builder = InputBuilder(config, needs, runtime, grid=2)  # type: ignore[arg-type]
            inputs = builder.step_inputs({"view1": images, "view2": images}, step=3, micro=0, count=1)
            parts.append(inputs.mixed["view1"])
        return torch.cat(parts)

    alone = composites(1)
    assert not torch.equal(alone, view)
    assert torch.equal(composites(2), alone) and torch.equal(composites(4), alone)
    assert batch_per_device(config, 4) == 4
    with pytest.raises(UserMistake, match="group-size 4 does not divide the 2 images"):
        check_batch(config, 8)


@pytest.mark.parametrize("name", [name for name in RECIPES if name.startswith("regioncl-")])
def test_no_recipe_pairs_images_by_the_machine(name: str) -> None:
    config = resolve(["--method", RECIPES[name][0], "--recipe", name])
    assert config.model.region.pairing_scope == "global" or pairing_group_size(config) > 0


def test_inputs_tell_passes_from_optimizer_steps() -> None:
    """A draw has the number of its pass; what lasts for a number of optimizer steps divides it."""
    config = resolve(["--method", "densecl", "--image-size", "64"])
    runtime = SimpleNamespace(rank=0, world_size=1, device=torch.device("cpu"))
    builder = InputBuilder(config, SimpleNamespace(key_directions=1, mixed_views=()), runtime, grid=2)  # type: ignore[arg-type]
    view = torch.zeros(4, 3, 64, 64)
    inputs = builder.step_inputs({"view1": view, "view2": view}, step=3, micro=1, count=2)
    assert (inputs.step, inputs.micro_batches) == (7, 2)
