"""The truth: each fast kernel's slow, obvious twin in plain torch, differentiable by autograd."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

GATES = {"f": 2, "fo": 3, "ifo": 4}
"""Gates of each QRNN pooling, in the order Z, F, O, I along the last axis."""
MANY = 1 << 16  # words


def pool(
    gates_TBG: Tensor, c_BH: Tensor, scale: Tensor | float | None, pooling: str, bias_G: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(h_TBH, last c_BH) of QRNN pooling from pre-activations Z, F, O, I (as many as the pooling has, G = GATES H).

    z = tanh Z, f = scale * sigmoid F, o = sigmoid O, i = scale * sigmoid I.
    f:   c_t = f_t z_t + (1 - f_t) c_{t-1};  h_t = c_t.
    fo:  c_t as f;  h_t = o_t c_t.
    ifo: c_t = i_t z_t + (1 - f_t) c_{t-1};  h_t = o_t c_t.
    Bradbury et al. 2017 (Quasi-recurrent neural networks), eq. 3-5, with the f of awd-lstm-lm, which is their 1 - f.
    `scale` carries zoneout: a 0/1 mask (T, B, H) in training, the constant 1 - p in evaluation, None for none.
    A bias, of any type, is added to the pre-activations first.
    """
    if bias_G is not None:
        gates_TBG = gates_TBG + bias_G.to(gates_TBG.dtype)
    z_TBH, f_TBH, *rest = gates_TBG.chunk(GATES[pooling], dim=-1)
    z_TBH, f_TBH, rest = z_TBH.tanh(), f_TBH.sigmoid(), [gate.sigmoid() for gate in rest]
    i_TBH = rest[1] if pooling == "ifo" else f_TBH
    if scale is not None:
        f_TBH, i_TBH = f_TBH * scale, i_TBH * scale
    rows = []
    for z_BH, f_BH, i_BH in zip(z_TBH, f_TBH, i_TBH, strict=True):
        c_BH = i_BH * z_BH + (1 - f_BH) * c_BH
        rows.append(c_BH)
    h_TBH = torch.stack(rows)
    return (rest[0] * h_TBH if rest else h_TBH), c_BH


def logits(hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor) -> Tensor:
    """logits_NV in fp32 (or the input's type when wider); the product runs in the type of `hidden_NH`."""
    out_NV = linear(hidden_NH, weight_VH.to(hidden_NH.dtype), bias_V.to(hidden_NH.dtype))
    return out_NV.float() if out_NV.dtype in (torch.bfloat16, torch.float16) else out_NV


def linear_log_softmax(hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor) -> Tensor:
    """log_probs_NV = log softmax(W h_n + b), fp32 or wider; exponentials of a row sum to 1 within 1e-6.

    Of many words torch's sum in fp32 on the CPU is off by 3e-6 (268 k words); one in fp64 puts it right.
    """
    log_probs_NV = logits(hidden_NH, weight_VH, bias_V).log_softmax(-1)
    if log_probs_NV.dtype == torch.float32 and len(weight_VH) > MANY:
        log_probs_NV = log_probs_NV - log_probs_NV.exp().sum(-1, keepdim=True, dtype=torch.float64).log().float()
    return log_probs_NV


def linear_cross_entropy(hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor, targets_N: Tensor) -> Tensor:
    """nll_N = -log softmax(W h_n + b) at the target, in nats, fp32 or wider."""
    return cross_entropy(logits(hidden_NH, weight_VH, bias_V), targets_N, reduction="none")


def mixture_cross_entropy(
    rows_RD: Tensor, weight_VD: Tensor, bias_V: Tensor, targets_N: Tensor, log_prior_NK: Tensor
) -> Tensor:
    """nll_N = -log sum_k pi_k p_k(y): rows_RD are the K experts' vectors of each token in turn, each with a softmax(W h + b).

    In logarithms: -logsumexp_k(log pi_k - nll_k), fp32 or wider.
    """
    targets_R = targets_N[:, None].expand_as(log_prior_NK).flatten()
    nll_R = linear_cross_entropy(rows_RD, weight_VD, bias_V, targets_R)
    return -(log_prior_NK - nll_R.view_as(log_prior_NK)).logsumexp(1)


