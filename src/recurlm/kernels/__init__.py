"""The fast operations, one visible table: (operation, device type, dtype) -> function.

Each function has a slow twin of the same signature in `reference.py`, which serves every pair that the table
does not name. Only torch, triton, numba and numpy are imported here, the latter three at first use.
"""

from __future__ import annotations

import functools
import importlib.util
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from recurlm.kernels import reference


def _numba_fo_pool() -> Callable[..., tuple[Tensor, Tensor]]:
    from recurlm.kernels.fo_pool_numba import fo_pool

    return fo_pool


def _triton_fo_pool() -> Callable[..., tuple[Tensor, Tensor]]:
    if importlib.util.find_spec("triton") is None:
        warnings.warn(
            "triton is not installed: QRNN layers run step by step on the GPU, which is many times slower.",
            RuntimeWarning,
            stacklevel=2,
        )
        return reference.fo_pool
    from recurlm.kernels.fo_pool_triton import fo_pool

    return fo_pool


TABLE: dict[tuple[str, str, torch.dtype], Callable[[], Callable[..., tuple[Tensor, Tensor]]]] = {
    ("fo_pool", "cpu", torch.float32): _numba_fo_pool,
    ("fo_pool", "cpu", torch.float64): _numba_fo_pool,
    ("fo_pool", "cpu", torch.bfloat16): _numba_fo_pool,
    ("fo_pool", "cpu", torch.float16): _numba_fo_pool,
    ("fo_pool", "cuda", torch.float32): _triton_fo_pool,
    ("fo_pool", "cuda", torch.bfloat16): _triton_fo_pool,
    ("fo_pool", "cuda", torch.float16): _triton_fo_pool,
}


@functools.cache
def _load(operation: str, device: str, dtype: torch.dtype) -> Callable[..., tuple[Tensor, Tensor]]:
    return TABLE[operation, device, dtype]() if (operation, device, dtype) in TABLE else reference.fo_pool


def fo_pool(gates_TB3H: Tensor, c_BH: Tensor, scale_TBH: Tensor | None) -> tuple[Tensor, Tensor]:
    """(h_TBH, last c_BH) of QRNN fo-pooling; see `reference.fo_pool` for the formula."""
    return _load("fo_pool", gates_TB3H.device.type, gates_TB3H.dtype)(gates_TB3H, c_BH, scale_TBH)
