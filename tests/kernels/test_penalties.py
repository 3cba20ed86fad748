"""The activation penalties: the Triton kernels against the formula in float64, both terms and both gradients."""

import itertools

import pytest
import torch

from recurlm import kernels
from recurlm.kernels import reference
from support import in_the_interpreter

CUDA = torch.cuda.is_available()
SHAPES = [(1, 1, 1), (1, 3, 50), (2, 1, 1), (5, 3, 7), (3, 40, 100)]
LARGE = [(70, 20, 400), (71, 33, 401), (300, 80, 400)]
WEIGHTS = [(2.0, 1.0), (0.0, 3.0), (0.5, 0.0), (0.0, 0.0)]


def outcome(function, raw, dropped, ar, tar):
    """The terms, and the gradients of a sum of them with unequal weights (0 where there is none)."""
    leaves, terms = (raw, dropped), function(raw, dropped, ar, tar)
    total, gradients = 1.5 * terms[0] - 0.5 * terms[1], (None, None)
    if total.requires_grad:
        gradients = torch.autograd.grad(total, leaves, allow_unused=True)
    return [*terms, *(torch.zeros_like(x) if g is None else g for g, x in zip(gradients, leaves, strict=True))]


def compare(function, shape, dtype, device="cpu"):
    """Terms and gradients against float64, each gradient rounded once, and two runs equal bit by bit."""
    g = torch.Generator().manual_seed(1)
    raw, dropped = (torch.randn(shape, generator=g).to(device, dtype).requires_grad_() for _ in range(2))
    wide = [x.detach().double().requires_grad_() for x in (raw, dropped)]
    # The interpreter cuts bfloat16 off instead of rounding; differences of like numbers are rounded in fp32.
    rounding = {torch.float32: 1e-6, torch.float16: 2**-11, torch.bfloat16: 2**-7}[dtype] + 1e-6
    for ar, tar in WEIGHTS:
        found = outcome(function, raw, dropped, ar, tar)
        expected = outcome(reference.penalties, *wide, ar, tar)
        assert [x.dtype for x in found] == [torch.float32, torch.float32, dtype, dtype]
        for a, b, relative in zip(found, expected, (2e-6, 2e-6, rounding, rounding), strict=True):
            least = 1e-7 + 1e-6 * b.abs().max()
            assert bool(((a.double() - b).abs() <= relative * b.abs() + least).all()), (shape, dtype, ar, tar)
        assert all(map(torch.equal, found, outcome(function, raw, dropped, ar, tar)))


def interpreted():
    """What the subprocess below runs."""
    from recurlm.kernels.penalties_triton import penalties

    torch.use_deterministic_algorithms(True)  # uninitialised memory holds NaN
    for shape, dtype in itertools.product(SHAPES, (torch.float32, torch.float16, torch.bfloat16)):
        compare(penalties, shape, dtype)
    x = torch.randn(3, 4, 5).transpose(0, 1).requires_grad_()
    assert torch.allclose(penalties(x, x, 1, 1)[1], reference.penalties(x, x, 1, 1)[1])


def test_triton_in_the_interpreter():
    in_the_interpreter("kernels/test_penalties", "interpreted()")


def test_gradcheck():
    leaves = [torch.randn(4, 2, 3, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(lambda raw, dropped: kernels.penalties(raw, dropped, 2.0, 3.0), leaves)


def test_what_is_not_there_is_0():
    x = torch.ones(1, 2, 3)
    assert [float(term) for term in kernels.penalties(x, x, 0.0, 5.0)] == [0, 0]


@pytest.mark.skipif(not CUDA, reason="no GPU here")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [*SHAPES, *LARGE])
def test_triton_on_the_gpu(shape, dtype):
    torch.full((1 << 28,), float("nan"), device="cuda")  # what the allocator hands out next holds NaN
    compare(kernels.penalties, shape, dtype, "cuda")


@pytest.mark.skipif(not CUDA, reason="no GPU here")
def test_a_graph_replays_it():
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):  # where autograd first meets the leaves, it waits for them ever after
        raw, dropped = (torch.randn(7, 5, 40, device="cuda").bfloat16().requires_grad_() for _ in range(2))
        expected = outcome(kernels.penalties, raw, dropped, 2, 1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        found = outcome(kernels.penalties, raw, dropped, 2, 1)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
