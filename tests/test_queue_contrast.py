"""InfoNCE against a queue, block by block, against the materialised matrix."""

import pytest
import torch
import torch.nn.functional as F

from models.ops import queue_contrast
from models.ops.queue_contrast import block_size, queue_contrast_definition
from tools.bench.timing import check_twice_eager

MODULE = "models.ops.queue_contrast"


def unit_rows(count, dim, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(count, dim, generator=generator, dtype=torch.float64), dim=1).to(dtype)


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 256 entries, so that a short queue already takes several."""
    import sys

    monkeypatch.setattr(sys.modules[MODULE], "BLOCK_ELEMENTS", 1)
    assert block_size(5, 700) == 256


def case(rows=5, queue=700, extra=2, dtype=torch.float64):
    generator = torch.Generator().manual_seed(9)
    positives, others = torch.rand(rows, generator=generator), torch.rand(rows, extra, generator=generator)
    return unit_rows(rows, 8, dtype), unit_rows(queue, 8, dtype, seed=1), positives.to(dtype), others.to(dtype)


@pytest.mark.smoke
@pytest.mark.parametrize("temperature", [0.2, 0.01])
def test_equals_cross_entropy(small_blocks, temperature):
    rows, queue, positives, extra = case()
    logits = torch.cat([positives[:, None], rows @ queue.T, extra], dim=1) / temperature
    expected = F.cross_entropy(logits, torch.zeros(5, dtype=torch.int64), reduction="none")
    torch.testing.assert_close(queue_contrast(rows, queue, positives, temperature, extra), expected)
    torch.testing.assert_close(queue_contrast_definition(rows, queue, positives, temperature, extra), expected)


def test_extra_of_minus_infinity_is_no_entry(small_blocks):
    rows, queue, positives, extra = case()
    extra[0] = -torch.inf
    extra.requires_grad_(), rows.requires_grad_()
    losses = queue_contrast(rows, queue, positives, 0.2, extra)
    torch.testing.assert_close(losses[0], queue_contrast(rows, queue, positives, 0.2)[0])
    losses.sum().backward()
    assert (extra.grad[0] == 0).all() and (extra.grad[1:] > 0).all() and rows.grad.isfinite().all()


def test_gradients_in_float64(small_blocks):
    rows, queue, positives, extra = (x.requires_grad_() for x in case(rows=3, queue=300))
    check = torch.autograd.gradcheck
    assert check(lambda r, p, e: queue_contrast(r, queue, p, 0.2, e), (rows, positives, extra))
    queue_contrast(rows, queue, positives, 0.2, extra).sum().backward()
    assert queue.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_error_at_most_twice_eager(small_blocks, dtype):
    rows, queue, positives, extra = case(rows=33, queue=1000, dtype=dtype)
    results = {}
    for name, function, cast in (
        ("ours", queue_contrast, dtype),
        ("eager", queue_contrast_definition, dtype),
        ("exact", queue_contrast_definition, torch.float64),
    ):
        inputs = [x.to(cast).requires_grad_() for x in (rows, positives, extra)]
        losses = function(inputs[0], queue.to(cast), inputs[1], 0.2, inputs[2])
        results[name] = (losses, *torch.autograd.grad(losses.sum(), inputs))
    assert results["ours"][0].dtype == torch.float32 and results["ours"][1].dtype == dtype
    for part, ours, eager, exact in zip(("loss", "rows", "positives", "extra"), *results.values(), strict=True):
        check_twice_eager(part, ours, eager, exact)


def test_opcheck_and_full_graph_compile(small_blocks):
    rows, queue, positives, extra = case(dtype=torch.float32)
    rows.requires_grad_()
    torch.library.opcheck(torch.ops.regatta.queue_sumexp.default, (rows, queue, 0.2))
    compiled = torch.compile(queue_contrast, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(queue_contrast(rows, queue, positives, 0.2, extra).sum(), rows)[0]
    actual = torch.autograd.grad(compiled(rows, queue, positives, 0.2, extra).sum(), rows)[0]
    torch.testing.assert_close(actual, expected)


def test_memory_is_that_of_a_block():
    """The largest tensor made, forward and backward, is a block of the logits, not all of them."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, (tuple, list)) else (result,):
                if isinstance(tensor, torch.Tensor):
                    self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
            return result

    rows, queue = unit_rows(1024, 4, torch.float32), unit_rows(32768, 4, torch.float32, seed=1)
    rows.requires_grad_()
    with Largest() as largest:
        queue_contrast(rows, queue, torch.zeros(1024), 0.2).sum().backward()
    assert largest.elements <= 8 * 2**20 < rows.shape[0] * queue.shape[0]


def test_overwritten_queue_is_noticed():
    rows, queue, positives, _ = case(dtype=torch.float32)
    losses = queue_contrast(rows.requires_grad_(), queue, positives, 0.2)
    queue[0] = 0
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        losses.sum().backward()


def test_wrong_arguments_are_refused():
    rows, queue, positives, extra = case()
    with pytest.raises(ValueError, match="do not fit"):
        queue_contrast(rows, queue[:, :4], positives, 0.2)
    with pytest.raises(ValueError, match="5 rows need"):
        queue_contrast(rows, queue, positives[:4], 0.2)
    with pytest.raises(ValueError, match="positive, not 0"):
        queue_contrast(rows, queue, positives, 0.0)
