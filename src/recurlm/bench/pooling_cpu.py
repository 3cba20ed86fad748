"""QRNN pooling on the CPU, forward and backward, beside a copy of as many bytes, and beside the plain loop of torch.

Counted are the bytes that cannot be avoided: Z, F, O in and h out (4 arrays), then Z, F, O and h's gradient in and
three gradients out (7 arrays). All that is compared runs in turns in one process with as many threads; the best of
each counts, for the machine may be shared. `onto memory that is there` is the compiled kernels alone, as the copy;
`with its own results` is `pool` and autograd, which get new memory from the system each time, as `clone` does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from recurlm.bench.timing import Row, cpu_time
from recurlm.kernels import pool_numba, reference

SHAPES = [(70, 20, 1550), (140, 60, 2500)]
THREADS = 2
TARGET = ">= 60 %"


def kernels_alone(T: int, B: int, H: int) -> tuple[Callable[[], object], Callable[[], object]]:
    """Forward and backward as `pool` calls them, onto arrays that exist."""

    def array(size: int) -> np.ndarray:
        return torch.randn(size, generator=g).numpy()

    def result(size: int) -> np.ndarray:
        return np.zeros(size, np.float32) + 1  # numpy's memory, as in `pool`, and there

    g = torch.Generator().manual_seed(1)
    gates, c, grad_h, grad_last = array(T * B * 3 * H), array(B * H), array(T * B * H), array(B * H)
    h, last, kept = result(T * B * H), result(B * H), result(-(-T // pool_numba.SEGMENT) * B * H)
    grad_gates, grad_c, mask = result(T * B * 3 * H), result(B * H), (np.empty(0, np.float32), np.float32(1))
    head = (T, B, H, 3, gates)
    return (
        lambda: pool_numba._spread(pool_numba._forward, *head, c, *mask, h, last, kept),
        lambda: pool_numba._spread(pool_numba._backward, *head, *mask, kept, grad_h, grad_last, grad_gates, grad_c),
    )


def step(function: Callable[..., tuple[torch.Tensor, torch.Tensor]], T: int, B: int, H: int) -> Callable[[], object]:
    """Forward and backward of a whole `pool`."""
    g = torch.Generator().manual_seed(1)
    gates_TBG, c_BH = torch.randn(T, B, 3 * H, generator=g).requires_grad_(), torch.randn(B, H, generator=g)
    grad_TBH = torch.randn(T, B, H, generator=g)
    return lambda: torch.autograd.grad(function(gates_TBG, c_BH, None, "fo")[0], gates_TBG, grad_TBH)


def rows() -> list[dict[str, Any]]:
    """fo-pooling in fp32 on at most two threads, against a copy of as many bytes."""
    threads, table = torch.get_num_threads(), []
    torch.set_num_threads(min(THREADS, threads))
    for T, B, H in SHAPES:
        forward, backward = kernels_alone(T, B, H)
        parts = [torch.randn(arrays * T * B * H // 2) for arrays in (4, 7)]
        onto = [torch.ones_like(part) for part in parts]
        times = cpu_time({
            "forward": forward,
            "backward": backward,
            "copy forward": lambda onto=onto, parts=parts: onto[0].copy_(parts[0]),
            "copy backward": lambda onto=onto, parts=parts: onto[1].copy_(parts[1]),
            "pool": step(pool_numba.pool, T, B, H),
            "loop": step(reference.pool, T, B, H),
        })  # fmt: skip
        found = {name: time.best for name, time in times.items()}
        copies = found["copy forward"] + found["copy backward"]
        for name, ours, limit, peer, target in (
            ("forward, onto memory that is there", found["forward"], found["copy forward"], None, ""),
            ("backward, onto memory that is there", found["backward"], found["copy backward"], None, ""),
            ("both, onto memory that is there", found["forward"] + found["backward"], copies, None, TARGET),
            ("both, with its own results", found["pool"], copies, found["loop"], ""),
        ):
            row = Row(
                measure=f"CPU pooling, {name}", shape=f"{T} x {B} x {H:,} float32", ours_us=ours, peer_us=peer,
                peer="plain loop in torch" if peer else "", limit_us=limit, target=target,
            )  # fmt: skip
            table.append(row.as_dict())
    torch.set_num_threads(threads)
    return table
