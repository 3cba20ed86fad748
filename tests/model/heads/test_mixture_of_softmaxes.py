"""The mixture of softmaxes: equal to its formula over any head, with one mask on its latents, and without large tensors."""

import pytest
import torch

from recurlm.config import DropoutConfig, ModelConfig, load_recipe
from recurlm.errors import ConfigError
from recurlm.model.heads import HEADS
from recurlm.model.heads.base import HeadDropout
from recurlm.model.heads.mixture import MixtureHead
from recurlm.model.neural import NeuralModel

V, H, E, K = 23, 7, 6, 4
BASES = [name for name in HEADS if name != "mixture"]


def build(base, generator):
    config = ModelConfig(embedding_size=E, base=base, experts=K, cutoffs=(5, 11), init_range=0.5)
    return MixtureHead.build(V, H, config, generator).double()


@pytest.mark.parametrize("base", BASES)
def test_loss_and_gradients_are_those_of_the_formula(base, generator):
    """p = sum_k softmax_k(W_p h) p_k(tanh(W_k h + b_k)), by way of probabilities."""
    made = build(base, generator)
    hidden = torch.randn(9, H, generator=generator, dtype=torch.float64, requires_grad=True)
    embedding = torch.randn(V, E, generator=generator, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(V, (9,), generator=generator)
    latents = (hidden @ made.latent_weight.T + made.latent_bias).tanh().view(9, K, E)
    prior = (hidden @ made.prior_weight.T).softmax(-1)
    p = sum(prior[:, k, None] * made.base.log_probs(latents[:, k], embedding).exp() for k in range(K))
    expected = -p.gather(1, targets[:, None]).squeeze(1).log()
    found = made.nll(hidden, targets, embedding)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(made.log_probs(hidden, embedding), p.log())
    leaves = [hidden, *made.parameters(), *([embedding] if made.base.tied else [])]
    for a, b in zip(torch.autograd.grad(found.sum(), leaves), torch.autograd.grad(expected.sum(), leaves), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("base", BASES)
def test_gradcheck_over_every_head(base, generator):
    made = build(base, generator)
    hidden = torch.randn(3, H, generator=generator, dtype=torch.float64, requires_grad=True)
    embedding = torch.randn(V, E, generator=generator, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([2, 7, 20])
    assert torch.autograd.gradcheck(lambda h, e: made.nll(h, targets, e), (hidden, embedding))


def test_one_mask_on_the_latents_for_all_time_steps(generator):
    made = build("tied", generator)
    hidden = torch.ones(5 * 3, H, dtype=torch.float64)
    plain = made.latents(hidden)
    dropped = made.latents(hidden, HeadDropout(0.5, 3, torch.Generator().manual_seed(1))).view(5, 3, K, E)
    zero = dropped == 0
    assert (zero == zero[0]).all() and not (zero[:, 0] == zero[:, 1]).all() and 0.3 < zero[0].double().mean() < 0.7
    torch.testing.assert_close(dropped[~zero], 2 * plain.view(5, 3, K, E)[~zero])


def test_a_training_pass_drops_latents_and_an_evaluation_does_not(generator):
    config = ModelConfig(head="mixture", experts=K, embedding_size=E, hidden_size=H)
    model = NeuralModel(config, V, generator)
    ids = torch.randint(V, (4, 3), generator=generator)
    nothing = DropoutConfig(input=0, hidden=0, output=0, weight=0, latent=0)
    state, noise = model.initial_state(3), torch.Generator()

    def nll(dropout):
        out = model(ids, state, dropout, noise.manual_seed(1))
        return model.nll(out.dropped_TBH, ids, out.head_dropout)

    plain = model.score(ids, ids, state)[0]
    assert torch.equal(nll(nothing), plain)
    latent = DropoutConfig(input=0, hidden=0, output=0, weight=0, latent=0.5)
    assert not torch.equal(nll(latent), plain) and torch.equal(nll(latent), nll(latent))


def test_a_mixture_of_mixtures_is_refused(generator):
    with pytest.raises(ConfigError, match=r"model\.base = 'mixture'"):
        MixtureHead.build(V, H, ModelConfig(base="mixture"), generator)
    with pytest.raises(ConfigError, match=r"model\.base"):
        MixtureHead.build(V, H, ModelConfig(base="softmaxx"), generator)


def test_certain_rows_stay_finite(generator):
    """Where one expert gives the target a probability of 1 and the others one that underflows."""
    made = build("softmax", generator).float()
    made.base.weight.data *= 1e4
    hidden = torch.randn(20, H, generator=generator)
    embedding = torch.zeros(V, E)
    log_probs = made.log_probs(hidden, embedding)
    nll = made.nll(hidden, log_probs.argmax(1), embedding)
    nll.sum().backward()
    assert nll.isfinite().all() and (log_probs.exp().sum(1) - 1).abs().max() < 1e-5
    assert all(p.grad.isfinite().all() for p in made.parameters())


@pytest.mark.parametrize(
    ("recipe", "words", "parameters"),
    [("awd-lstm-mos-ptb", 10_000, 21_500_620), ("awd-lstm-mos-wt2", 33_278, 34_909_528)],
)
def test_the_published_models_have_their_published_sizes(recipe, words, parameters):
    with torch.device("meta"):
        model = NeuralModel(load_recipe(recipe).model, words, torch.Generator("cpu"))
    assert sum(p.numel() for p in model.parameters()) == parameters
