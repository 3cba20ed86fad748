"""What every layer and head must keep, looped over the registries: nothing here names one."""

import math
from dataclasses import replace

import pytest
import torch

from recurlm.config import DropoutConfig, ModelConfig
from recurlm.model import directory, dropout
from recurlm.model.heads import HEADS
from recurlm.model.layers import LAYERS
from recurlm.model.neural import NeuralModel
from recurlm.model.precision import FP32
from recurlm.protocol import map_state, state_leaves

V, T, B = 11, 9, 3
PAIRS = [(layer, head) for layer in LAYERS for head in HEADS]
ZONEOUT = [0.0, 0.1]


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
    made = HEADS[head].build(V, 6, ModelConfig(embedding_size=6), generator).double()
    names = [name for name, _ in made.named_parameters()]
    hidden = torch.randn(5, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    embedding = torch.randn(V, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    targets = ids(generator, (5,))

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
    hidden = torch.randn(4, model.layers[-1].hidden_size, generator=generator, dtype=torch.float64)
    values, best = model.head.topk(hidden, 3, model.embedding)
    expected = model.head.log_probs(hidden, model.embedding).sort(descending=True)
    assert torch.equal(values, expected.values[:, :3])
    assert torch.equal(best, expected.indices[:, :3])


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
    config = ModelConfig(layer=layer, head=head, embedding_size=24, hidden_size=32, windows=(2, 1))
    model = NeuralModel(config, V, generator)
    x, y = ids(generator), ids(generator)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(150):
        loss = model.nll(model(x, model.initial_state(B)).dropped_TBH, y).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1 < math.log(V)


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
