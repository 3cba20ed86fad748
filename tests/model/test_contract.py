"""What every layer and head must keep, looped over the registries: nothing here names one."""

import math
import resource
import time
from dataclasses import replace

import pytest
import torch

from recurlm.config import DropoutConfig, ModelConfig
from recurlm.model import directory, dropout
from recurlm.model.heads import HEADS
from recurlm.model.heads.base import Use
from recurlm.model.layers import LAYERS
from recurlm.model.neural import NeuralModel
from recurlm.model.precision import FP32
from recurlm.protocol import map_state, state_leaves

V, T, B = 11, 9, 3
PAIRS = [(layer, head) for layer in LAYERS for head in HEADS]
ZONEOUT = [0.0, 0.1]
HEAD = {"cutoffs": (4, 7), "div": 2.0, "experts": 3}  # so that every part of every head is met


def build(layer: str, head: str, generator: torch.Generator, zoneout: float = 0.1) -> NeuralModel:
    config = ModelConfig(
        layer=layer,
        head=head,
        embedding_size=6,
        hidden_size=7,
        num_layers=2,
        windows=(3, 2),
        zoneout=zoneout,
        zoneout_hidden=zoneout / 2,
        init_range=0.5,
        **HEAD,
    )
    return NeuralModel(config, V, generator).double()


def ids(generator: torch.Generator, shape=(T, B)) -> torch.Tensor:
    return torch.randint(V, shape, generator=generator)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("zoneout", ZONEOUT)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_layer_gradcheck(layer, zoneout, seed):
    g = torch.Generator().manual_seed(seed)
    config = ModelConfig(windows=(2,), zoneout=zoneout, zoneout_hidden=zoneout)
    made = LAYERS[layer].build(3, 4, 0, config, g).double()
    names = [name for name, _ in made.named_parameters()]
    x = torch.randn(4, 2, 3, generator=g, dtype=torch.float64, requires_grad=True)
    state = tuple(
        torch.randn(s.shape, generator=g, dtype=torch.float64, requires_grad=True) for s in made.initial_state(2, x)
    )
    drop = next(name for name, p in made.named_parameters() if p is made.droppable)

    def function(x, *rest):
        leaves, weights = rest[: len(state)], dict(zip(names, rest[len(state) :], strict=True))
        y, new = torch.func.functional_call(made, weights, (x, leaves, weights[drop], 0.0, None))
        return (y, *state_leaves(new))

    inputs = (x, *state, *(p.detach().clone().requires_grad_() for p in made.parameters()))
    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize("head", HEADS)
