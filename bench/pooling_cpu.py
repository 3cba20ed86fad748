"""QRNN pooling on the CPU, forward and backward, beside a copy of as many bytes, and beside the plain loop of torch.

Counted are the bytes that cannot be avoided: Z, F, O in and h out (4 arrays), then Z, F, O and h's gradient in and
three gradients out (7 arrays). All that is compared runs in turns in one process with as many threads; the best of
each counts, for the machine may be shared. `onto memory that is there` is the compiled kernels alone, as the copy;
`with its own results` is `pool` and autograd, which get new memory from the system each time, as `clone` does.
"""

import os
import time
from collections.abc import Callable

import numpy as np

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as the command line does: torch's idle threads give the core away
import torch

from recurlm.kernels import pool_numba, reference

SHAPES = [(70, 20, 1550), (140, 60, 2500)]
THREADS = 2
REPEATS = 9
TARGET = 0.6


def best(functions: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Microseconds of each, the best of `REPEATS` turns after one that is not counted."""
    found = dict.fromkeys(functions, float("inf"))
    for turn in range(REPEATS + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if turn:
                found[name] = min(found[name], (time.perf_counter() - start) * 1e6)
    return found


def kernels_alone(T: int, B: int, H: int) -> tuple[Callable[[], object], Callable[[], object]]:
    """Forward and backward as `pool` calls them, onto arrays that exist."""

    def array(size: int) -> np.ndarray:
        return torch.randn(size, generator=g).numpy()

    g = torch.Generator().manual_seed(1)
    gates, c, grad_h, grad_last = array(T * B * 3 * H), array(B * H), array(T * B * H), array(B * H)
    h, last, kept = array(T * B * H), array(B * H), array(-(-T // pool_numba.SEGMENT) * B * H)
    grad_gates, grad_c, mask = array(T * B * 3 * H), array(B * H), (np.empty(0, np.float32), np.float32(1))
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


def rows() -> list[dict]:
    """One row a shape and measure: ours, a peer and the limit in microseconds, and limit / ours."""
    torch.set_num_threads(min(THREADS, torch.get_num_threads()))
    table = []
    for T, B, H in SHAPES:
        forward, backward = kernels_alone(T, B, H)
        parts = [torch.randn(arrays * T * B * H // 2) for arrays in (4, 7)]
        onto = [torch.ones_like(part) for part in parts]
        found = best({
            "forward": forward,
            "backward": backward,
            "copy forward": lambda onto=onto, parts=parts: onto[0].copy_(parts[0]),
            "copy backward": lambda onto=onto, parts=parts: onto[1].copy_(parts[1]),
            "clone": lambda parts=parts: [part.clone() for part in parts],
            "pool": step(pool_numba.pool, T, B, H),
            "loop": step(reference.pool, T, B, H),
        })  # fmt: skip
        copies = found["copy forward"] + found["copy backward"]
        for name, ours, limit, peer in (
            ("forward, onto memory that is there", found["forward"], found["copy forward"], None),
            ("backward, onto memory that is there", found["backward"], found["copy backward"], None),
            ("both, onto memory that is there", found["forward"] + found["backward"], copies, "loop"),
            ("both, with its own results", found["pool"], copies, "loop"),
            ("both, with its own results", found["pool"], copies, "clone"),
        ):
            table.append({
                "measure": f"QRNN pooling fo fp32, {name}",
                "shape": (T, B, H),
                "ours_us": ours,
                "peer_us": None if peer is None else found[peer],
                "peer": {None: None, "loop": "plain loop in torch", "clone": "clone of as many bytes"}[peer],
                "limit_us": limit,
                "share": limit / ours,
                "target": TARGET,
            })  # fmt: skip
    return table


def main() -> None:
    print(f"{torch.get_num_threads()} threads of torch at most {THREADS}; best of {REPEATS}, in turns; milliseconds")
    print(f"{'shape':<16} {'measure':<56} {'ours':>7} {'copy':>7} {'share':>6}  peer")
    for row in rows():
        peer = "" if row["peer"] is None else f"{row['peer']} {row['peer_us'] / 1e3:.1f}"
        print(f"{row['shape']!s:<16} {row['measure']:<56} {row['ours_us'] / 1e3:7.2f} ", end="")
        print(f"{row['limit_us'] / 1e3:7.2f} {row['share']:6.2f}  {peer}")


if __name__ == "__main__":
    main()
