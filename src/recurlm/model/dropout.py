"""The dropouts of AWD-LSTM as pure functions of a tensor and a generator (Merity et al. 2018, section 4).

All scale the survivors by 1 / (1 - p), and none of them changes its argument: gradients reach the raw weight.
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor


def mask(shape: tuple[int, ...], p: float, like: Tensor, generator: Generator) -> Tensor:
    """A mask of `shape` on the device of `like`: 0 with probability p, else 1 / (1 - p); fp32 at least, for the scale."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    return torch.empty(shape, dtype=dtype, device=like.device).bernoulli_(1 - p, generator=generator).div_(1 - p)


def embed(ids_TB: Tensor, weight_VE: Tensor, p: float, generator: Generator | None) -> Tensor:
    """x_TBE, whole words dropped: one draw per vocabulary row, the same at all times and in all batch rows."""
    x_TBE = torch.nn.functional.embedding(ids_TB, weight_VE)
    if generator is None or p == 0:
        return x_TBE
    return x_TBE * mask((weight_VE.shape[0], 1), p, weight_VE, generator)[ids_TB]


def locked(x_TBF: Tensor, p: float, generator: Generator | None) -> Tensor:
    """x with one mask (1, B, F) for all time steps (variational dropout, Gal & Ghahramani 2016)."""
    if generator is None or p == 0:
        return x_TBF
    return (x_TBF * mask((1, *x_TBF.shape[1:]), p, x_TBF, generator)).to(x_TBF.dtype)


def weight_drop(weight: Tensor, p: float, generator: Generator | None) -> Tensor:
    """The weight with elements dropped (DropConnect): one mask for all time steps and batch rows."""
    if generator is None or p == 0:
        return weight
    return weight * mask(tuple(weight.shape), p, weight, generator)
