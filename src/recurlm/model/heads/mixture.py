"""The mixture of softmaxes (Yang et al. 2018): p(w) = sum_k pi_k p_k(w), which lifts the rank of the softmax's logits.

All in logarithms, and the loss without the experts' distributions: log sum_k pi_k p_k(y) = logsumexp_k(log pi_k - nll_k),
where the nll of all experts' vectors is one call of the head that they share. (zihangdai/mos adds 1e-8 to p; this does not.)
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Generator, Tensor
from torch.nn.functional import linear

from recurlm.config import ModelConfig
from recurlm.errors import ConfigError, lookup
from recurlm.kernels import mixture_cross_entropy
from recurlm.kernels.cross_entropy import mixed
from recurlm.model import dropout as drop
from recurlm.model import heads
from recurlm.model.heads.base import Head, HeadDropout, Use
from recurlm.model.layers.base import uniform


class MixtureHead(Head):
    """latent_k = tanh(W_k h + b_k), of the embedding's size; pi = softmax(W h); p_k is `model.base` at latent_k."""

    tied = False

    def __init__(self, experts: int, hidden_size: int, latent_size: int, base: Head, generator: Generator):
        super().__init__()
        bound = 1 / math.sqrt(hidden_size)
        self.experts, self.base = experts, base
        self.latent_weight = uniform((experts * latent_size, hidden_size), bound, generator)
        self.latent_bias = uniform((experts * latent_size,), bound, generator)
        self.prior_weight = uniform((experts, hidden_size), bound, generator)

    @classmethod
    def build(cls, vocab_size: int, hidden_size: int, config: ModelConfig, generator: Generator) -> MixtureHead:
        latent_size = config.embedding_size
        base = _base(config).build(vocab_size, latent_size, config, generator)
        return cls(config.experts, hidden_size, latent_size, base, generator)

    @classmethod
    def settle(cls, config: ModelConfig, hidden_size: int, use: Use) -> tuple[ModelConfig, str]:
        return _base(config).settle(config, config.embedding_size, use._replace(rows=use.rows * config.experts))

    def blocks(self) -> dict[str, tuple[int, ...]]:
        K, base = self.experts, self.base.blocks()
        own = {"latent_weight": (K, 1), "latent_bias": (K,), "prior_weight": (1, 1)}
        return own | {f"base.{name}": counts for name, counts in base.items()} if base else {}

    def latents(self, hidden_NH: Tensor, dropout: HeadDropout | None = None) -> Tensor:
        """latents_NKE; in training one mask for all time steps is on them."""
        weight, bias = self.latent_weight.to(hidden_NH.dtype), self.latent_bias.to(hidden_NH.dtype)
        latents_NF = linear(hidden_NH, weight, bias).tanh()
        if dropout is not None:
            latents_TBF = latents_NF.view(-1, dropout.batch, latents_NF.shape[1])
            latents_NF = drop.locked(latents_TBF, dropout.p, dropout.source).flatten(0, 1)
        return latents_NF.unflatten(1, (self.experts, -1))

    def log_prior(self, hidden_NH: Tensor) -> Tensor:
        """log_pi_NK."""
        x_NK = linear(hidden_NH, self.prior_weight.to(hidden_NH.dtype))
        return x_NK.to(torch.promote_types(x_NK.dtype, torch.float32)).log_softmax(-1)

    def nll(
        self, hidden_NH: Tensor, targets_N: Tensor, embedding_VE: Tensor, dropout: HeadDropout | None = None
    ) -> Tensor:
        rows_RE, log_prior_NK = self.latents(hidden_NH, dropout).flatten(0, 1), self.log_prior(hidden_NH)
        if output := self.base.output(embedding_VE):
            return mixture_cross_entropy(rows_RE, *output, targets_N, log_prior_NK)
        targets_R = targets_N[:, None].expand(-1, self.experts).flatten()
        return mixed(log_prior_NK, self.base.nll(rows_RE, targets_R, embedding_VE))

    def log_probs(self, hidden_NH: Tensor, embedding_VE: Tensor, dropout: HeadDropout | None = None) -> Tensor:
        """One expert after the other, so that no more than two distributions are there at once."""
        latents_NKE, log_prior_NK = self.latents(hidden_NH, dropout), self.log_prior(hidden_NH)
        weighted = (
            self.base.log_probs(latents_NKE[:, k], embedding_VE) + log_prior_NK[:, k, None] for k in range(self.experts)
        )
        return functools.reduce(torch.logaddexp, weighted)

    def sample(self, hidden_NH: Tensor, embedding_VE: Tensor, generator: Generator) -> Tensor:
        """A word of an expert that is drawn first."""
        chosen_N = self.log_prior(hidden_NH).exp().multinomial(1, generator=generator).squeeze(1)
        latents_NKE = self.latents(hidden_NH)
        rows_NE = latents_NKE[torch.arange(len(chosen_N), device=chosen_N.device), chosen_N]
        return self.base.sample(rows_NE, embedding_VE, generator)


def _base(config: ModelConfig) -> type[Head]:
    """The head of each expert."""
    base = lookup(heads.HEADS, config.base, "model.base")
    if base is MixtureHead:
        raise ConfigError("model.base = 'mixture': a mixture of mixtures is a mixture; raise model.experts instead.")
    return base
