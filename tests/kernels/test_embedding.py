"""The embedding's gradient in Triton against the sum in float64."""

import pytest
import torch

from support import in_the_interpreter

CUDA = torch.cuda.is_available()
SHAPES = [(1, 1, 1), (1, 7, 3), (5, 3, 2), (40, 33, 90), (300, 130, 20), (33, 129, 1)]  # positions, features, words
LARGE = [(1400, 400, 10000), (5600, 400, 33278), (8400, 400, 267735), (20_000, 64, 50)]


def compare(shape, dtype, device="cpu"):
    from recurlm.kernels import embedding_triton

    N, E, V = shape
    g = torch.Generator().manual_seed(1)
    rows = torch.randn(N, E, generator=g).to(device, dtype)
    ids = (V * torch.rand(N, generator=g) ** 4).long().clamp(max=V - 1).to(device)  # few ids are most of the text
    found = embedding_triton.gradient(rows, ids, V)
    expected = torch.zeros(V, E, dtype=torch.float64, device=device).index_add_(0, ids, rows.double())
    sizes = torch.zeros(V, E, dtype=torch.float64, device=device).index_add_(0, ids, rows.double().abs())
    assert found.dtype == dtype and found.shape == (V, E)
    eps = {torch.float32: 0, torch.float16: 2**-11, torch.bfloat16: 2**-8}[dtype]  # the result's one rounding
    assert bool(((found.double() - expected).abs() <= eps * expected.abs() + 1e-6 * sizes + 1e-7).all())
    assert torch.equal(found, embedding_triton.gradient(rows, ids, V))


def interpreted():
    """What the subprocess below runs."""
    torch.use_deterministic_algorithms(True)  # uninitialised memory holds NaN
    from recurlm.kernels import embedding_triton

    for most in (embedding_triton.MOST, 6):  # by comparing all pairs, and by torch's sort
        embedding_triton.MOST = most
        for shape in SHAPES:
            for dtype in (torch.float32, torch.float16):  # the interpreter cuts bfloat16 off instead of rounding
                compare(shape, dtype)


def test_triton_in_the_interpreter():
    in_the_interpreter("kernels/test_embedding", "interpreted()")


def test_no_positions():
    triton = pytest.importorskip("recurlm.kernels.embedding_triton", exc_type=ImportError)
    assert not triton.gradient(torch.empty(0, 3), torch.empty(0, dtype=torch.int64), 4).any()


@pytest.mark.skipif(not CUDA, reason="no GPU here")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [*SHAPES, *LARGE])
def test_triton_on_the_gpu(shape, dtype):
    torch.full((1 << 28,), float("nan"), device="cuda")  # what the allocator hands out next holds NaN
    compare(shape, dtype, "cuda")
