"""The layers with hidden-to-hidden weights: one cuDNN or oneDNN call for the sequence, or a loop over its steps.

The loop serves what those calls cannot do: variational dropout on h (Gal & Ghahramani 2016) and zoneout (Krueger et
al. 2017).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Generator, Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from recurlm import kernels
from recurlm.model import dropout as drop
from recurlm.model.dropout import Source
from recurlm.model.lanes import CURRENT, Lane
from recurlm.model.layers.base import LayerState, uniform

# True of every call here, and meant: see `run`.
warnings.filterwarnings("ignore", message="RNN module weights are not part of single contiguous chunk")

CUDNN_MODE = {"rnn_relu": 0, "rnn_tanh": 1, "lstm": 2, "gru": 3}  # cudnnRNNMode_t
TORCH = {"rnn_relu": torch.rnn_relu, "rnn_tanh": torch.rnn_tanh, "gru": torch.gru}

SHORT = (torch.bfloat16, torch.float16)
LEAST_STEPS = 4  # of a window whose LSTM keeps its weights on the chip: it loads them once a window

Cell = Callable[[Tensor, Tensor, LayerState], LayerState]
"""(x_BG, r_BG, state) -> state: x and r are the gates' sums from the input and from the hidden-to-hidden product."""


def weights(gates: int, input_size: int, hidden_size: int, generator: Generator) -> list[nn.Parameter]:
    """W_ih, W_hh, b_ih, b_hh in torch's shapes, each U(-1/sqrt(H), 1/sqrt(H))."""
    G, bound = gates * hidden_size, hidden_size**-0.5
    return [uniform(s, bound, generator) for s in ((G, input_size), (G, hidden_size), (G,), (G,))]


def parts(gates: int) -> dict[str, tuple[int, ...]]:
    """The blocks of `weights`; see `RecurrentLayer.parts`."""
    return {"weight_ih": (gates, 1), "weight_hh": (gates, 1), "bias_ih": (gates,), "bias_hh": (gates,)}


def run(
    kind: str,
    cell: Cell,
    x_TBI: Tensor,
    state: LayerState,
    weights: list[Tensor],
    recurrent: float,
    zoneout: tuple[float, ...],
    generator: Source | None,
) -> tuple[Tensor, LayerState]:
    """(y_TBH, new state) of one layer; weights are W_ih, W_hh, b_ih, b_hh in torch's gate order.

    `recurrent` is the dropout of h before the hidden-to-hidden product, one mask for all steps; `zoneout` the
    probability, for each part of the state, that a unit keeps its value (in evaluation the mean takes its place).
    """
    weights = [w.to(x_TBI.dtype) for w in weights]
    # oneDNN lays weights out anew at each call: for one step that takes several times what the step does.
    resident = kind == "lstm" and x_TBI.is_cuda and x_TBI.dtype in SHORT and len(x_TBI) >= LEAST_STEPS
    one_step = len(x_TBI) == 1 and not x_TBI.is_cuda and not torch.is_grad_enabled()
    if not one_step and not any(zoneout) and (recurrent == 0 or generator is None):
        if resident and CURRENT.get() is None:
            y_TBH, h_BH, c_BH = kernels.lstm(x_TBI, state[0], state[1], weights)
            return y_TBH, (h_BH, c_BH)
        out = _call(kind, x_TBI, [leaf.unsqueeze(0) for leaf in state], weights)
        return out[0], tuple(leaf.squeeze(0) for leaf in out[1 : 1 + len(state)])
    mask_BH = None
    if recurrent and generator is not None:
        mask_BH = drop.mask(tuple(state[0].shape), recurrent, state[0], generator).to(state[0].dtype)
    shape = (*x_TBI.shape[:2], state[0].shape[-1])
    return _steps(cell, x_TBI, state, weights, mask_BH, [_keep(shape, p, x_TBI, generator) for p in zoneout])


def pack(kind: str, weights: list[nn.Parameter]) -> None:
    """Makes the weights views of one buffer in cuDNN's layout, so that it need not copy them at each call."""
    if weights[0].is_cuda and torch.backends.cudnn.is_available():
        hidden_size, input_size = weights[1].shape[1], weights[0].shape[1]
        with torch.no_grad():
            torch._cudnn_rnn_flatten_weight(
                list(weights), len(weights), input_size, CUDNN_MODE[kind], hidden_size, 0, 1, False, False
            )


def _buffer(weights: Sequence[Tensor]) -> Tensor | None:
    """The buffer of packed weights, which lie in it in their order; None for others."""
    storage, places = weights[0].untyped_storage(), [w.data_ptr() for w in weights]
    if places != sorted(places) or any(w.untyped_storage().data_ptr() != storage.data_ptr() for w in weights):
        return None
    size = storage.nbytes() // weights[0].element_size()
    return torch.empty(0, dtype=weights[0].dtype, device=weights[0].device).set_(storage, 0, (size,), (1,))  # type: ignore[arg-type]


