"""Recurrent layers that run at the same time: layer n+1 begins when layer n has finished its first part of the window.

That is possible because every dropout mask of a window is known before its first step. What a layer computes is
unchanged; only gradients of weights are summed over the parts, in the compute type.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from recurlm.config import DropoutConfig
from recurlm.model import dropout as drop

if TYPE_CHECKING:
    from recurlm.model.layers.base import LayerState, RecurrentLayer

CURRENT: ContextVar[Lane | None] = ContextVar("lane", default=None)


class Part(NamedTuple):
    """A part of a window, counted from its start, and the sums of the gradients of a layer's weights over the later ones.

    A part's gradients depend on those of the part after it, so the first part's are the last.
    """

    number: int
    gradients: list[Tensor]


class Lane:
    """A CUDA stream and a thread of its own, because calls of cuDNN overlap only when they come from different threads."""

    def __init__(self, device: torch.device):
        self.stream = torch.cuda.Stream(device)
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="recurlm-lane")
        self.part = Part(0, [])

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """What the function returns, called in the lane's thread on its stream, without a gradient history."""

        def run() -> Any:
            with torch.no_grad(), torch.cuda.stream(self.stream):
                return function(*arguments)

        return self.thread.submit(run).result()

    @contextlib.contextmanager
    def entered(self, part: Part) -> Iterator[None]:
        """Makes this the lane of the library calls of a block of code, which computes this part of a window."""
        token, self.part = CURRENT.set(self), part
        try:
            with torch.cuda.stream(self.stream):
                yield
        finally:
            CURRENT.reset(token)


def overlapped(
    layers: Sequence[RecurrentLayer], x_TBE: Tensor, state: tuple[LayerState, ...], p: DropoutConfig, noise: drop.Noise,
    lanes: Sequence[Lane], parts: int,
) -> tuple[Tensor, Tensor, tuple[LayerState, ...]]:  # fmt: skip
    """(raw_TBH, dropped_TBH, states) of the layers, one lane a layer, the window in `parts` parts; weights are not dropped."""
    main, states = torch.cuda.current_stream(), list(state)
    shares = [p.hidden] * (len(layers) - 1) + [p.output]
    draws = [noise.take() for _ in layers]
    raws, drops = [], []
    gradients: list[list[Tensor]] = [[] for _ in layers]
    for lane in lanes:
        lane.stream.wait_stream(main)
    for number, x in enumerate(x_TBE.chunk(parts)):
        x.record_stream(lanes[0].stream)
        for n, (layer, lane) in enumerate(zip(layers, lanes, strict=True)):
            with lane.entered(Part(number, gradients[n])):
                raw, states[n] = layer(x, states[n], layer.droppable, 0.0, None)
                dropped = drop.locked(raw, shares[n], noise, draws[n])
            if n + 1 < len(layers):
                lanes[n + 1].stream.wait_stream(lane.stream)
                dropped.record_stream(lanes[n + 1].stream)
            x = dropped
        raw.record_stream(main)
        dropped.record_stream(main)
        raws.append(raw)
        drops.append(dropped)
    for lane in lanes:
        main.wait_stream(lane.stream)
    for leaf in (leaf for layer_state in states for leaf in layer_state):
        leaf.record_stream(main)
    return torch.cat(raws), torch.cat(drops), tuple(states)
