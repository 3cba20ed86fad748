"""The update of dynamic evaluation: the Triton kernel and its slow twin against the formula in float64."""

import pytest
import torch

from recurlm import kernels
from recurlm.kernels import reference
from recurlm.kernels.update_triton import MOST_WEIGHTS
from support import in_the_interpreter

CUDA = torch.cuda.is_available()
SHAPES = [(1,), (2048,), (2049,), (70, 33), (3, 5)] + [(7,)] * MOST_WEIGHTS  # more than one launch
HOW = 0.1, 0.3, 0.5


def check(function, dtype, device="cpu"):
    draw = torch.Generator().manual_seed(2)
    for with_rms in (True, False):
        w, g, t, r = (
            [torch.randn(s, generator=draw, dtype=torch.float64).to(device, dtype) for s in SHAPES] for _ in range(4)
        )
        rms = [x.abs() * 4 for x in r] if with_rms else None
        g[3] = g[3].t().contiguous().t()  # as some gradients come
        lr, decay, eps = HOW
        expected = []
        for n, (a, b, c) in enumerate(zip(w, g, t, strict=True)):
            a, b, c = a.double(), b.double(), c.double()
            pull = decay if rms is None else (decay * rms[n].double()).clamp(max=1)
            expected.append(a + pull * (c - a) - lr * b / (1 if rms is None else rms[n].double() + eps))
        function(w, g, t, rms, *HOW)
        for found, right in zip(w, expected, strict=True):
            tolerance = 1e-6 if dtype == torch.float32 else 1e-14
            torch.testing.assert_close(found.double(), right, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_twin(dtype):
    check(reference.dynamic_update, dtype)


def interpreted():
    from recurlm.kernels.dynamic_triton import dynamic_update

    check(dynamic_update, torch.float32)


def test_triton_in_the_interpreter():
    in_the_interpreter("kernels/test_dynamic_update", "interpreted()")


@pytest.mark.skipif(not CUDA, reason="no GPU here")
def test_triton_on_the_gpu():
    check(kernels.dynamic_update, torch.float32, "cuda")
