"""An LSTM layer with its weights resident on the GPU beside cuDNN's, whole: input product, recurrence, weight gradients.

Ours has its sizes padded to a multiple of 16, as training pads them. The peer of a row is the fastest of cuDNN's in the same
type, with its sizes as they are and padded to a multiple of 128;
the other rows are cuDNN as it is commonly called. All are CUDA graphs but those called eager. Large batches are measured
with our kernel too, though `kernels.lstm` leaves most of them to cuDNN. The limit is that of the products' arithmetic at the
rate of a large product.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from recurlm.bench.timing import Row, gemm_rate, gpu_time, in_turn
from recurlm.kernels import lstm_cuda, reference
from recurlm.model import precision

# steps, batch, input width, units, type, targets of forward and backward and of forward alone
SHAPES = (
    (70, 20, 1150, 1150, "bf16", "<= 480 us", "<= 180 us"),
    (70, 80, 1150, 1150, "bf16", "<= 800 us", ""),
    (200, 128, 1840, 1840, "bf16", ">= 1.5 times", ""),
    (70, 32, 1024, 1024, "fp16", "<= peer", ""),
    (70, 20, 1150, 400, "bf16", "", ""),
)
TYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Layer = Callable[[Tensor, Tensor, Tensor, Sequence[Tensor]], tuple[Tensor, ...]]


def layer(function: Layer, T: int, B: int, width: int, H: int, dtype: torch.dtype, backward: bool) -> Callable[[], Any]:
    """A call of the layer on random values of its own, and of its gradients but the first state's."""

    def values(*shape: int) -> Tensor:
        return (2 * torch.rand(*shape, device="cuda") - 1).to(dtype)

    x_TBI, h_BH, c_BH, upstream = values(T, B, width), values(B, H), values(B, H), values(T, B, H)
    weights = [values(*shape) * H**-0.5 for shape in ((4 * H, width), (4 * H, H), (4 * H,), (4 * H,))]
    leaves = [t.requires_grad_(backward) for t in (x_TBI, *weights)]

    def call() -> Any:
        y_TBH = function(x_TBI, h_BH, c_BH, weights)[0]
        return torch.autograd.grad(y_TBH, leaves, upstream) if backward else y_TBH

    return call


def time(function: Layer, shape: Sequence[int], dtype: str, backward: bool, graph: bool = True) -> float:
    """Microseconds of a layer of the shape (T, B, I, H), caches cold."""
    T, B, width, H = shape
    nbytes = TYPES[dtype].itemsize * (4 * H * (width + H) + T * B * (10 * H + width))
    with precision.applied(precision.resolve_dtype("tf32" if dtype == "tf32" else "fp32", torch.device("cuda"))):
        works = in_turn(lambda: layer(function, T, B, width, H, TYPES[dtype], backward), nbytes)
        return gpu_time(works, graph=graph, repeats=8)


def resident(x_TBI: Tensor, h_BH: Tensor, c_BH: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """`lstm_cuda.lstm` for batches of any size."""
    layouts = lstm_cuda.best(h_BH.shape[-1], x_TBI.shape[1], torch.cuda.current_device())
    return lstm_cuda.lstm(x_TBI, h_BH, c_BH, weights, layouts)


def padded(size: int, multiple: int = 128) -> int:
    return -(-size // multiple) * multiple


def rows() -> list[dict[str, Any]]:
    """The layers, and for the first shape cuDNN in every type."""
    found = []

    def add(
        measure: str, shape: Sequence[int], dtype: str, ours: float, peer: float | None, name: str, target: str, of: int
    ):
        T, B, width, H = shape
        rate = gemm_rate(TYPES[dtype])
        found.append(Row(
            measure=measure, shape=f"T {T}, B {B}, {width} -> {H}, {dtype}", ours_us=ours, peer_us=peer, peer=name, target=target,
            limit_us=of * 8e6 * T * B * H * (width + H) / rate,
        ).as_dict())  # fmt: skip

    for T, B, width, H, dtype, both, forward in SHAPES:
        shape, aligned = (T, B, width, H), (T, B, padded(width), padded(H))
        for backward, target in ((True, both), (False, forward)):
            ours = time(resident, (T, B, padded(width, 16), padded(H, 16)), dtype, backward)
            peers = {
                "cuDNN": time(reference.lstm, shape, dtype, backward),
                "cuDNN, padded": time(reference.lstm, aligned, dtype, backward),
            }
            name = min(peers, key=lambda n: peers[n])
            measure = "LSTM layer, forward + backward" if backward else "LSTM layer, forward"
            add(measure, shape, dtype, ours, peers[name], name, target, 3 if backward else 1)
            torch.cuda.empty_cache()
    T, B, width, H = shape = SHAPES[0][:4]
    for dtype in TYPES:
        for sizes, name in ((shape, "cuDNN"), ((T, B, padded(width), padded(H)), "cuDNN, padded")):
            for graph in (True, False):
                spent = time(reference.lstm, sizes, dtype, True, graph)
                add(f"{name}{'' if graph else ', eager'}, forward + backward", sizes, dtype, spent, None, "", "", 3)
    return found
