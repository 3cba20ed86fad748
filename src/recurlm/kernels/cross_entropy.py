"""Linear layer and cross-entropy in plain torch with bounded memory: large outputs are made and dropped by rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from recurlm.kernels import reference

LOGITS = 1 << 26  # elements at once


def refuse_second_derivative() -> None:
    """RuntimeError where a backward pass is itself recorded (create_graph=True): its result would count as constant."""
    if torch.is_grad_enabled():
        raise RuntimeError("linear_cross_entropy has no second derivative; call backward without create_graph=True.")


class _ByRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor, targets_N: Tensor, rows: int):  # type: ignore[override]
        parts = [
            reference.linear_cross_entropy(h_RH, weight_VH, bias_V, y_R)
            for h_RH, y_R in zip(hidden_NH.split(rows), targets_N.split(rows), strict=True)
        ]
        ctx.save_for_backward(hidden_NH, weight_VH, bias_V, targets_N)
        ctx.rows = rows
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, upstream_N: Tensor):  # type: ignore[override]
        """P = (softmax - one-hot) * upstream; dh = P W, dW = P' h, db = the column sums of P."""
        refuse_second_derivative()
        hidden_NH, weight_VH, bias_V, targets_N = ctx.saved_tensors
        wide = upstream_N.dtype  # sums over chunks are at least fp32
        dh_NH = torch.empty_like(hidden_NH)
        dw_VH, db_V = torch.zeros_like(weight_VH, dtype=wide), torch.zeros_like(bias_V, dtype=wide)
        for first in range(0, len(targets_N), ctx.rows):
            part = slice(first, first + ctx.rows)
            h_RH, y_R1 = hidden_NH[part], targets_N[part, None]
            p_RV = reference.logits(h_RH, weight_VH, bias_V).softmax(-1)
            p_RV.scatter_add_(1, y_R1, torch.full_like(y_R1, -1, dtype=wide)).mul_(upstream_N[part, None])
            db_V += p_RV.sum(0)
            p_RV = p_RV.to(h_RH.dtype)
            torch.mm(p_RV, weight_VH.to(h_RH.dtype), out=dh_NH[part])
            dw_VH += p_RV.t() @ h_RH
        return dh_NH, dw_VH.to(weight_VH.dtype), db_V.to(bias_V.dtype), None, None


def linear_cross_entropy(hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor, targets_N: Tensor) -> Tensor:
    """nll_N as `reference.linear_cross_entropy` has it, and it itself while the logits have at most LOGITS elements."""
    rows = max(1, LOGITS // weight_VH.shape[0])
    if len(targets_N) <= rows:
        return reference.linear_cross_entropy(hidden_NH, weight_VH, bias_V, targets_N)
    return _ByRows.apply(hidden_NH, weight_VH, bias_V, targets_N, rows)  # type: ignore[return-value]


def cluster_cross_entropies(
    features: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    targets_N: Tensor,
    firsts: Sequence[int],
) -> Tensor:
    """nll_N as `reference.cluster_cross_entropies` has it, of the rows of each cluster alone: the host knows them."""
    nll_N = features[0].new_zeros(len(targets_N), dtype=torch.promote_types(features[0].dtype, torch.float32))
    for h_NF, w_VF, b_V, first in zip(features, weights, biases, firsts, strict=True):
        rows = ((targets_N >= first) & (targets_N < first + len(w_VF))).nonzero().squeeze(1)
        nll_R = linear_cross_entropy(h_NF[rows], w_VF, b_V, targets_N[rows] - first)
        nll_N = nll_N.index_add(0, rows, nll_R)
    return nll_N


def mixture_cross_entropy(
    rows_RD: Tensor, weight_VD: Tensor, bias_V: Tensor, targets_N: Tensor, log_prior_NK: Tensor
) -> Tensor:
    """nll_N as `reference.mixture_cross_entropy` has it, in bounded memory."""
    targets_R = targets_N[:, None].expand_as(log_prior_NK).flatten()
    return mixed(log_prior_NK, linear_cross_entropy(rows_RD, weight_VD, bias_V, targets_R))


def mixed(log_prior_NK: Tensor, nll_R: Tensor) -> Tensor:
    """nll_N = -logsumexp_k(log pi_k - nll_k); `nll_R` are the experts' of each token in turn, R = N K."""
    return _Mixed.apply(log_prior_NK, nll_R.view_as(log_prior_NK))  # type: ignore[return-value]


class _Mixed(torch.autograd.Function):
    """Half the operations that autograd would make of logsumexp: on a GPU these tiny ones took 5 % of the loss's time."""

    @staticmethod
    def forward(ctx, log_prior_NK: Tensor, nll_NK: Tensor):  # type: ignore[override]
        x_NK = log_prior_NK - nll_NK
        log_share_NK = x_NK.log_softmax(1)
        ctx.save_for_backward(log_share_NK)
        return log_share_NK.amax(1) - x_NK.amax(1)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream_N: Tensor):  # type: ignore[override]
        (log_share_NK,) = ctx.saved_tensors
        grad_NK = log_share_NK.exp() * upstream_N[:, None]
        return -grad_NK, grad_NK


def mean(nll: Tensor) -> Tensor:
    """The mean, whose gradient is an expanded tensor: a kernel can tell that it is one number for all."""
    return _Mean.apply(nll)  # type: ignore[return-value]


class _Mean(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor):  # type: ignore[override]
        ctx.shape = x.shape
        return x.mean()

    @staticmethod
    def backward(ctx, upstream: Tensor):  # type: ignore[override]
        return (upstream / ctx.shape.numel()).expand(ctx.shape)
