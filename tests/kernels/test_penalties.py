"""The activation penalties: the Triton kernels against the formula in float64, both terms and both gradients."""

import itertools
import os
import subprocess
import sys

import pytest
import torch

from recurlm import kernels
from recurlm.kernels import reference

CUDA = torch.cuda.is_available()
SHAPES = [(1, 1, 1), (1, 3, 50), (2, 1, 1), (5, 3, 7), (3, 40, 100), (0, 2, 3)]
LARGE = [(70, 20, 400), (71, 33, 401), (300, 80, 400)]
WEIGHTS = [(2.0, 1.0), (0.0, 3.0), (0.5, 0.0), (0.0, 0.0)]


def outcome(function, raw, dropped, ar, tar):
    """The terms, and the gradients of their sum with unequal weights (0 where there is none)."""
    terms = function(raw, dropped, ar, tar)
    total = 1.5 * terms[0] - 0.5 * terms[1]
    if not total.requires_grad:
        return [*terms]
    gradients = torch.autograd.grad(total, (raw, dropped), allow_unused=True)
    return [*terms, *(torch.zeros_like(x) if g is None else g for g, x in zip(gradients, (raw, dropped), strict=True))]


def compare(function, shape, dtype, device="cpu"):
    g = torch.Generator().manual_seed(1)
    raw, dropped = (torch.randn(shape, generator=g).to(device, dtype).requires_grad_() for _ in range(2))
    wide = [x.detach().double().requires_grad_() for x in (raw, dropped)]
    rtol = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    for ar, tar in WEIGHTS:
        if not raw.numel() and ar:
            continue  # the mean of nothing
        found = outcome(function, raw, dropped, ar, tar)
        expected = outcome(reference.penalties, *wide, ar, tar)
        for n, (a, b) in enumerate(itertools.zip_longest(found[:2] + found[2:], expected)):
            if b is None:  # no graph in the formula: a gradient of 0
                assert not a.any()
                continue
            assert a.dtype == (torch.float32 if n < 2 else dtype)
            close = {
                "rtol": 2e-6 if n < 2 else rtol,
                "atol": 1e-12 if n < 2 else rtol * float(b.abs().max() if b.numel() else 0) / 4,
            }
            assert torch.allclose(a.double(), b, **close), (shape, dtype, ar, tar, n)
        again = outcome(function, raw, dropped, ar, tar)
        assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


def interpreted():
    """What the subprocess below runs."""
    from recurlm.kernels.penalties_triton import penalties

    torch.use_deterministic_algorithms(True)  # uninitialised memory holds NaN
    for shape, dtype in itertools.product(SHAPES[:-1], (torch.float32, torch.float16, torch.bfloat16)):
        compare(penalties, shape, dtype)
    x = torch.randn(3, 4, 5).transpose(0, 1).requires_grad_()
    assert torch.allclose(penalties(x, x, 1, 1)[1], reference.penalties(x, x, 1, 1)[1])
    print("ok")


def test_triton_in_the_interpreter():
    """In a process of its own, for TRITON_INTERPRET is read at import."""
    pytest.importorskip("triton", reason="triton is not installed")
    if CUDA:
        pytest.skip("a GPU is here: the compiled kernel is tested instead")
    code = "import sys; sys.path.insert(0, 'tests/kernels'); import test_penalties as t; t.interpreted()"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert done.stdout.strip() == "ok", done.stderr


def test_gradcheck():
    leaves = [torch.randn(4, 2, 3, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(lambda raw, dropped: kernels.penalties(raw, dropped, 2.0, 3.0), leaves)


def test_what_is_not_there_is_0():
    x = torch.ones(1, 2, 3)
    assert [float(term) for term in kernels.penalties(x, x, 0.0, 5.0)] == [0, 0]


@pytest.mark.skipif(not CUDA, reason="no GPU here")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [*SHAPES[:-1], *LARGE])
def test_triton_on_the_gpu(shape, dtype):
    torch.full((1 << 28,), float("nan"), device="cuda")  # what the allocator hands out next holds NaN
    compare(kernels.penalties, shape, dtype, "cuda")


@pytest.mark.skipif(not CUDA, reason="no GPU here")
def test_a_graph_replays_it():
    raw, dropped = (torch.randn(7, 5, 40, device="cuda").bfloat16().requires_grad_() for _ in range(2))
    expected = outcome(kernels.penalties, raw, dropped, 2, 1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = outcome(kernels.penalties, raw, dropped, 2, 1)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
