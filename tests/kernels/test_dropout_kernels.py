"""Dropout whose masks are recomputed: against an independent Philox; Triton in its interpreter without a GPU."""

import numpy as np
import pytest
import torch
from philox import philox

from support import in_the_interpreter

CUDA = torch.cuda.is_available()


def seed_of(key, device):
    return torch.tensor([key], dtype=torch.float64, device=device)


def factors(key, n, draw, p, device):
    """Factors of elements 0 .. n - 1, four from each number of the counter."""
    words = np.stack(philox(key, np.arange(-(-n // 4)), draw), 1).reshape(-1)[:n]
    kept = (words >> 8).astype(np.float32) / 2**24 >= np.float32(p)
    return torch.from_numpy(kept).to(device).float() / (1 - p)


def single_factors(key, elements, draw, p, device):
    """Factors of any elements, one from each number of the counter."""
    kept = (philox(key, elements, draw)[0] >> 8).astype(np.float32) / 2**24 >= np.float32(p)
    return torch.from_numpy(kept).to(device).float() / (1 - p)


def check_locked(device):
    from recurlm.kernels import dropout_triton as D

    for shape, dtype in (
        ((5, 4, 300), torch.float32), ((19, 3, 7), torch.float32), ((8, 2, 515), torch.bfloat16), ((1, 1, 1), torch.float16),
    ):  # fmt: skip
        x = torch.randn(shape, device=device).to(dtype).requires_grad_()
        key = 77 + (3 << 32)
        for p in (0.0, 0.4):
            y = D.locked(x, p, seed_of(key, device), 3)
            factor = factors(key, x[0].numel(), 3, p, device).view(shape[1:])
            assert y.dtype == dtype
            torch.testing.assert_close(y, (x.float() * factor).to(dtype), rtol=torch.finfo(dtype).eps, atol=0)
            assert p > 0 or torch.equal(y, x)
            g = torch.randn_like(x)
            (grad,) = torch.autograd.grad(y, x, g)
            torch.testing.assert_close(grad, (g.float() * factor).to(dtype), rtol=torch.finfo(dtype).eps, atol=0)
            assert torch.equal(y, D.locked(x, p, seed_of(key, device), 3))
    ones = torch.ones(2, 64, 1000, device=device)
    one, draw, other, high = (
        D.locked(ones, 0.3, seed_of(k, device), d) for k, d in ((5, 0), (5, 1), (6, 0), (5 + 2**32, 0))
    )
    for y in (one, draw, other, high):
        assert abs((y[0] == 0).float().mean().item() - 0.3) < 0.01
        assert torch.equal(y[0], y[1])
    for y in (draw, other, high):  # independent: both are dropped where 0.3 * 0.3 says
        assert abs(((y[0] == 0) & (one[0] == 0)).float().mean().item() - 0.09) < 0.006


def check_embed(device):
    from recurlm.kernels import dropout_triton as D

    for vocab, width, dtype in ((50, 20, torch.float32), (13, 7, torch.float32), (50, 24, torch.bfloat16)):
        table = torch.randn(vocab, width, device=device).to(dtype).requires_grad_()
        ids = torch.randint(vocab, (6, 3), generator=torch.Generator().manual_seed(1)).to(device)
        for p_word, p in ((0.3, 0.2), (0.0, 0.0), (0.0, 0.5)):
            y = D.embed(ids, table, p_word, p, seed_of(77, device), 4)
            word = single_factors(77, np.arange(vocab), 4, p_word, device)
            mask = single_factors(77, np.arange(3 * width), 5, p, device).view(3, width)
            factor = word[ids][..., None] * mask
            torch.testing.assert_close(y, (table.float()[ids] * factor).to(dtype), rtol=torch.finfo(dtype).eps, atol=0)
            assert p_word + p > 0 or torch.equal(y, table[ids])
            g = torch.randn_like(y)
            (grad,) = torch.autograd.grad(y, table, g)
            expected = torch.zeros(vocab, width, device=device)
            expected.index_put_((ids,), g.float() * factor, accumulate=True)
            tolerance = 1e-5 if dtype == torch.float32 else 0.03
            torch.testing.assert_close(grad.float(), expected, rtol=tolerance, atol=tolerance)


def check_bernoulli(device):
    from recurlm.kernels import dropout_triton as D

    for n, dtype in ((1, torch.float32), (4099, torch.float32), (40_000, torch.bfloat16)):
        y = D.bernoulli(torch.full((n,), float("nan"), device=device, dtype=dtype), 0.3, seed_of(9, device), 2)
        expected = (factors(9, n, 2, 1 - 0.3, device) > 0).to(dtype)
        assert torch.equal(y, expected)
        assert n < 10_000 or abs(y.float().mean().item() - 0.3) < 0.01
    assert torch.equal(
        D.bernoulli(torch.empty(100, device=device), 1.0, seed_of(9, device), 2), torch.ones(100, device=device)
    )
    assert not D.bernoulli(torch.empty(100, device=device), 0.0, seed_of(9, device), 2).any()


CHECKS = ("check_locked", "check_embed", "check_bernoulli")


@pytest.mark.parametrize("check", CHECKS)
def test_in_the_interpreter(check):
    in_the_interpreter("kernels/test_dropout_kernels", f"{check}('cpu')")


@pytest.mark.skipif(not CUDA, reason="no GPU here")
@pytest.mark.parametrize("check", CHECKS)
def test_on_the_gpu(check):
    globals()[check]("cuda")
