"""The embedding's gradient on the GPU: gradient rows added up by id, in a fixed order and in fp32.

Positions are sorted by id by counting how many come before each (all pairs are compared, which is quick for the few
thousand positions of a training step; more are sorted by torch); then one program for each id that occurs adds up its
rows.
"""

# Triton's kernels are not Python to a type checker:
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

POSITIONS, OTHERS = 16, 256  # a tile of comparisons
ROWS, FEATURES = 32, 128  # a tile of rows that are added up
CLEARED = 8192  # elements that one program sets to zero
MOST = 1 << 14  # positions; beyond, comparing all pairs is slower than sorting


@triton.jit(do_not_specialize=["N", "rankers"])
def _rank(
    ids, places, counts, order, out, N, size, rankers,
    POSITIONS: tl.constexpr, OTHERS: tl.constexpr, CLEARED: tl.constexpr,
):  # fmt: skip
    """Each position's place when sorted by id, how often its id occurs (0 unless it is the first), and the inverse.

    The programs after the first `rankers` clear the output meanwhile.
    """
    if tl.program_id(0) < rankers:
        n = tl.program_id(0) * POSITIONS + tl.arange(0, POSITIONS)
        mine = tl.load(ids + n, mask=n < N, other=0).to(tl.int32)[:, None]
        before = tl.zeros((POSITIONS, OTHERS), tl.int32)
        same = tl.zeros((POSITIONS, OTHERS), tl.int32)
        for start in range(0, N, OTHERS):
            m = start + tl.arange(0, OTHERS)
            theirs = tl.load(ids + m, mask=m < N, other=2147483647).to(tl.int32)[None, :]
            equal = theirs == mine
            earlier = equal & (m[None, :] < n[:, None])
            before += ((theirs < mine) | earlier).to(tl.int32)
            same += equal.to(tl.int32) + (earlier.to(tl.int32) << 16)  # two counts in one: N is below 2^15
        place, same_all = tl.sum(before, 1), tl.sum(same, 1)
        tl.store(places + n, place, mask=n < N)
        tl.store(counts + n, tl.where(same_all < 65536, same_all, 0), mask=n < N)
        tl.store(order + place, n, mask=n < N)
    else:
        at = (tl.program_id(0) - rankers).to(tl.int64) * CLEARED + tl.arange(0, CLEARED)
        tl.store(out + at, tl.zeros((CLEARED,), out.dtype.element_ty), mask=at < size)


@triton.jit
def _add_up(ids, places, counts, order, rows, out, E, ROWS: tl.constexpr, FEATURES: tl.constexpr):
    """out[id] = the sum of the rows of an id's positions, by the program of the first of them."""
    n = tl.program_id(0)
    count = tl.load(counts + n)
    if count > 0:
        place = tl.load(places + n)
        e = tl.program_id(1) * FEATURES + tl.arange(0, FEATURES)
        total = tl.zeros((ROWS, FEATURES), tl.float32)
        for start in range(0, count, ROWS):
            r = start + tl.arange(0, ROWS)
            source = tl.load(order + place + r, mask=r < count, other=0).to(tl.int64)
            keep = (r < count)[:, None] & (e < E)[None, :]
            total += tl.load(rows + source[:, None] * E + e[None, :], mask=keep, other=0.0).to(tl.float32)
        summed = tl.sum(total, 0).to(out.dtype.element_ty)
        tl.store(out + tl.load(ids + n).to(tl.int64) * E + e, summed, mask=e < E)


def gradient(rows_NE: Tensor, ids_N: Tensor, words: int) -> Tensor:
    """grad_VE, V = `words`: the sum of the rows of each id, in the type of the rows; every id must be below V."""
    rows_NE, ids_N = rows_NE.contiguous(), ids_N.contiguous()
    N, E = rows_NE.shape
    if N == 0:
        return rows_NE.new_zeros(words, E)
    with torch.cuda.device_of(rows_NE):  # Triton launches on the current device
        if N > MOST:
            out_VE = rows_NE.new_zeros(words, E)
            ids_N, order = torch.sort(ids_N, stable=True)
            places = torch.arange(N, device=ids_N.device)
            counts = torch.searchsorted(ids_N, ids_N, right=True) - places
            counts[1:] *= ids_N[1:] != ids_N[:-1]
        else:
            out_VE = rows_NE.new_empty(words, E)
            places, counts, order = torch.empty(3, N, dtype=torch.int32, device=ids_N.device)
            rankers = triton.cdiv(N, POSITIONS)
            _rank[(rankers + triton.cdiv(words * E, CLEARED),)](
                ids_N, places, counts, order, out_VE, N, words * E, rankers, POSITIONS, OTHERS, CLEARED, num_warps=4
            )
        _add_up[(N, triton.cdiv(E, FEATURES))](
            ids_N, places, counts, order, rows_NE, out_VE, E, ROWS, FEATURES, num_warps=4
        )
    return out_VE
