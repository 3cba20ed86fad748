"""The fast twins of QRNN pooling against the reference, every gradient; Triton in its interpreter without a GPU."""

import os
import subprocess
import sys

import pytest
import torch

from recurlm import kernels
from recurlm.kernels import pool_numba, reference

SHAPES = [(1, 1, 1), (7, 3, 5), (2, 1, 67), (33, 4, 64), (5, 2, 130)]
CUDA = torch.cuda.is_available()


def inputs(shape, dtype, device, with_scale, pooling, seed=0):
    T, B, H = shape
    g = torch.Generator().manual_seed(seed)
    gates = (
        (torch.randn(T, B, reference.GATES[pooling] * H, generator=g, dtype=torch.float64) * 2)
        .to(device, dtype)
        .requires_grad_()
    )
    c = torch.randn(B, H, generator=g, dtype=torch.float64).to(device, dtype).requires_grad_()
    scale = (torch.rand(T, B, H, generator=g) > 0.3).to(device, dtype) if with_scale else None
    return gates, c, scale


def outcome(function, gates, c, scale, pooling):
    h, last = function(gates, c, scale, pooling)
    g = torch.Generator().manual_seed(9)
    wh = torch.randn(h.shape, generator=g).to(h)
    wl = torch.randn(last.shape, generator=g).to(h)
    grads = torch.autograd.grad((h * wh).sum() + (last * wl).sum(), (gates, c))
    return [t.double().cpu() for t in (h.detach(), last.detach(), *grads)]


def compare(function, shape, dtype, device, with_scale, tolerance, poolings=tuple(reference.GATES)):
    for pooling in poolings:
        given = inputs(shape, dtype, device, with_scale, pooling)
        wide = (x if x is None else x.double().detach().requires_grad_() for x in given)
        expected = outcome(reference.pool, *wide, pooling)
        found = outcome(function, *given, pooling)
        for name, a, b in zip(("h", "c", "grad gates", "grad c"), found, expected, strict=True):
            assert (a - b).abs().max() <= tolerance * max(1.0, b.abs().max().item()), (pooling, name)


@pytest.mark.parametrize("pooling", reference.GATES)
def test_gradcheck(pooling):
    gates, c, scale = inputs((4, 2, 3), torch.float64, "cpu", True, pooling)
    assert torch.autograd.gradcheck(lambda a, b: reference.pool(a, b, scale, pooling), (gates, c))


def test_triton_in_the_interpreter():
    """In a process of its own, for TRITON_INTERPRET is read at import."""
    pytest.importorskip("triton", reason="triton is not installed")
    if CUDA:
        pytest.skip("a GPU is here: the compiled kernel is tested instead")
    code = (
        "import sys; sys.path.insert(0, 'tests/kernels'); import torch, test_pool as t\n"
        "from recurlm.kernels.pool_triton import pool\n"
        "for shape in t.SHAPES:\n"
        "    for scale in (False, True):\n"
        "        t.compare(pool, shape, torch.float32, 'cpu', scale, 1e-5)\n"
        "t.compare(pool, (7, 3, 5), torch.bfloat16, 'cpu', True, 2e-2)\n"
        "print('ok')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == "ok", done.stderr


@pytest.mark.skipif(not CUDA, reason="no GPU here")
@pytest.mark.parametrize("with_scale", [False, True])
@pytest.mark.parametrize("shape", [*SHAPES, (70, 20, 1550), (257, 3, 1000), (5000, 1, 400)])
def test_triton_on_the_gpu(shape, with_scale):
    from recurlm.kernels.pool_triton import pool

    compare(pool, shape, torch.float32, "cuda", with_scale, 2e-5)
    compare(pool, shape, torch.bfloat16, "cuda", with_scale, 2e-2)


def test_the_table_serves_what_it_names():
    gates, c, _ = inputs((3, 2, 4), torch.float32, "cpu", False, "fo")
    assert torch.equal(kernels.pool(gates, c, None, "fo")[0], pool_numba.pool(gates, c, None, "fo")[0])
    half = kernels.pool(gates.bfloat16(), c.bfloat16(), None, "fo")[0]
    wide = pool_numba.pool(gates.bfloat16().float(), c.bfloat16().float(), None, "fo")[0]
    assert torch.equal(half, wide.bfloat16())
    assert kernels._load("pool", "xpu", torch.float32) is reference.pool


def test_empty_time():
    gates, c, _ = inputs((1, 2, 3), torch.float32, "cpu", False, "fo")
    h, last = kernels.pool(gates[:0], c, None, "fo")
    assert h.shape == (0, 2, 3)
    assert torch.equal(last, c)