def test_head_gradcheck(head, generator):
    made = HEADS[head].build(V, 6, ModelConfig(embedding_size=6, **HEAD), generator).double()
    names = [name for name, _ in made.named_parameters()]
    hidden = torch.randn(5, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    embedding = torch.randn(V, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([0, 3, 10, 5, 8])

    class Nll(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.head = made

        def forward(self, hidden, embedding):
            return self.head.nll(hidden, targets, embedding)

    def function(hidden, embedding, *weights):
        named = {f"head.{n}": w for n, w in zip(names, weights, strict=True)}
        return torch.func.functional_call(Nll(), named, (hidden, embedding))

    weights = (
        torch.randn(p.shape, generator=generator, dtype=torch.float64, requires_grad=True) for p in made.parameters()
    )
    assert torch.autograd.gradcheck(function, (hidden, embedding, *weights))


@pytest.mark.parametrize("zoneout", ZONEOUT)
@pytest.mark.parametrize(("layer", "head"), PAIRS)
def test_any_split_in_time_equals_the_whole(layer, head, zoneout, generator):
    model, x, y = build(layer, head, generator, zoneout), ids(generator), ids(generator)
    whole, last = model.score(x, y, model.initial_state(B))
    for cut in range(1, T):
        first, state = model.score(x[:cut], y[:cut], model.initial_state(B))
        second, state = model.score(x[cut:], y[cut:], state)
        torch.testing.assert_close(torch.cat((first, second)), whole, rtol=0, atol=1e-12)
        for a, b in zip(state_leaves(state), state_leaves(last), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("zoneout", ZONEOUT)
@pytest.mark.parametrize(("layer", "head"), PAIRS)
def test_rows_do_not_see_each_other(layer, head, zoneout, generator):
    model, x, y = build(layer, head, generator, zoneout), ids(generator), ids(generator)
    whole, _ = model.score(x, y, model.initial_state(B))
    for row in range(B):
        alone, _ = model.score(x[:, row : row + 1], y[:, row : row + 1], model.initial_state(1))
        torch.testing.assert_close(alone[:, 0], whole[:, row], rtol=0, atol=1e-12)
    order = torch.tensor([2, 0, 0, 1])
    mixed, _ = model.score(x[:, order], y[:, order], model.select(model.initial_state(B), order))
    torch.testing.assert_close(mixed, whole[:, order], rtol=0, atol=1e-12)


@pytest.mark.parametrize(("layer", "head"), PAIRS)
def test_the_future_never_changes_the_past(layer, head, generator):
    model, x = build(layer, head, generator), ids(generator)
    before, _ = model.advance(x, model.initial_state(B))
    for t in range(1, T):
        other = x.clone()
        other[t:] = (other[t:] + 1) % V
        after, _ = model.advance(other, model.initial_state(B))
        assert torch.equal(after[:t], before[:t])
        assert not torch.equal(after[t], before[t])


@pytest.mark.parametrize(("layer", "head"), PAIRS)
def test_probabilities_sum_to_one_and_agree_with_the_losses(layer, head, generator):
    model, x, y = build(layer, head, generator), ids(generator), ids(generator)
    log_probs, _ = model.advance(x, model.initial_state(B))
    nll, _ = model.score(x, y, model.initial_state(B))
    torch.testing.assert_close(log_probs.exp().sum(-1), torch.ones(T, B, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(nll, -log_probs.gather(-1, y[..., None]).squeeze(-1), rtol=0, atol=1e-12)


ROWS = [0, 1, 4]


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("head", HEADS)
def test_topk_equals_the_full_sort(head, rows, generator):
    """At a small vocabulary and at one where a search pays; with the mass in the first words, in the last, and anywhere."""
    for size, cutoffs in ((V, (4, 7)), (5000, (40, 1000))):
        config = ModelConfig(embedding_size=6, **HEAD | {"cutoffs": cutoffs})
        made = HEADS[head].build(size, 6, config, generator).double()
        embedding = torch.randn(size, 6, generator=generator, dtype=torch.float64)
        for p in made.parameters():
            p.data.normal_(generator=generator)
        for slope in (0, 10, -10):
            for name, p in made.named_parameters():
                if "bias" in name:
                    p.data += torch.linspace(0, slope, p.numel()).view_as(p)
            hidden = torch.randn(rows, 6, generator=generator, dtype=torch.float64)
            expected = made.log_probs(hidden, embedding).sort(descending=True)
            for k in (1, 4, 9):
                values, best = made.topk(hidden, k, embedding)
                torch.testing.assert_close(values, expected.values[:, :k], rtol=0, atol=1e-12)
                assert torch.equal(best, expected.indices[:, :k]), (size, slope, k)


@pytest.mark.parametrize("head", HEADS)
def test_samples_have_the_probabilities(head, generator):
    made = HEADS[head].build(V, 6, ModelConfig(embedding_size=6, **HEAD), generator)
    hidden, embedding = torch.randn(2, 6, generator=generator), torch.randn(V, 6, generator=generator)
    draws = 20_000
    drawn = made.sample(hidden.repeat_interleave(draws, 0), embedding, generator).view(2, draws)
    shares = torch.stack([row.bincount(minlength=V) for row in drawn]) / draws
    expected = made.log_probs(hidden, embedding).exp()
    assert ((shares - expected).abs() < 5 * (expected * (1 - expected) / draws).sqrt() + 1e-9).all()
    assert made.sample(hidden[:0], embedding, generator).tolist() == []


@pytest.mark.parametrize("head", HEADS)
def test_no_rows_have_no_losses_and_gradients_of_zero(head, generator):
    made = HEADS[head].build(V, 6, ModelConfig(embedding_size=6, **HEAD), generator)
    embedding = torch.randn(V, 6, generator=generator, requires_grad=True)
    nll = made.nll(torch.zeros(0, 6), torch.zeros(0, dtype=torch.long), embedding)
    assert nll.shape == (0,) and made.log_probs(torch.zeros(0, 6), embedding).shape == (0, V)
    nll.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in made.parameters())


@pytest.mark.parametrize("head", HEADS)
def test_a_vocabulary_of_one_word_is_certain(head, generator):
    made = HEADS[head].build(1, 6, ModelConfig(embedding_size=6), generator)
    hidden, embedding = torch.randn(3, 6, generator=generator), torch.randn(1, 6, generator=generator)
    assert made.log_probs(hidden, embedding).abs().max() < 1e-6
    assert made.nll(hidden, torch.zeros(3, dtype=torch.long), embedding).abs().max() < 1e-6


@pytest.mark.parametrize("head", HEADS)
def test_shapes_of_the_loss_and_its_gradients_do_not_depend_on_the_targets(head):
    """On a device whose numbers nobody knows, off the CPU's own ways: what a CUDA graph needs."""
    with torch.device("meta"):
        made = HEADS[head].build(V, 6, ModelConfig(embedding_size=6, **HEAD), torch.Generator("cpu"))
        hidden, embedding = torch.zeros(20, 6, requires_grad=True), torch.zeros(V, 6, requires_grad=True)
        nll = made.nll(hidden, torch.zeros(20, dtype=torch.long), embedding)
        torch.autograd.grad(nll.sum(), [hidden, embedding, *made.parameters()], materialize_grads=True)
    assert nll.shape == (20,)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head", HEADS)
def test_a_graph_replays_the_loss_and_its_gradients(head, dtype, generator):
    size, config = 500, ModelConfig(embedding_size=64, **HEAD | {"cutoffs": (40, 200)})
    made = HEADS[head].build(size, 64, config, generator).to("cuda", dtype)
    leaves = [torch.randn(n, 64, generator=generator).to("cuda", dtype).requires_grad_() for n in (300, size)]
    leaves += made.parameters()
    targets = torch.randint(size, (3, 300), generator=generator).cuda()
    targets[1] %= 40

    def outcome(y):
        nll = made.nll(leaves[0], y, leaves[1])
        return [nll.detach(), *torch.autograd.grad(nll.sum(), leaves, materialize_grads=True)]

    outcome(targets[0])
    graph, given, now = torch.cuda.CUDAGraph(), targets[0].clone(), torch.cuda.Stream()
    with torch.cuda.graph(graph, stream=now):
        found = outcome(given)
    for y in targets:
        given.copy_(y)
        graph.replay()
        torch.cuda.synchronize()
        for a, b in zip(found, outcome(y), strict=True):
            torch.testing.assert_close(a, b)
        assert (found[0].cpu() - made.to("cpu").nll(leaves[0].cpu(), y.cpu(), leaves[1].cpu())).abs().max() < 0.1
        made.to("cuda")


@pytest.mark.parametrize("head", HEADS)
def test_heads_in_bf16_are_near_those_in_float64(head, generator):
    config = ModelConfig(embedding_size=16, **HEAD)
    made = HEADS[head].build(V, 16, config, generator)
    hidden = torch.randn(50, 16, generator=generator)
    embedding = torch.randn(V, 16, generator=generator) / 4
    targets = ids(generator, (50,))

    def outcome(dtype, head):
        given = hidden.to(dtype).requires_grad_(), embedding.to(dtype).requires_grad_()
        nll = head.nll(given[0], targets, given[1])
        gradients = torch.autograd.grad(nll.mean(), [*given, *head.parameters()], materialize_grads=True)
        log_probs = head.log_probs(*given)
        assert nll.dtype == log_probs.dtype == torch.promote_types(dtype, torch.float32)
        assert (log_probs.double().exp().sum(-1) - 1).abs().max() < 1e-6
        return [nll, log_probs, *gradients]

    rough = outcome(torch.bfloat16, made)  # weights in fp32, as in the plain step
    for a, b in zip(rough, outcome(torch.float64, made.double()), strict=True):
        assert (a.double() - b).norm() <= 0.03 * b.norm() + 1e-3


@pytest.mark.parametrize("head", HEADS)
def test_probabilities_of_many_words_sum_to_one_in_fp32(head, generator):
    words, config = 200_000, ModelConfig(embedding_size=16, **HEAD | {"cutoffs": (4_000, 40_000)})
    made = HEADS[head].build(words, 16, config, generator)
    embedding = torch.randn(words, 16, generator=generator)
    for p in made.parameters():
        p.data.normal_(generator=generator)
    with torch.no_grad():
        log_probs = made.log_probs(torch.randn(2, 16, generator=generator), embedding)
    assert (log_probs.double().exp().sum(-1) - 1).abs().max() < 1e-6


@pytest.mark.parametrize("head", HEADS)
def test_a_claimed_vocabulary_costs_nothing_before_there_are_weights(head):
    """What a stranger's config.json may say: the largest vocabulary, and none of what training writes out."""
    start = time.process_time()
    with torch.device("meta"):
        NeuralModel(ModelConfig(head=head), 2**31 - 1, torch.Generator("cpu"))
    assert time.process_time() - start < 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 8 << 20  # KB


@pytest.mark.parametrize("head", HEADS)
def test_what_a_head_settles_is_kept_and_settled_once(head):
    counts = torch.arange(400, 0, -1).double().numpy() ** 6

    def counted():
        asked.append(1)
        return counts

    asked = []
    use = Use(counted, 500, "cpu")
    config = ModelConfig(head=head, embedding_size=64)
    settled, why = HEADS[head].settle(config, 64, use)
    assert bool(why) == bool(asked) == (settled != config)
    assert HEADS[head].settle(settled, 64, use) == (settled, "") and len(asked) <= 1
    made = HEADS[head].build(400, 64, settled, torch.Generator().manual_seed(1))
    assert made.log_probs(torch.zeros(1, 64), torch.zeros(400, 64)).exp().sum().item() == pytest.approx(1)
    NeuralModel(replace(settled, hidden_sizes=(64, 64)), 400, torch.Generator())


@pytest.mark.parametrize(("layer", "head"), PAIRS)
def test_saved_and_loaded_is_bit_equal(layer, head, generator, tmp_path):
    model = build(layer, head, generator).float()
    x, y = ids(generator), ids(generator)
    weights = dict(model.named_parameters())
    directory.write(tmp_path, model, weights, "{}", {})
    again, _ = directory.read(tmp_path, torch.device("cpu"), FP32)
    assert {name: p.shape for name, p in again.named_parameters()} == {name: p.shape for name, p in weights.items()}
    for name, p in again.named_parameters():
        assert torch.equal(p, weights[name]), name
    assert torch.equal(again.score(x, y, again.initial_state(B))[0], model.score(x, y, model.initial_state(B))[0])


@pytest.mark.parametrize(("layer", "head"), PAIRS)
def test_one_batch_can_be_overfitted(layer, head, generator):
    config = ModelConfig(layer=layer, head=head, embedding_size=24, hidden_size=32, windows=(2, 1), **HEAD)
    model = NeuralModel(config, V, generator)
    x, y = ids(generator), ids(generator)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(150):
        loss = model.nll(model(x, model.initial_state(B)).dropped_TBH, y).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.15 < math.log(V)


EVERY = DropoutConfig(embedding=0.3, input=0.3, hidden=0.3, output=0.3, weight=0.5)


@pytest.mark.parametrize("recurrent", [0.0, 0.3])
@pytest.mark.parametrize(("layer", "head"), PAIRS)
def test_dropout_is_active_in_training_alone_and_repeats_with_its_generator(layer, head, recurrent, generator):
    model, x = build(layer, head, generator, zoneout=0), ids(generator)
    state = model.initial_state(B)
    dropout = replace(EVERY, recurrent=recurrent)

    def run(seed):
        return model(x, state, dropout, torch.Generator().manual_seed(seed)).dropped_TBH

    plain = model(x, state).raw_TBH
    assert torch.equal(model(x, state).raw_TBH, plain)
    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))
    assert torch.equal(model(x, state).raw_TBH, plain)  # training left nothing behind
    model.nll(run(1), x).sum().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.abs().sum() > 0, name


@pytest.mark.parametrize(("layer", "head"), PAIRS)
def test_weight_drop_masks_the_raw_weight_and_nothing_else(layer, head, generator):
    model, x = build(layer, head, generator), ids(generator)
    state = map_state(lambda s: s + 0.5, model.initial_state(B))
    noise = torch.Generator().manual_seed(5)
    weights = {id(made.droppable): made.droppable.detach().clone() for made in model.layers}
    dropped = model(x, state, DropoutConfig(input=0, hidden=0, output=0, weight=0.5), noise).raw_TBH
    assert not torch.equal(dropped, model(x, state).raw_TBH)
    for made in model.layers:
        assert torch.equal(made.droppable, weights[id(made.droppable)])


RECURRENT = [name for name, made in LAYERS.items() if made.has_recurrent_product]


@pytest.mark.parametrize("which", ["weight", "recurrent"])
@pytest.mark.parametrize("layer", RECURRENT)
def test_recurrent_dropouts_leave_the_first_step_alone(layer, which, generator):
    """From a zero state the first step does not meet the hidden-to-hidden product; every later one does."""
    made = LAYERS[layer].build(3, 16, 0, ModelConfig(), generator)
    x = torch.randn(4, 2, 3, generator=generator)
    state = made.initial_state(2, x)
    if which == "weight":
        dropped = made(x, state, dropout.weight_drop(made.droppable, 0.5, generator), 0.0, None)[0]
    else:
        dropped = made(x, state, made.droppable, 0.5, generator)[0]
    plain = made(x, state, made.droppable, 0.0, None)[0]
    torch.testing.assert_close(dropped[0], plain[0])
    assert not torch.allclose(dropped[1], plain[1])


@pytest.mark.parametrize("layer", RECURRENT)
def test_evaluation_knows_no_recurrent_dropout(layer, generator):
    made = LAYERS[layer].build(3, 5, 0, ModelConfig(), generator)
    x = torch.randn(4, 2, 3, generator=generator)
    state = made.initial_state(2, x)
    assert torch.equal(made(x, state, made.droppable, 0.5, None)[0], made(x, state, made.droppable, 0.0, None)[0])


@pytest.mark.parametrize("layer", LAYERS)
def test_full_zoneout_keeps_the_state_and_its_mean_takes_its_place_in_evaluation(layer, generator):
    """With zoneout near 1 the state hardly moves; evaluation is the mean of training over many draws."""
    x = torch.randn(1, 2, 3, generator=generator)

    def states(zoneout, noise):
        config = ModelConfig(zoneout=zoneout, zoneout_hidden=zoneout)
        made = LAYERS[layer].build(3, 5, 0, config, torch.Generator().manual_seed(4))
        before = tuple(leaf + 0.5 for leaf in made.initial_state(2, x))
        return before, made(x, before, made.droppable, 0.0, noise)[1]

    before, after = states(0.999, None)
    kept = [a for a, b in zip(after, before, strict=True) if a.shape[-1] == 5]
    for leaf in kept:
        torch.testing.assert_close(leaf, torch.full_like(leaf, 0.5), atol=5e-3, rtol=0)
    _, mean = states(0.3, None)
    draws = [states(0.3, torch.Generator().manual_seed(n))[1] for n in range(400)]
    for n, leaf in enumerate(mean):
        drawn = torch.stack([d[n] for d in draws]).mean(0)
        torch.testing.assert_close(drawn, leaf, atol=0.05, rtol=0)
