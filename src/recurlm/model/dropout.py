"""The dropouts of AWD-LSTM as pure functions of a tensor and a source of randomness (Merity et al. 2018, section 4).

All scale the survivors by 1 / (1 - p), and none of them changes its argument: gradients reach the raw weight.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Generator, Tensor

if TYPE_CHECKING:
    from recurlm.model.embedding import AdaptiveEmbedding


class Noise:
    """Randomness that a captured step can replay: draw n of an element is a function of a seed on the device.

    Takes a Generator's place on a GPU with Triton. The host counts draws, the device never waits for it.
    """

    def __init__(self, seed: Tensor):
        from recurlm.kernels import dropout_triton

        self.kernels, self.seed, self.draws = dropout_triton, seed, 0

    def take(self, draws: int = 1) -> int:
        """The number of the next draw, `draws` of them taken."""
        self.draws += draws
        return self.draws - draws


Source = Generator | Noise


def bernoulli(shape: tuple[int, ...], p: float, like: Tensor, source: Source, dtype: torch.dtype) -> Tensor:
    """Ones with probability p, else zeros, on the device of `like`."""
    out = torch.empty(shape, dtype=dtype, device=like.device)
    if isinstance(source, Noise):
        return source.kernels.bernoulli(out, p, source.seed, source.take())
    return out.bernoulli_(p, generator=source)


def mask(shape: tuple[int, ...], p: float, like: Tensor, source: Source) -> Tensor:
    """A mask of `shape` on the device of `like`: 0 with probability p, else 1 / (1 - p); fp32 at least, for the scale."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    return bernoulli(shape, 1 - p, like, source, dtype).div_(1 - p)


def embed(
    ids_TB: Tensor,
    weight_VE: Tensor | AdaptiveEmbedding,
    p_word: float,
    p: float,
    dtype: torch.dtype,
    source: Source | None,
) -> Tensor:
    """x_TBE in `dtype`, whole words dropped (one draw per vocabulary row for all times and batch rows), then `locked`."""
    if not isinstance(weight_VE, Tensor):
        words, x_TBE = weight_VE.words, weight_VE(ids_TB)
    elif isinstance(source, Noise) and weight_VE.dtype == dtype:
        return source.kernels.embed(ids_TB, weight_VE, p_word, p, source.seed, source.take(2))
    else:
        words, x_TBE = len(weight_VE), torch.nn.functional.embedding(ids_TB, weight_VE)
    if source is not None and p_word > 0:
        x_TBE = x_TBE * mask((words, 1), p_word, x_TBE, source)[ids_TB]
    return locked(x_TBE.to(dtype), p, source)


def locked(x_TBF: Tensor, p: float, source: Source | None, draw: int | None = None) -> Tensor:
    """x with one mask (1, B, F) for all time steps (variational dropout, Gal & Ghahramani 2016); that of a `draw` taken before."""
    if source is None or p == 0:
        return x_TBF
    if isinstance(source, Noise):
        return source.kernels.locked(x_TBF, p, source.seed, source.take() if draw is None else draw)
    return (x_TBF * mask((1, *x_TBF.shape[1:]), p, x_TBF, source)).to(x_TBF.dtype)


def weight_drop(weight: Tensor, p: float, source: Source | None) -> Tensor:
    """The weight with elements dropped (DropConnect): one mask for all time steps and batch rows."""
    if source is None or p == 0:
        return weight
    return weight * mask(tuple(weight.shape), p, weight, source)
