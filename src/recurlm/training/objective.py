"""What training minimises: a sum of named terms."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from recurlm.config import ObjectiveConfig
from recurlm.model.neural import Activations, NeuralModel
from recurlm.protocol import State, state_leaves


def terms(
    model: NeuralModel, activations: Activations, targets_TB: Tensor, config: ObjectiveConfig
) -> dict[str, Tensor]:
    """The weighted terms by name; their sum is the objective. Only `nll` counts in reported losses.

    nll: mean negative log-likelihood in nats. ar: ar * mean(dropped^2), the last layer's output after dropout.
    tar: tar * mean((raw_t - raw_{t-1})^2), before dropout (Merity, McCann & Socher 2017; means over all elements).
    """
    out = {"nll": model.nll(activations.dropped_TBH, targets_TB).mean()}
    if config.ar:
        out["ar"] = config.ar * activations.dropped_TBH.float().pow(2).mean()
    if config.tar and targets_TB.shape[0] > 1:
        raw_TBH = activations.raw_TBH.float()
        out["tar"] = config.tar * (raw_TBH[1:] - raw_TBH[:-1]).pow(2).mean()
    return out


def first_nonfinite(named: dict[str, Tensor]) -> str | None:
    """The name of the first tensor that holds a NaN or an infinity."""
    return next((name for name, tensor in named.items() if not bool(torch.isfinite(tensor).all())), None)


def explain_nonfinite(values: dict[str, float], model: NeuralModel, state: State) -> str:
    """One sentence part on a failed step: the term that is not finite, and the first tensor where it began.

    Looks at the weights, then the carried state, then the gradients.
    """
    named = dict(model.named_parameters())
    gradients = {f"gradient of {name}": p.grad for name, p in named.items() if p.grad is not None}
    carried = {f"carried state {i}": leaf for i, leaf in enumerate(state_leaves(state))}
    weights = {f"weight {name}": p for name, p in named.items()}
    first = first_nonfinite(weights | carried | gradients) or "none (a sum overflows)"
    term = next((name for name, value in values.items() if not math.isfinite(value)), None)
    what = f"the term {term!r} is {values[term]}" if term else "the gradient norm is not finite"
    return f"{what}; first tensor that is not finite: {first}"