def cluster_cross_entropies(
    features: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    targets_N: Tensor,
    firsts: Sequence[int],
) -> Tensor:
    """nll_N as `linear_cross_entropy` has it with cluster k for targets from firsts[k] to firsts[k] + V_k - 1.

    Clusters have features (N, F_k), weights (V_k, F_k) and biases (V_k), and no id in common. 0, without a gradient, for
    targets of none.
    """
    nll_N = features[0].new_zeros(len(targets_N), dtype=torch.promote_types(features[0].dtype, torch.float32))
    for h_NF, w_VF, b_V, first in zip(features, weights, biases, firsts, strict=True):
        inside_N = (targets_N >= first) & (targets_N < first + len(w_VF))
        own_N = linear_cross_entropy(h_NF, w_VF, b_V, torch.where(inside_N, targets_N - first, 0))
        nll_N = nll_N + torch.where(inside_N, own_N, 0)
    return nll_N


def penalties(raw_TBH: Tensor, dropped_TBH: Tensor, ar: float, tar: float) -> tuple[Tensor, Tensor]:
    """(ar * mean(dropped^2), tar * mean((raw_t - raw_{t-1})^2)), fp32 or wider; the constant 0 where there is nothing.

    Activation regularisation, plain and temporal (Merity, McCann & Socher 2017); means over all elements.
    """
    raw_TBH, dropped_TBH = (x if x.dtype == torch.float64 else x.float() for x in (raw_TBH, dropped_TBH))
    nothing = raw_TBH.new_zeros(())
    return (
        ar * dropped_TBH.pow(2).mean() if ar else nothing,
        tar * (raw_TBH[1:] - raw_TBH[:-1]).pow(2).mean() if tar and len(raw_TBH) > 1 else nothing,
    )


def lstm(x_TBI: Tensor, h_BH: Tensor, c_BH: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """(y_TBH, last h_BH, last c_BH) of an LSTM layer by torch's own library (cuDNN or oneDNN), of any type.

    Weights are W_ih (4H, I), W_hh (4H, H), b_ih, b_hh (4H), gates in the order i, f, g, o: c_t = f c_{t-1} + i g;
    h_t = o tanh c_t, with i, f, o = sigmoid and g = tanh of W_ih x_t + b_ih + W_hh h_{t-1} + b_hh.
    """
    training = torch.is_grad_enabled()
    state = [h_BH.unsqueeze(0), c_BH.unsqueeze(0)]
    y_TBH, h, c = torch.lstm(x_TBI, state, list(weights), True, 1, 0.0, training, False, False)
    return y_TBH, h.squeeze(0), c.squeeze(0)


@torch.no_grad()
def dynamic_update(
    weights: Sequence[Tensor], gradients: Sequence[Tensor], trained: Sequence[Tensor], rms: Sequence[Tensor] | None,
    lr: float, decay: float, eps: float,
) -> None:  # fmt: skip
    """Moves `weights` in place: w <- w + min(decay rms, 1) (trained - w) - lr gradient / (rms + eps).

    Krause et al. 2018 (Dynamic evaluation of neural sequence models), section 4, with decay = lambda / mean rms. Without
    `rms` the pull is `decay` and the step lr gradient, for every element.
    """
    for n, (w, g, t) in enumerate(zip(weights, gradients, trained, strict=True)):
        if rms is None:
            w.lerp_(t, decay).sub_(g, alpha=lr)
        else:
            w.lerp_(t, (rms[n] * decay).clamp_(max=1)).addcdiv_(g, rms[n] + eps, value=-lr)
