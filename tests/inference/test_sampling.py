"""How the next token is drawn: each option by its definition, their order, and any mixture of them."""

import itertools
import math
import random

import pytest
import torch

from recurlm.errors import RequestError
from recurlm.inference.generate import Sampling, sample_ids, sharpen
from recurlm.protocol import StatefulModel
from support import counts, record

LOG_PROBS = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()


def probabilities(seen: list[bool] | None = None, **options) -> list[float]:
    return sharpen(LOG_PROBS, Sampling(**options), None if seen is None else torch.tensor(seen)).tolist()


class Chain(StatefulModel):
    """A Markov chain over 7 ids."""

    vocab_size = 7
    logits_VV = torch.randn(7, 7, generator=torch.Generator().manual_seed(4))

    def initial_state(self, batch):
        return torch.zeros(batch, 1)

    def advance(self, ids_TB, state):
        return self.logits_VV[ids_TB].log_softmax(-1), state

    def score(self, ids_TB, targets_TB, state):
        log_probs, state = self.advance(ids_TB, state)
        return -log_probs.gather(-1, targets_TB[..., None]).squeeze(-1), state


def test_min_p_keeps_what_has_that_share_of_the_best():
    assert probabilities(min_p=0.31) == pytest.approx([0.625, 0.375, 0, 0])
    assert probabilities(min_p=0.29) == pytest.approx([0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0])
    assert probabilities(min_p=1) == [1, 0, 0, 0]
    assert probabilities(min_p=0) == probabilities()


def test_the_repetition_penalty_is_a_power_of_p_and_knows_no_offset():
    seen = [True, False, False, True]
    powers = [0.5**2, 0.3, 0.15, 0.05**2]
    assert probabilities(seen, repetition_penalty=2) == pytest.approx([p / sum(powers) for p in powers])
    assert probabilities(seen, repetition_penalty=2, temperature=0) == [0, 1, 0, 0]
    certain = torch.tensor([0.0, -math.inf])
    assert sharpen(certain, Sampling(repetition_penalty=9), torch.tensor([True, True])).tolist() == [1, 0]


def test_the_order_is_penalty_temperature_top_k_min_p_top_p():
    def by_hand(seen, penalty, temperature, top_k, min_p, top_p):
        p = [x**penalty if s else x for x, s in zip([0.5, 0.3, 0.15, 0.05], seen, strict=True)]
        p = [x ** (1 / temperature) for x in p]
        best = sorted(range(4), key=lambda i: -p[i])[: top_k or 4]
        best = [i for i in best if p[i] >= min_p * p[best[0]]]
        total, held, kept = sum(p[i] for i in best), 0.0, []
        for i in best:
            if held < top_p * total:
                kept.append(i)
            held += p[i]
        total = sum(p[i] for i in kept)
        return [p[i] / total if i in kept else 0 for i in range(4)]

    cases = itertools.product(
        ([False] * 4, [True, False, False, True]), (1, 1.5), (0.7, 1, 2), (0, 2, 3), (0, 0.4, 0.9), (0.3, 0.6, 0.9, 1)
    )
    for seen, penalty, temperature, top_k, min_p, top_p in cases:
        found = probabilities(
            seen, repetition_penalty=penalty, temperature=temperature, top_k=top_k, min_p=min_p, top_p=top_p
        )
        assert found == pytest.approx(by_hand(seen, penalty, temperature, top_k, min_p, top_p))


@pytest.mark.parametrize("window", [0, 1, 2, 4])
def test_the_window_of_the_penalty_slides_over_the_text(window):
    sampling = Sampling(repetition_penalty=1.7, repetition_window=window, temperature=0)
    prompt = [0, 3, 4, 3]  # the first, that the text starts after, is no part of it
    drawn = list(sample_ids(Chain(), prompt, 40, sampling, torch.Generator()))
    text = prompt[1:]
    for id in drawn:
        row = Chain().advance(torch.tensor([[text[-1]]]), torch.zeros(1, 1))[0][0, 0]
        recent = set(text[-window:])
        assert id == max(range(7), key=lambda i: float(row[i]) * (1.7 if i in recent else 1))
        text.append(id)
    assert len(set(drawn)) > 1


@pytest.mark.parametrize(
    ("option", "values"),
    {
        "repetition_penalty": (0.99, 100.1, math.nan, "2", True),
        "repetition_window": (-1, 10**7 + 1, 1.5, True),
        "temperature": (-0.1, 100.1, math.inf, math.nan, None),
        "top_k": (-1, 2**31, 2.5),
        "min_p": (-0.1, 1.1, math.nan),
        "top_p": (0, 0.0, -0.1, 1.1, math.nan),
    }.items(),
)
def test_every_option_has_both_bounds(option, values):
    for value in values:
        with pytest.raises(RequestError, match=rf"^{option} = .*: expected .*\.$"):
            Sampling(**{option: value})


@pytest.mark.chaos
def test_any_mixture_of_options_draws_only_what_it_left():
    random_ = random.Random(20240701)
    generator = torch.Generator().manual_seed(5)
    cases = counts(200, 1000)
    for _ in range(cases):
        size = random_.choice((2, 3, 17, 300))
        scale = random_.choice((0.0, 0.1, 1.0, 10.0, 300.0))
        log_probs = (scale * torch.randn(size, generator=generator)).log_softmax(-1)
        forbidden = random_.sample(range(size), random_.randrange(min(size, 4)))
        log_probs[forbidden] = -math.inf
        seen = torch.rand(size, generator=generator) < 0.3 if random_.random() < 0.5 else None
        options = Sampling(
            repetition_penalty=random_.choice((1, 1.2, 5, 100)),
            temperature=random_.choice((0, 1e-300, 1e-3, 0.7, 1, 3, 100)),
            top_k=random_.choice((0, 1, 2, 40, 2**31 - 1)),
            min_p=random_.choice((0, 5e-324, 0.05, 0.7, 1)),
            top_p=random_.choice((5e-324, 0.1, 0.9, 1 - 1e-16, 1)),
        )
        probs = sharpen(log_probs, options, seen)
        assert probs.sum().item() == pytest.approx(1, abs=1e-12), options
        assert probs.isfinite().all() and (probs >= 0).all()
        assert (probs[forbidden] == 0).all()
        left = int((probs > 0).sum())
        assert 1 <= left <= (options.top_k or size)
        kept = probs[probs > 0]
        assert kept.min() >= 0.999999 * options.min_p * kept.max()
        if seen is None:
            cut = log_probs[probs == 0]
            assert not cut.numel() or cut.max() <= log_probs[probs > 0].min()  # every cut takes the least probable
        drawn = torch.multinomial(probs, 50, replacement=True, generator=generator)
        assert (probs[drawn] > 0).all()
    record("sampling options", mixtures=cases, draws=50 * cases)
