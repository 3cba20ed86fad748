"""Scoring and generation: engine, sampling, and the text in and out of `recurlm.load`."""

import math

import pytest
import torch

from recurlm import api, language_model
from recurlm.config import apply_assignments
from recurlm.errors import DataError, RequestError
from recurlm.inference.engine import score_sequences
from recurlm.inference.generate import Sampling, sample_ids, sharpen
from recurlm.text.tokenizers import TOKENIZERS
from support import small_text, tiny_config


@pytest.fixture(scope="module", params=TOKENIZERS)
def model(request, text_file, tmp_path_factory) -> api.LanguageModel:
    """A model of every tokenizer, trained for a few steps."""
    run = tmp_path_factory.mktemp("run") / request.param
    settings = [
        f'data.path="{text_file}"',
        f"tokenizer.kind={request.param}",
        "tokenizer.vocab_size=300" * (request.param == "bpe"),
    ]
    config = apply_assignments(tiny_config("train.max_steps=30"), [s for s in settings if s])
    api.train(config, run, quiet=True)
    return api.load(run)


TEXTS = [
    "the king sees a bird",
    "",
    "the",
    "a zebra é 🙂 drinks",
    "the river follows a stone and the child loves it .",
]


def test_scores_are_those_of_the_model_row_by_row(model):
    scores = model.score_all(TEXTS)
    for text, score in zip(TEXTS, scores, strict=True):
        alone = model.score(text)
        assert alone.ids == score.ids
        assert alone.surprisals == pytest.approx(score.surprisals, abs=1e-4)
        ids = torch.tensor([model.tokenizer.boundary_id, *score.ids])
        log_probs, _ = model.model.advance(ids[:-1, None], model.model.initial_state(1))
        expected = -log_probs[:, 0].gather(-1, ids[1:, None]).squeeze(-1) / math.log(2)
        assert score.surprisals == pytest.approx(expected.tolist(), abs=1e-4)
        assert score.ids[-1] == model.tokenizer.boundary_id
        assert len(score.tokens) == len(score.ids)
    assert scores[1].total > 0  # an empty line still ends


def test_units_and_ends(model):
    bits, nats, log10 = (model.score("the king", unit=u) for u in ("bits", "nats", "log10"))
    assert nats.total == pytest.approx(bits.total * math.log(2), rel=1e-6)
    assert log10.total == pytest.approx(-nats.total / math.log(10), rel=1e-6)
    assert model.score("the king", end=False).surprisals == pytest.approx(bits.surprisals[:-1])
    with pytest.raises(RequestError, match="unit 'hours'"):
        model.score("the", unit="hours")


def test_perplexity_is_the_mean_of_the_scores_and_knows_no_batch(model):
    text = small_text(12, seed=3)
    ids = model.tokenizer.encode(text)
    (nll,) = score_sequences(model.model, [ids.tolist()], model.tokenizer.boundary_id)
    assert model.perplexity(text) == pytest.approx(math.exp(nll.double().mean().item()), rel=1e-5)
    values = model.evaluate_text(text)
    assert values["targets"] == len(ids)
    assert values["ppl"] == pytest.approx(model.perplexity(text), rel=1e-5)
    assert values["bpc"] == pytest.approx(nll.double().sum().item() / math.log(2) / len(text), rel=1e-5)
    assert 0 <= values["top1"] <= values["top5"] <= values["top10"] <= 1
    assert values["top1"] <= values["mrr"] <= 1
    assert model.evaluate_text(text, batch_size=5)["targets"] == len(ids)


def test_long_sequences_are_scored_in_windows(model, monkeypatch):
    ids = model.tokenizer.encode(small_text(20)).tolist()
    (whole,) = score_sequences(model.model, [ids], model.tokenizer.boundary_id)
    monkeypatch.setattr("recurlm.inference.engine.ROW_TOKENS", 7)
    (cut,) = score_sequences(model.model, [ids], model.tokenizer.boundary_id)
    torch.testing.assert_close(cut, whole, rtol=0, atol=1e-4)


