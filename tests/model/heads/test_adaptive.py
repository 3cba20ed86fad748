"""Adaptive softmaxes: torch's own module as the truth, the formula of tombstones, cut points and their cost."""

import itertools

import numpy as np
import pytest
import torch

from recurlm import api
from recurlm.config import ModelConfig
from recurlm.errors import ConfigError
from recurlm.kernels import reference
from recurlm.model.heads import HEADS, adaptive, cuts
from recurlm.model.heads.base import Use
from recurlm.model.neural import NeuralModel
from support import tiny_config

V, H = 50, 16


def build(head, generator, cutoffs=(6, 20, 35), div=2.0):
    config = ModelConfig(embedding_size=H, cutoffs=cutoffs, div=div, init_range=0.5)
    made = HEADS[head].build(V, H, config, generator).double()
    for p in made.parameters():
        p.data.normal_(generator=generator)
    return made


def given(generator, rows=40):
    hidden = torch.randn(rows, H, generator=generator, dtype=torch.float64, requires_grad=True)
    embedding = torch.randn(V, H, generator=generator, dtype=torch.float64, requires_grad=True)
    return hidden, torch.randint(V, (rows,), generator=generator), embedding


def test_projected_tails_are_those_of_torch(generator):
    made = build("adaptive", generator)
    peer = torch.nn.AdaptiveLogSoftmaxWithLoss(H, V, [6, 20, 35], div_value=2.0, head_bias=True).double()
    peer.head.weight.data, peer.head.bias.data = made.weight.data, made.bias.data
    for n, (down, up) in enumerate(peer.tail):
        assert made.projections[n].shape[0] == 8  # 16/2, and 4 and 2 rounded up
        down.weight.data, up.weight.data = made.projections[n].data, made.weights[n].data
        made.biases[n].data.zero_()  # torch has none there
    hidden, targets, embedding = given(generator)
    found, expected = made.nll(hidden, targets, embedding), peer(hidden, targets)
    torch.testing.assert_close(found, -expected.output)
    torch.testing.assert_close(made.log_probs(hidden, embedding), peer.log_prob(hidden))
    ours = torch.autograd.grad(found.mean(), [hidden, made.weight, *made.projections, *made.weights])
    tails = [layer.weight for k in (0, 1) for layer in (pair[k] for pair in peer.tail)]
    theirs = torch.autograd.grad(expected.loss, [hidden, peer.head.weight, *tails])
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_tombstones_over_the_tied_matrix(generator):
    made = build("tied-adaptive", generator)
    hidden, targets, embedding = given(generator)
    nll = made.nll(hidden, targets, embedding)
    logits = hidden @ embedding.T + made.bias
    graves = hidden @ made.tombstones.T + made.tombstone_bias
    short = torch.cat((logits[:, :6], graves), 1).log_softmax(1)
    spans = [(6, 20), (20, 35), (35, 50)]
    tails = [logits[:, a:b].log_softmax(1) + short[:, 6 + k, None] for k, (a, b) in enumerate(spans)]
    expected = torch.cat((short[:, :6], *tails), 1)
    torch.testing.assert_close(made.log_probs(hidden, embedding), expected)
    torch.testing.assert_close(nll, -expected.gather(1, targets[:, None]).squeeze(1))
    leaves = [hidden, embedding, *made.parameters()]
    for a, b in zip(
        torch.autograd.grad(nll.sum(), leaves),
        torch.autograd.grad(-expected.gather(1, targets[:, None]).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("head", ["adaptive", "tied-adaptive"])
@pytest.mark.parametrize("only", [None, range(6), range(6, 20), range(35, 50), (2, 49)])
def test_tails_that_compute_all_rows_give_the_same(head, only, generator, monkeypatch):
    made = build(head, generator)
    hidden, targets, embedding = given(generator)
    if only is not None:
        targets = torch.tensor(list(only))[targets % len(only)]
    leaves = [hidden, embedding, *made.parameters()]

    def outcome():
        nll = made.nll(hidden, targets, embedding)
        return [nll, *torch.autograd.grad(nll.sin().sum(), leaves, materialize_grads=True)]

    plain = outcome()
    monkeypatch.setattr(adaptive.kernels, "cluster_cross_entropies", reference.cluster_cross_entropies)
    for a, b in zip(plain, outcome(), strict=True):
        torch.testing.assert_close(a, b)


def test_cut_points_cost_least_of_all_on_the_grid(monkeypatch):
    monkeypatch.setattr(cuts, "GRID", 12)
    counts = cuts.zipf(3000)
    grid = sorted({int(n) for n in np.geomspace(16, 3000, 12)} - {3000})
    for device, rows, div in itertools.product(("cpu", "cuda"), (30, 1000, 50_000), (1.0, 4.0)):
        size_of = adaptive.tail_sizes(64, div).__getitem__
        every = [c for n in range(cuts.MOST_TAILS + 1) for c in itertools.combinations(grid, n)]
        best = min(cuts.expected_cost(counts, c, size_of, rows, cuts.COSTS[device]) for c in every)
        found = cuts.best_cuts(counts, size_of, rows, device)
        assert cuts.expected_cost(counts, found, size_of, rows, cuts.COSTS[device]) == pytest.approx(best)


def test_projected_words_are_rare_ones():
    counts = cuts.zipf(20_000)
    use = Use(lambda: counts, 1000, "cpu")
    for head, least in (("adaptive", adaptive.SHORTLIST), ("tied-adaptive", 0.0)):
        settled, why = HEADS[head].settle(ModelConfig(), 256, use)
        assert counts[: settled.cutoffs[0]].sum() / counts.sum() >= least
        assert f"cut points {settled.cutoffs[0]:,}" in why and "the CPU" in why
    assert HEADS["adaptive"].settle(ModelConfig(cutoffs=(5,)), 256, use) == (ModelConfig(cutoffs=(5,)), "")


def test_where_nothing_is_gained_the_whole_vocabulary_is_the_shortlist(generator):
    use = Use(lambda: np.ones(30), 10, "cpu")
    settled, why = HEADS["tied-adaptive"].settle(ModelConfig(), 256, use)
    assert settled.cutoffs == (30,) and "cut points none" in why
    made = HEADS["tied-adaptive"].build(30, 256, settled, generator)
    assert made.bounds == (0, 30) and [name for name, _ in made.named_parameters()] == ["bias"]


def test_cut_points_must_rise_and_those_beyond_the_vocabulary_are_left_out(generator):
    assert build("adaptive", generator, (6, 500, 900)).bounds == (0, 6, V)
    for wrong in ((6, 6), (20, 6)):
        with pytest.raises(ConfigError, match=r"model\.cutoffs"):
            build("adaptive", generator, wrong)


def test_sizes_of_tails():
    assert adaptive.tail_sizes(400, 4.0)[:5] == (400, 104, 32, 8, 8)
    assert adaptive.tail_sizes(6, 2.0)[:3] == (6, 6, 6)
    assert set(adaptive.tail_sizes(400, 1.0)) == {400}


def test_topk_leaves_tails_closed_that_cannot_matter(generator, monkeypatch):
    made = build("adaptive", generator)
    made.bias.data[6:] = -50.0  # no tail has any mass
    opened = []
    real = adaptive._log_softmax
    monkeypatch.setattr(adaptive, "_log_softmax", lambda cluster, h: (opened.append(len(h)), real(cluster, h))[1])
    hidden, _, embedding = given(generator, 7)
    values, _ = made.topk(hidden, 3, embedding)
    assert opened == [7, 0, 0, 0]
    assert values.isfinite().all()


def test_adaptive_inputs_are_the_factors_of_a_tied_matrix(generator):
    """The head over tables and projections equals the head over the matrix that they multiply to, gradients too."""
    config = ModelConfig(
        head="tied-adaptive", adaptive_inputs=True, embedding_size=H, hidden_size=H, cutoffs=(6, 20, 35), div=2
    )
    model = NeuralModel(config, V, generator).double()
    assert [tuple(t.shape) for t in model.embedding.tables] == [(6, 16), (14, 8), (15, 8), (15, 8)]
    matrix, (hidden, targets, _) = model.vectors(), given(generator)
    ids = torch.arange(V).view(10, 5)
    torch.testing.assert_close(model.embedding(ids), matrix[ids])
    factored, whole = (model.head.nll(hidden, targets, e) for e in (model.embedding, matrix))
    torch.testing.assert_close(factored, whole)
    torch.testing.assert_close(model.head.log_probs(hidden, model.embedding), model.head.log_probs(hidden, matrix))
    leaves = [hidden, *model.head.parameters(), *model.embedding.parameters()]
    for a, b in zip(torch.autograd.grad(factored.sum(), leaves), torch.autograd.grad(whole.sum(), leaves), strict=True):
        torch.testing.assert_close(a, b)
    upstream = torch.randn(10, 5, H, generator=generator, dtype=torch.float64)
    for a, b in zip(
        torch.autograd.grad((model.embedding(ids) * upstream).sum(), list(model.embedding.parameters())),
        torch.autograd.grad((model.vectors()[ids] * upstream).sum(), list(model.embedding.parameters())),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("head", ["tied-adaptive", "mixture"])
def test_a_run_with_adaptive_inputs_trains_resumes_and_is_used(head, text_file, tmp_path):
    settings = (f'data.path="{text_file}"', f"model.head={head}", "model.base=tied-adaptive", "model.adaptive_inputs=true",
                "model.cutoffs=[8,20]", "model.div=2", "model.experts=2", "train.max_steps=8")  # fmt: skip
    run = tmp_path / "run"
    assert api.train(tiny_config(*settings), run, quiet=True).finished
    assert api.train(tiny_config(*settings, "train.max_steps=12"), run, resume=True, quiet=True).step == 12
    model = api.load(run)
    assert model.score("the king").total > 0 and len(model.generate("the", tokens=5, seed=1)) > 3
    assert model.neighbours("king", k=2) and model.parameters == sum(p.numel() for p in model.model.parameters())


def test_adaptive_inputs_need_a_head_to_share_with(generator):
    for settings in ({"head": "tied"}, {"head": "mixture", "base": "softmax"}):
        with pytest.raises(ConfigError, match=r"model\.adaptive_inputs"):
            NeuralModel(ModelConfig(adaptive_inputs=True, **settings), V, generator)
