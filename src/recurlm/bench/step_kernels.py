"""Small kernels of a training step on a GPU beside torch's: the activation penalties and the embedding's gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from recurlm import kernels
from recurlm.bench.timing import Row, copy_bandwidth, gpu_time
from recurlm.kernels import reference

SIZES = {"PTB": (70, 20, 10000), "WT2": (70, 80, 33278), "WT103": (140, 60, 267735)}  # time, batch, vocabulary
FEATURES = 400
EMBEDDING_TARGETS = {"PTB": "12 us"}


def rows() -> list[dict[str, Any]]:
    """Two rows for each data set, in bfloat16."""
    return [_penalties(name) for name in SIZES] + [_embedding(name) for name in SIZES]


def _penalties(name: str) -> dict[str, Any]:
    T, B, _ = SIZES[name]
    raw, dropped = (torch.randn(T, B, FEATURES, device="cuda").bfloat16().requires_grad_() for _ in range(2))

    def work(function: Any) -> tuple[Tensor, ...]:
        ar, tar = function(raw, dropped, 2.0, 1.0)
        return torch.autograd.grad(ar + tar, (raw, dropped))

    return _row("activation penalties", (T, B, FEATURES), 3 * (raw.nbytes + dropped.nbytes), "",
                gpu_time(lambda: work(kernels.penalties)), gpu_time(lambda: work(reference.penalties)))  # fmt: skip


def _embedding(name: str) -> dict[str, Any]:
    from recurlm.kernels import embedding_triton

    T, B, V = SIZES[name]
    gradients = torch.randn(T * B, FEATURES, device="cuda").bfloat16()
    ids = (V ** torch.rand(T * B, device="cuda", dtype=torch.float64)).long() - 1  # density 1 / id, as Zipf has it

    def ours() -> Tensor:
        return embedding_triton.gradient(gradients, ids, V)

    def theirs() -> Tensor:
        return torch.ops.aten.embedding_dense_backward(gradients, ids, V, -1, False)

    size = gradients.nbytes + V * FEATURES * gradients.element_size()
    return _row("gradient of the embedding", (T * B, FEATURES, V), size, EMBEDDING_TARGETS.get(name, ""),
                gpu_time(ours), gpu_time(theirs))  # fmt: skip


def _row(
    measure: str, shape: tuple[int, ...], size: int, target: str, ours_us: float, peer_us: float
) -> dict[str, Any]:
    """The row of an operation that reads and writes `size` bytes."""
    return Row(
        measure=measure, shape=f"{' x '.join(f'{n:,}' for n in shape)} bf16", ours_us=ours_us, peer_us=peer_us, peer="torch",
        limit_us=1e6 * size / copy_bandwidth(), target=target,
    ).as_dict()  # fmt: skip


if __name__ == "__main__":
    for row in rows():
        print({key: value for key, value in row.items() if value})