def test_generation_repeats_with_its_seed_and_streams_what_it_returns(model):
    one = model.generate("the ", tokens=25, seed=7)
    assert one == model.generate("the ", tokens=25, seed=7)
    assert one.startswith("the ")
    assert one != model.generate("the ", tokens=25, seed=8)
    assert "the " + "".join(model.stream("the ", tokens=25, seed=7)) == one
    assert model.generate("the", tokens=0) == "the"
    assert isinstance(model.generate(tokens=5), str)


def test_greedy_is_top_1_and_cold(model):
    greedy = model.generate("the king", tokens=15, temperature=0)
    assert greedy == model.generate("the king", tokens=15, top_k=1, seed=3)
    assert greedy == model.generate("the king", tokens=15, temperature=1e-4, seed=3)
    assert greedy == model.generate("the king", tokens=15, top_p=1e-9, seed=4)


def test_generation_stops_before_the_stop_string(model):
    free = model.generate("the ", tokens=40, seed=11)
    for stop in (free[6:9], free[20:21], "never to be seen"):
        stopped = model.generate("the ", tokens=40, seed=11, stop=stop)
        at = free.find(stop, 4)
        assert stopped == (free[:at] if at >= 0 else free)


def test_the_unknown_word_is_never_drawn(model):
    if model.tokenizer.unk_id is None:
        pytest.skip("this tokenizer has no unknown id")
    assert "<unk>" not in model.generate("the", tokens=300, temperature=3.0, seed=1)


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -1.0},
        {"temperature": math.nan},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"min_p": 2.0},
        {"repetition_penalty": 0.5},
        {"repetition_window": -1},
        {"tokens": -1},
        {"seed": 2**70},
    ],
)
def test_arguments_out_of_range_are_refused(model, bad):
    with pytest.raises(RequestError, match=next(iter(bad))):
        model.generate("the", **bad)


def test_sharpen_follows_its_definition():
    log_probs = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    assert sharpen(log_probs, Sampling()).tolist() == pytest.approx([0.5, 0.3, 0.15, 0.05])
    assert sharpen(log_probs, Sampling(top_k=2)).tolist() == pytest.approx([0.625, 0.375, 0, 0])
    assert sharpen(log_probs, Sampling(top_p=0.79)).tolist() == pytest.approx([0.625, 0.375, 0, 0])
    assert sharpen(log_probs, Sampling(top_p=0.81)).tolist() == pytest.approx([0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0])
    half = sharpen(log_probs, Sampling(temperature=0.5))
    assert half.tolist() == pytest.approx([p * p / 0.365 for p in (0.5, 0.3, 0.15, 0.05)])
    assert sharpen(log_probs, Sampling(top_k=99)).sum().item() == pytest.approx(1)


def test_samples_follow_the_distribution(model):
    state = model.model.initial_state(1)
    start = [model.tokenizer.boundary_id]
    probs = model.model.advance(torch.tensor([start]), state)[0][0, 0].exp()
    generator = torch.Generator().manual_seed(1)
    drawn = [next(iter(sample_ids(model.model, start, 1, Sampling(), generator))) for _ in range(400)]
    counts = torch.bincount(torch.tensor(drawn), minlength=model.model.vocab_size) / 400
    assert (counts - probs).abs().max() < 0.1


def test_a_cold_temperature_and_a_prompt_with_a_space(model):
    assert model.generate("the ", tokens=8, temperature=1e-300) == model.generate("the ", tokens=8, temperature=0)
    prompt = model.tokenizer.encode_prefix("the ")
    if model.tokenizer.decode(prompt) != "the ":  # this tokenizer does not keep the space
        assert "  " not in model.generate("the ", tokens=1, temperature=0)


def test_what_cannot_be_measured_is_refused(model):
    for call in (lambda: model.perplexity("the", batch_size=0), lambda: model.perplexity("\ud800")):
        with pytest.raises(RequestError):
            call()
    with pytest.raises(DataError, match="empty"):
        model.perplexity("")