def _call(kind: str, x_TBI: Tensor, hidden: list[Tensor], weights: list[Tensor]) -> tuple[Tensor, ...]:
    """(y_TBH, *state) by cuDNN or oneDNN.

    cuDNN is called below torch's module, which expects weights as views of one flat buffer; where they are none (a
    dropped weight never is), cuDNN packs them at each call.
    """
    training = torch.is_grad_enabled()
    if x_TBI.is_cuda and torch.backends.cudnn.enabled and torch.backends.cudnn.is_available():
        cell, lane = (hidden[1].contiguous() if len(hidden) > 1 else None), CURRENT.get()
        if lane is not None:
            return _OnLane.apply(lane, CUDNN_MODE[kind], x_TBI, hidden[0].contiguous(), cell, *weights)  # type: ignore[return-value]
        return torch._cudnn_rnn(
            x_TBI, weights, 4, _buffer(weights), hidden[0].contiguous(), cell, CUDNN_MODE[kind], hidden[0].shape[-1], 0, 1,
            False, 0.0, training, False, [], None,
        )  # fmt: skip
    if kind == "lstm":
        return torch.lstm(x_TBI, hidden, weights, True, 1, 0.0, training, False, False)
    return TORCH[kind](x_TBI, hidden[0], weights, True, 1, 0.0, training, False, False)


class _OnLane(torch.autograd.Function):
    """cuDNN's call and its gradient, both in the thread of a lane."""

    @staticmethod
    def forward(ctx, lane: Lane, mode: int, x_TBI: Tensor, h: Tensor, c: Tensor | None, *weights: Tensor):  # type: ignore[override]
        how = mode, h.shape[-1], 0, 1, False, 0.0, True, False, [], None
        y_TBH, h_new, c_new, reserve, buffer = lane.call(
            torch._cudnn_rnn, x_TBI, weights, 4, _buffer(weights), h, c, *how
        )
        ctx.save_for_backward(x_TBI, h, c, y_TBH, reserve, buffer, *weights)
        ctx.lane, ctx.part, ctx.how = lane, lane.part, how
        return (y_TBH, h_new) if c is None else (y_TBH, h_new, c_new)

    @staticmethod
    def backward(ctx, *grads: Tensor):  # type: ignore[override]
        x_TBI, h, c, y_TBH, reserve, buffer, *weights = ctx.saved_tensors
        grad_y, grad_h, grad_c = (*grads, None)[:3]
        dx, dh, dc, dw = ctx.lane.call(
            torch.ops.aten._cudnn_rnn_backward, x_TBI, weights, 4, buffer, h, c, y_TBH, grad_y.contiguous(),  # type: ignore[union-attr]
            grad_h, grad_c, *ctx.how, reserve, [True, True, c is not None, True],
        )  # fmt: skip
        sums = ctx.part.gradients
        if sums:
            ctx.lane.call(torch._foreach_add_, sums, dw)
        else:
            sums.extend(dw)
        dw = sums if ctx.part.number == 0 else [None] * len(sums)
        return None, None, dx, dh, (None if c is None else dc), *dw


def _steps(
    cell: Cell, x_TBI: Tensor, state: LayerState, weights: list[Tensor], mask_BH: Tensor | None,
    keeps: Sequence[Tensor | float],
) -> tuple[Tensor, LayerState]:  # fmt: skip
    """(y_TBH, new state) step by step; `mask_BH` multiplies h before the product, `keeps` see `_keep`."""
    w_ih, w_hh, b_ih, b_hh = weights
    rows, waiting = [], []
    for t, x_BG in enumerate(linear(x_TBI, w_ih, b_ih)):
        h_BH = state[0] if mask_BH is None else state[0] * mask_BH
        r_BG: Tensor = _Recurrent.apply(h_BH, w_hh, b_hh, waiting, t)  # type: ignore[assignment]
        new = cell(x_BG, r_BG, state)
        state = tuple(_zoned(before, after, keep, t) for before, after, keep in zip(state, new, keeps, strict=True))
        rows.append(state[0])
    return torch.stack(rows) if rows else x_TBI.new_empty(0, *state[0].shape), state


class _Recurrent(torch.autograd.Function):
    """The product of step t. Gradients of W and b wait for step 0, the last one backwards: one product of all steps.

    A sum of one product a step would read and write all of W at each, and round to the compute type each time.
    """

    @staticmethod
    def forward(
        ctx, h_BH: Tensor, weight: Tensor, bias: Tensor, waiting: list[tuple[Tensor, Tensor]], t: int
    ) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(h_BH, weight)
        ctx.waiting, ctx.t = waiting, t
        return linear(h_BH, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, dr_BG: Tensor):  # type: ignore[override]
        h_BH, weight = ctx.saved_tensors
        dh_BH = dr_BG @ weight if ctx.needs_input_grad[0] else None
        if any(ctx.needs_input_grad[1:3]):
            ctx.waiting.append((dr_BG, h_BH))
        if ctx.t or not ctx.waiting:
            return dh_BH, None, None, None, None
        dr_NG, h_NH = (torch.cat(all_steps) for all_steps in zip(*ctx.waiting, strict=True))
        ctx.waiting.clear()
        return dh_BH, dr_NG.T @ h_NH, dr_NG.sum(0), None, None


def _keep(shape: tuple[int, ...], p: float, like: Tensor, generator: Source | None) -> Tensor | float:
    """A mask of the units that keep their value, drawn for each step, row and unit; p itself in evaluation or for p = 0."""
    if p == 0 or generator is None:
        return p
    return drop.bernoulli(shape, p, like, generator, torch.float32).bool()


def _zoned(before: Tensor, after: Tensor, keep: Tensor | float, t: int) -> Tensor:
    if isinstance(keep, Tensor):
        return torch.where(keep[t], before, after)
    return after.lerp(before, keep) if keep else after
