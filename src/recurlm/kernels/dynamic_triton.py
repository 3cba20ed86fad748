"""The update of dynamic evaluation on the GPU: all weights in one launch, each element read and written once."""

# Triton's kernels are not Python to a type checker:
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import math
from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from recurlm.kernels.update_triton import MOST_WEIGHTS, _pick

UNIT, BLOCK, WARPS = 4, 2048, 8  # fp32 that a thread loads at once, elements of a program, its warps


@triton.jit(do_not_specialize=["lr", "decay", "eps"])
def _update(
    weights, gradients, trained, rms, starts, units, lr, decay, eps,
    RMS: tl.constexpr, UNIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    unit = (program - _pick(starts, starts, program)).to(tl.int64) * (BLOCK // UNIT) + tl.arange(0, BLOCK // UNIT)
    there = (unit < _pick(units, starts, program))[:, None]
    at = unit[:, None] * UNIT + tl.arange(0, UNIT)[None, :]
    weight = _pick(weights, starts, program) + at
    w = tl.load(weight, mask=there)
    g = tl.load(_pick(gradients, starts, program) + at, mask=there)
    t = tl.load(_pick(trained, starts, program) + at, mask=there)
    pull, step = decay, lr * g
    if RMS:
        r = tl.load(_pick(rms, starts, program) + at, mask=there)
        pull, step = tl.minimum(decay * r, 1.0), step / (r + eps)
    tl.store(weight, w + pull * (t - w) - step, mask=there)


def dynamic_update(
    weights: Sequence[Tensor], gradients: Sequence[Tensor], trained: Sequence[Tensor], rms: Sequence[Tensor] | None,
    lr: float, decay: float, eps: float,
) -> None:  # fmt: skip
    """`reference.dynamic_update` in one pass; every tensor is contiguous and fp32, but gradients may be anything in memory."""
    kinds: dict[int, list[int]] = {}
    for n, w in enumerate(weights):
        kinds.setdefault(math.gcd(UNIT, w.numel()), []).append(n)
    for unit, members in kinds.items():
        for some in (members[n : n + MOST_WEIGHTS] for n in range(0, len(members), MOST_WEIGHTS)):
            starts, programs = [], 0
            for n in some:
                starts.append(programs)
                programs += triton.cdiv(weights[n].numel(), BLOCK)
            served = tuple(weights[n].detach() for n in some)
            norms = served if rms is None else tuple(rms[n] for n in some)  # served only stands in, it is not read
            _update[(programs,)](
                served, tuple(gradients[n].contiguous() for n in some), tuple(trained[n] for n in some), norms,
                tuple(starts), tuple(w.numel() // unit for w in served), lr, decay, eps, rms is not None, unit, BLOCK,
                num_warps=WARPS,
            )  # fmt: skip
