"""Beam search against brute force, greedy search and its own promises."""

import itertools
import math

import pytest
import torch

from recurlm.config import ModelConfig
from recurlm.errors import RequestError
from recurlm.inference.beam import beam_search
from recurlm.inference.engine import score_sequences
from recurlm.inference.generate import Sampling, sample_ids
from recurlm.model.layers import LAYERS
from recurlm.model.neural import NeuralModel

V, START = 5, 0


@pytest.fixture(scope="module", params=LAYERS)
def model(request) -> NeuralModel:
    """A tiny model of every layer with large random weights, so that its choices differ."""
    config = ModelConfig(layer=request.param, embedding_size=6, hidden_size=6, num_layers=2, init_range=2.0)
    made = NeuralModel(config, V, torch.Generator().manual_seed(8)).requires_grad_(False).eval()
    with torch.no_grad():
        for weight in made.parameters():
            weight.mul_(3)
    return made


def log_prob(model, ids, prompt=(START,)) -> float:
    whole = [*prompt[1:], *ids]
    (nll,) = score_sequences(model, [whole], prompt[0])
    return -float(nll[len(prompt) - 1 :].double().sum())


def brute_force(model, length, prompt=(START,), ids=range(V)):
    paths = list(itertools.product(ids, repeat=length))
    nlls = score_sequences(model, [[*prompt[1:], *path] for path in paths], prompt[0])
    values = [-float(nll[len(prompt) - 1 :].double().sum()) for nll in nlls]
    return sorted(zip(values, paths, strict=True), reverse=True)


@pytest.mark.parametrize("prompt", [(START,), (START, 3, 1, 1)])
def test_with_enough_beams_it_is_exact(model, prompt):
    for length in (1, 2, 3):
        best = brute_force(model, length, prompt)
        for beams in (V ** (length - 1), V**length):
            found = beam_search(model, prompt, length, beams=beams, best=min(beams, 4))
            assert [path.ids for path in found] == [ids for _, ids in best[: len(found)]]
            assert [path.log_prob for path in found] == pytest.approx([v for v, _ in best[: len(found)]], abs=1e-4)
            assert all(path.score == path.log_prob and not path.ended for path in found)


def test_one_beam_is_greedy(model):
    for prompt in itertools.product([START], range(V), range(V)):
        (path,) = beam_search(model, prompt, 12, beams=1)
        assert list(path.ids) == list(sample_ids(model, prompt, 12, Sampling(temperature=0), torch.Generator()))


def test_every_beam_keeps_its_own_state(model):
    for path in beam_search(model, [START, 2], 15, beams=4, best=4):
        assert path.log_prob == pytest.approx(log_prob(model, path.ids, (START, 2)), abs=1e-3)
    assert beam_search(model, [START], 9, beams=3, best=3) == beam_search(model, [START], 9, beams=3, best=3)


def test_forbidden_ids_are_in_no_path(model):
    found = beam_search(model, [START], 3, beams=V**3, best=27, forbidden=[1, 4])
    assert [path.ids for path in found] == [ids for _, ids in brute_force(model, 3, ids=(0, 2, 3))]
    assert len(beam_search(model, [START], 2, beams=16, best=16, forbidden=[0, 1, 2])) == 4  # there are no more


@pytest.mark.parametrize("length_penalty", [0.0, 0.7, 2.0])
def test_paths_that_end_are_found_exactly(model, length_penalty):
    """Every path up to 4 ids that ends with its first 2, and those of 4 ids without one, ranked by the formula."""
    longest, end = 4, 2
    others = [i for i in range(V) if i != end]
    ended = [(*path, end) for n in range(longest) for path in itertools.product(others, repeat=n)]
    open_ = list(itertools.product(others, repeat=longest))
    scored = []
    for ids in [*ended, *open_]:
        value = log_prob(model, ids)
        scored.append((value / ((5 + len(ids)) / 6) ** length_penalty, ids))
    expected = sorted(scored, reverse=True)[:6]
    found = beam_search(
        model, [START], longest, beams=1024, best=6, length_penalty=length_penalty, ends=lambda ids: ids[-1] == end
    )
    assert [path.ids for path in found] == [ids for _, ids in expected]
    assert [path.score for path in found] == pytest.approx([score for score, _ in expected], abs=1e-4)
    assert all(path.ended == (path.ids[-1] == end) for path in found)


def plainly(model, count, beams, best, length_penalty, end):
    """The search as its description has it: every candidate sorted, no early stop, one history a forward pass."""
    open_, done = [((), 0.0)], []
    for _ in range(count):
        candidates = [(ids, log_prob(model, ids)) for path, _ in open_ for ids in [(*path, i) for i in range(V)]]
        open_ = []
        for ids, value in sorted(candidates, key=lambda pair: -pair[1]):
            if len(open_) < beams:
                (done if ids[-1] == end else open_).append((ids, value))
    ranked = [(value / ((5 + len(ids)) / 6) ** length_penalty, ids) for ids, value in done + open_]
    return sorted(ranked, reverse=True)[:best]


@pytest.mark.parametrize("length_penalty", [0.0, 1.5])
def test_few_beams_follow_the_description(model, length_penalty):
    for beams, best, end in itertools.product((1, 2, 3), (1, 2, 3), range(V)):
        if best <= beams:
            found = beam_search(
                model, [START], 5, beams=beams, best=best, length_penalty=length_penalty,
                ends=lambda ids, end=end: ids[-1] == end,
            )  # fmt: skip
            expected = plainly(model, 5, beams, best, length_penalty, end)
            assert [path.ids for path in found] == [ids for _, ids in expected]
            assert [path.score for path in found] == pytest.approx([score for score, _ in expected], abs=1e-4)


def test_the_search_stops_when_nothing_better_can_come(model):
    steps = 0

    def ends(ids):
        nonlocal steps
        steps = max(steps, len(ids))
        return len(ids) == 2

    found = beam_search(model, [START], 10_000, beams=3, best=2, ends=ends)
    assert steps == 2 and all(path.ended for path in found)


def test_nothing_to_search(model):
    (path,) = beam_search(model, [START], 0, beams=3)
    assert (path.ids, path.log_prob, path.ended) == ((), 0.0, False)


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("beams", {"beams": 0}),
        ("beams", {"beams": 1025}),
        ("beams", {"beams": 2.0}),
        ("num_return", {"best": 0}),
        ("num_return", {"best": 5}),
        ("length_penalty", {"length_penalty": -0.1}),
        ("length_penalty", {"length_penalty": 10.1}),
        ("length_penalty", {"length_penalty": math.nan}),
        ("tokens", {"count": -1}),
        ("tokens", {"count": 10**7 + 1}),
    ],
)
def test_arguments_out_of_range_are_refused(model, name, bad):
    with pytest.raises(RequestError, match=f"^{name} = "):
        beam_search(model, [START], **{"count": 3, "beams": 4, **bad})