def test_beam_search_in_text(model):
    greedy = model.generate("the king", tokens=12, temperature=0)
    (one,) = model.beam("the king", tokens=12, beams=1)
    assert one.text == greedy
    found = model.beam("the king", tokens=12, beams=6, num_return=6)
    assert len(found) == 6 and len({path.ids for path in found}) == 6
    assert [path.score for path in found] == sorted((path.score for path in found), reverse=True)
    assert found[0].log_prob >= one.log_prob - 1e-4
    assert all(path.text.startswith("the king") and len(path.ids) == 12 for path in found)
    scored = model.score("the king", unit="nats", end=False)
    ids = [*scored.ids, *found[0].ids]
    (nll,) = score_sequences(model.model, [ids], model.tokenizer.boundary_id)
    assert found[0].log_prob == pytest.approx(-nll[len(scored.ids) :].double().sum().item(), abs=1e-3)


@pytest.mark.parametrize("prompt", ["the king", ""])
@pytest.mark.parametrize("stop", ["\n", "e", " ", ["it .", "th"], ["e", "h", "a", "t", "i", "n"]])
def test_beams_stop_before_the_stop_string(model, prompt, stop):
    stops = [stop] if isinstance(stop, str) else stop
    prompt_ids = model.tokenizer.encode_prefix(prompt).tolist()
    for path in model.beam(prompt, tokens=30, beams=4, num_return=4, stop=stop):
        whole, before = (
            model.tokenizer.decode([*prompt_ids, *ids])[len(prompt) :] for ids in (path.ids, path.ids[:-1])
        )
        assert not any(s in before for s in stops)
        assert path.ended == any(s in whole for s in stops)
        assert not any(s in path.text[len(prompt) :] for s in stops)


def test_neighbours_analogies_and_the_map(model):
    tokenizer = model.tokenizer
    words = [tokenizer.decode([i]) for i in range(tokenizer.vocab_size)]
    known = [w for w in words if "\ufffd" not in w and w.strip() and words.index(w) != tokenizer.boundary_id][:3]
    known = [f" {w}" if f" {w}" in words and w[0].isalnum() else w for w in known]  # as they are looked up
    word, shown = known[0], [i for i in range(len(words)) if not tokenizer.is_byte(i)]
    alike = [i for i in shown if len(word) == 1 or word[0] != " " or (len(words[i]) > 1 and words[i][0] == " ")]
    found = model.neighbours(word, k=4)
    assert len(found) == 4 and word not in [tokenizer.decode([row.id]) for row in found]
    vectors = model.model.embedding
    cosines = torch.nn.functional.cosine_similarity(vectors[alike], vectors[[words.index(word)]])
    assert found[0].score == pytest.approx(cosines.sort(descending=True).values[1].item(), abs=1e-5)
    assert all(row.id < 10 for row in model.neighbours(word, k=4, among=10))
    for method in ("add", "mul"):
        answers = model.analogy(*known, k=3, method=method)
        assert len(answers) == 3 and not {row.id for row in answers} & {words.index(w) for w in known}
    for method in language_model.MAPS:
        picture = model.embedding_map(20, method=method)
        assert picture.tokens == tuple(map(tokenizer.token, shown[:20]))
        assert len(picture.points) == 20 and b"<svg" in picture.svg()


def test_a_word_that_is_not_one_token_is_refused(model):
    with pytest.raises(RequestError, match=r"tokens of this model|not in the vocabulary") as error:
        model.neighbours("kingg sees")
    assert len(str(error.value)) < 400
    with pytest.raises(RequestError, match="no token"):
        model.neighbours("")
    for bad in ({"k": 0}, {"among": -1}):
        with pytest.raises(RequestError, match=next(iter(bad))):
            model.neighbours("\n", **bad)
    for call in (lambda: model.analogy("e", "e", "e", method="div"), lambda: model.embedding_map(5, method="som")):
        with pytest.raises(RequestError, match="method"):
            call()
    for top in (1, 2001):
        with pytest.raises(RequestError, match="top"):
            model.embedding_map(top)
