"""The product of a QRNN's window, a linear map of each input and the ones before it, without a copy that joins them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class _Window(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TBI: Tensor, previous_WBI: Tensor, weight: Tensor):  # type: ignore[override]
        ctx.save_for_backward(x_TBI, previous_WBI, weight)
        T, B, I = x_TBI.shape  # noqa: E741
        parts, x_NI = weight.split(I, dim=1), x_TBI.reshape(T * B, I)
        out_NG = x_NI @ parts[0].T
        for back, part in _older(parts):
            here = min(back, T)
            out_NG[here * B :].addmm_(x_NI[: (T - here) * B], part.T)
            start = len(previous_WBI) - back
            out_NG[: here * B].addmm_(previous_WBI[start : start + here].reshape(-1, I), part.T)
        return out_NG.view(T, B, -1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_TBG: Tensor):  # type: ignore[override]
        x_TBI, previous_WBI, weight = ctx.saved_tensors
        T, B, I = x_TBI.shape  # noqa: E741
        grad_NG, x_NI = grad_TBG.reshape(T * B, -1), x_TBI.reshape(T * B, I)
        parts, grad_weight, grad_previous = weight.split(I, dim=1), torch.empty_like(weight), None
        grads = grad_weight.split(I, dim=1)
        grad_NI = grad_NG @ parts[0]
        torch.mm(grad_NG.T, x_NI, out=grads[0])
        if ctx.needs_input_grad[1]:
            grad_previous = torch.zeros_like(previous_WBI)
        for (back, part), grad_part in zip(_older(parts), grads[1:], strict=True):
            here = min(back, T)
            start = len(previous_WBI) - back
            previous_NI = previous_WBI[start : start + here].reshape(-1, I)
            torch.mm(grad_NG[here * B :].T, x_NI[: (T - here) * B], out=grad_part)
            grad_part.addmm_(grad_NG[: here * B].T, previous_NI)
            grad_NI[: (T - here) * B].addmm_(grad_NG[here * B :], part)
            if grad_previous is not None:
                grad_previous[start : start + here] += (grad_NG[: here * B] @ part).view(here, B, I)
        return grad_NI.view(T, B, I), grad_previous, grad_weight


def _older(parts: tuple[Tensor, ...]) -> list[tuple[int, Tensor]]:
    """(steps back, its part of the weight), all but the newest input's."""
    return list(enumerate(parts))[1:]


def window(x_TBI: Tensor, previous_WBI: Tensor, weight: Tensor) -> Tensor:
    """gates_TBG = W [x_t; x_{t-1}; ...; x_{t-k}] with k = len(previous).

    The inputs before the first are in `previous`, oldest first. `weight` is (G, (k + 1) I), its first I columns for the
    newest input.
    """
    return _Window.apply(x_TBI, previous_WBI, weight)  # type: ignore[return-value]
