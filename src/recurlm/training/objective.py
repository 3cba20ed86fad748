"""What training minimises: a sum of named terms."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from recurlm import kernels
from recurlm.config import ObjectiveConfig
from recurlm.kernels.cross_entropy import mean
from recurlm.model.neural import Activations, NeuralModel
from recurlm.protocol import State, state_leaves


def terms(
    model: NeuralModel,
    activations: Activations,
    targets_TB: Tensor,
    config: ObjectiveConfig,
    counted_TB: Tensor | None = None,
) -> dict[str, Tensor]:
    """The weighted terms by name; their sum is the objective. Only `nll` counts in reported losses.

    nll: mean negative log-likelihood in nats. ar: ar * mean(dropped^2), the last layer's output after dropout.
    tar: tar * mean((raw_t - raw_{t-1})^2), before dropout (Merity, McCann & Socher 2017; means over all elements).
    With `counted_TB` the means are over its true places.
    """
    nll_TB = model.nll(activations.dropped_TBH, targets_TB, activations.head_dropout)
    out = {"nll": mean(nll_TB) if counted_TB is None else nll_TB[counted_TB].mean()}
    if counted_TB is None:
        ar, tar = kernels.penalties(activations.raw_TBH, activations.dropped_TBH, config.ar, config.tar)
        return out | ({"ar": ar} if config.ar else {}) | ({"tar": tar} if config.tar and len(targets_TB) > 1 else {})
    if config.ar:
        out["ar"] = config.ar * activations.dropped_TBH.float().pow(2)[counted_TB].mean()
    if config.tar and targets_TB.shape[0] > 1:
        raw_TBH = activations.raw_TBH.float()
        change_TBH = (raw_TBH[1:] - raw_TBH[:-1]).pow(2)
        out["tar"] = config.tar * change_TBH[counted_TB[1:]].mean()
    return out


def first_nonfinite(named: dict[str, Tensor]) -> str | None:
    """The name of the first tensor that holds a NaN or an infinity."""
    return next((name for name, tensor in named.items() if not bool(torch.isfinite(tensor).all())), None)


def explain_nonfinite(values: dict[str, float], model: NeuralModel, state: State, gradients: dict[str, Tensor]) -> str:
    """One sentence part on a failed step: the term that is not finite, and the first tensor where it began.

    Looks at the weights, then the carried state, then the gradients.
    """
    named = dict(model.named_parameters())
    gradients = {f"gradient of {name}": gradient for name, gradient in gradients.items()}
    carried = {f"carried state {i}": leaf for i, leaf in enumerate(state_leaves(state))}
    weights = {f"weight {name}": p for name, p in named.items()}
    first = first_nonfinite(weights | carried | gradients) or "none (a sum overflows)"
    term = next((name for name, value in values.items() if not math.isfinite(value)), None)
    what = f"the term {term!r} is {values[term]}" if term else "the gradient norm is not finite"
    return f"{what}; first tensor that is not finite: {first}"
