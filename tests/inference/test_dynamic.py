"""Dynamic evaluation against loops after the published code, on its own and under a cache; the model stays as it is."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from recurlm import kernels
from recurlm.config import CacheConfig, DynamicConfig, ModelConfig, dynamic_config
from recurlm.errors import ConfigError, DataError, RequestError, RunError
from recurlm.evaluation.interpolation import FACTOR, descend, tuned_dynamic
from recurlm.evaluation.perplexity import mean_loss
from recurlm.inference.dynamic import DynamicEvaluation, Segments, gradient_rms
from recurlm.inference.mixture import UnigramCache
from recurlm.inference.neural_cache import NeuralCache
from recurlm.model.heads import HEADS
from recurlm.model.layers import LAYERS
from recurlm.model.neural import NeuralModel
from recurlm.protocol import state_leaves

V = 13
RMS = DynamicConfig(lr=1e-3, decay=0.02, segment=4, batch=5)
SGD = DynamicConfig(rule="sgd", lr=0.2, decay=0.01, segment=4)
TRAIN = np.random.default_rng(0).integers(V, size=203).astype(np.uint16)
IDS = np.random.default_rng(1).integers(V, size=62).astype(np.int64)


def model_of(layer: str = "lstm", head: str = "tied") -> NeuralModel:
    """A model with weight drop's and zoneout's settings on, in float64; the last layer fits every head."""
    sizes = {"embedding_size": 6, "hidden_sizes": (8, 6), "windows": (2,), "init_range": 0.8}
    generator = torch.Generator().manual_seed(3)
    return NeuralModel(ModelConfig(layer=layer, head=head, **sizes), V, generator).double().requires_grad_(False)


def published(
    model, config: DynamicConfig, train: np.ndarray, ids: np.ndarray
) -> tuple[list[float], list[torch.Tensor]]:
    """(nll of every target of `ids`, RMS): the published code's two stages, by hand."""
    model = model_of(model.config.layer, model.config.head).requires_grad_(True)
    parameters = list(model.parameters())

    def backward(x, y, state):
        out = model(x, state)
        nll = model.nll(out.raw_TBH, y)
        nll.mean().backward()
        gradients = [p.grad.clone() for p in parameters]
        model.zero_grad()
        return nll.detach(), gradients, tuple(tuple(leaf.detach() for leaf in part) for part in out.state)

    rows = len(train) // config.batch
    data = torch.from_numpy(train[: rows * config.batch].astype(np.int64)).view(config.batch, -1).t()
    squares, count, state, i = [torch.zeros_like(p) for p in parameters], 0, model.initial_state(config.batch), 0
    while i < len(data) - 1 - 1 and config.rule == "rms":
        length = min(config.segment, len(data) - 1 - i)
        _, gradients, state = backward(data[i : i + length], data[i + 1 : i + 1 + length], state)
        squares = [s + g * g for s, g in zip(squares, gradients, strict=True)]
        count, i = count + 1, i + length
    rms = [(s / max(1, count)).sqrt() for s in squares]
    mean = sum(r.mean() for r in rms) / len(rms)
    trained, state, nlls = [p.detach().clone() for p in parameters], model.initial_state(1), []
    x, y = torch.from_numpy(ids[:-1])[:, None], torch.from_numpy(ids[1:])[:, None]
    for t in range(0, len(x), config.segment):
        nll, gradients, state = backward(x[t : t + config.segment], y[t : t + config.segment], state)
        nlls += nll[:, 0].tolist()
        with torch.no_grad():
            for p, g, old, r in zip(parameters, gradients, trained, rms, strict=True):
                if config.rule == "sgd":
                    p += config.decay * (old - p) - config.lr * g
                else:
                    rate = (r / mean).clamp(max=1 / config.decay)
                    p += config.decay * rate * (old - p) - config.lr * g / (r + config.eps)
    return nlls, rms


def columns(ids: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.from_numpy(ids[:-1])[:, None], torch.from_numpy(ids[1:])[:, None]


def adapted(model, config: DynamicConfig) -> DynamicEvaluation:
    return DynamicEvaluation(model, config, gradient_rms(model, TRAIN, 0, config) if config.rule == "rms" else None)


@pytest.mark.parametrize("config", [RMS, SGD, dataclasses.replace(RMS, decay=1.0), dataclasses.replace(RMS, segment=1)])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("layer", LAYERS)
def test_it_equals_the_published_loop_and_leaves_the_model_alone(layer, head, config):
    model = model_of(layer, head)
    before = [p.clone() for p in model.parameters()]
    expected, rms = published(model, config, TRAIN, IDS)
    if config.rule == "rms":
        for found, r in zip(gradient_rms(model, TRAIN, 0, config), rms, strict=True):
            torch.testing.assert_close(found, r, rtol=1e-10, atol=1e-14)
    dynamic, (x, y) = adapted(model, config), columns(IDS)
    nll_TB, _ = dynamic.score(x, y, dynamic.initial_state(1))
    torch.testing.assert_close(nll_TB[:, 0], torch.tensor(expected, dtype=torch.double), rtol=1e-8, atol=1e-10)
    plain, _ = model.score(x, y, model.initial_state(1))
    first = config.segment
    torch.testing.assert_close(nll_TB[:first], plain[:first], rtol=0, atol=1e-12)  # scored before the first update
    assert not torch.allclose(nll_TB[first:], plain[first:], rtol=0, atol=1e-6)
    assert all(torch.equal(a, b) and not b.requires_grad for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("config", [RMS, SGD])
@pytest.mark.parametrize("layer", LAYERS)
def test_state_is_a_value(layer, config):
    """However the text is cut, scored or advanced: the same; and a state can be taken up again after others."""
    dynamic, (x, y) = adapted(model_of(layer), config), columns(IDS)
    start = dynamic.initial_state(1)
    whole, _ = dynamic.score(x, y, start)
    log_probs_TBV, end = dynamic.advance(x, start)
    torch.testing.assert_close(-log_probs_TBV.gather(-1, y[..., None])[..., 0], whole, rtol=0, atol=1e-12)
    torch.testing.assert_close(log_probs_TBV.exp().sum(-1), torch.ones_like(whole), rtol=0, atol=1e-12)
    assert all(leaf.shape[0] == 1 for leaf in state_leaves(end))
    for cuts in ([1] * len(x), [3, 4, 4, 1, 20, 29], [9, len(x) - 9]):
        state, parts = start, []
        for a, b in zip(x.split(cuts), y.split(cuts), strict=True):
            kept = state
            nll, state = dynamic.score(a, b, kept)
            dynamic.score(torch.zeros_like(a), torch.zeros_like(b), kept)  # another text between
            assert torch.equal(dynamic.score(a, b, kept)[0], nll)
            parts.append(nll)
        torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=1e-11)
    other = (y + 1) % V  # targets that are not read next: what is learned is what is read
    found, _ = dynamic.score(x, other, start)
    torch.testing.assert_close(found, -log_probs_TBV.gather(-1, other[..., None])[..., 0], rtol=0, atol=1e-12)


def test_without_a_rate_it_is_the_model():
    model, (x, y) = model_of(), columns(IDS)
    dynamic = DynamicEvaluation(model, dataclasses.replace(SGD, lr=0.0))
    torch.testing.assert_close(
        dynamic.score(x, y, dynamic.initial_state(1))[0],
        model.score(x, y, model.initial_state(1))[0],
        rtol=0,
        atol=1e-13,
    )


def test_in_evaluation_and_in_single_precision_it_learns():
    """A text that repeats itself; under torch.inference_mode, as evaluation runs."""
    model, ids = model_of().float(), np.tile(IDS[:20], 20)
    plain = mean_loss(model, ids, 0, 1, "exact")
    fast = dataclasses.replace(RMS, lr=0.01), SGD
    losses = [mean_loss(adapted(model, config), ids, 0, 1, "exact") for config in fast]
    assert max(losses) < plain - 0.02
    assert losses == [mean_loss(adapted(model, config), ids, 0, 1, "exact") for config in fast]  # no chance in it


def test_a_cache_on_top_uses_the_states_of_the_moved_model():
    model, (x, y) = model_of(), columns(IDS)
    dynamic, config = adapted(model, SGD), CacheConfig(window=9, theta=1.0, lambda_=0.3)
    hidden, nll, _ = dynamic.read(x, dynamic.initial_state(1), y)
    expected = []
    for t in range(len(x)):
        low = max(0, t - 9)
        attention = (hidden[t, 0] @ hidden[low:t, 0].T).softmax(0)
        p_cache = float(attention[y[low:t, 0] == y[t, 0]].sum())
        expected.append(-math.log(0.3 * p_cache + 0.7 * math.exp(-nll[t, 0])) if t else float(nll[0, 0]))
    cached = NeuralCache(dynamic, config)
    found, _ = cached.score(x, y, cached.initial_state(1))
    torch.testing.assert_close(found[:, 0], torch.tensor(expected, dtype=torch.double), rtol=0, atol=1e-10)


@pytest.mark.parametrize("failure", [KeyboardInterrupt, MemoryError])
def test_the_model_is_unchanged_when_something_stops_it(failure, monkeypatch):
    model, (x, y) = model_of(), columns(IDS)
    before, dynamic, calls = [p.clone() for p in model.parameters()], adapted(model, RMS), []
    update = kernels.dynamic_update

    def stops(*arguments):
        calls.append(1)
        update(*arguments)
        if len(calls) == 5:
            raise failure

    expected, _ = dynamic.score(x, y, dynamic.initial_state(1))
    monkeypatch.setattr(kernels, "dynamic_update", stops)
    with pytest.raises(failure):
        dynamic.score(x, y, dynamic.initial_state(1))
    monkeypatch.undo()
    assert all(map(torch.equal, before, model.parameters()))
    assert torch.equal(dynamic.score(x, y, dynamic.initial_state(1))[0], expected)  # and it can go on


def test_tuning_is_no_worse_than_its_start_and_evaluation_gives_its_loss():
    model, ids = model_of().float(), np.tile(IDS[:20], 12)
    rms = gradient_rms(model, TRAIN, 0, RMS)
    start = mean_loss(DynamicEvaluation(model, RMS, rms), ids, 0, 1, "exact")
    found, loss = tuned_dynamic(model, RMS, {"lr", "decay"}, rms, ids, 0)
    assert loss < start and found.lr > RMS.lr
    assert mean_loss(DynamicEvaluation(model, found, rms), ids, 0, 1, "exact") == loss
    only, _ = tuned_dynamic(model, RMS, {"lr"}, rms, ids, 0)
    assert only.decay == RMS.decay
    fewer = dataclasses.replace(RMS, tune_tokens=50)
    assert tuned_dynamic(model, fewer, {"lr"}, rms, ids, 0) == tuned_dynamic(model, fewer, {"lr"}, rms, ids[:50], 0)


def test_the_search_finds_a_valley_and_passes_over_what_is_not_finite():
    def loss(values):
        a, b = math.log(values["lr"] / 3), math.log(values["decay"] / 0.2)
        return math.nan if values["lr"] > 6 else a * a + b * b + a * b

    values, least = descend(loss, {"lr": 0.01, "decay": 0.9}, {"decay": 1.0})
    assert least < 0.1 and values["lr"] < 6
    assert descend(loss, {"lr": 3.0, "decay": 0.2}, {})[0] == {"lr": 3.0, "decay": 0.2}
    assert descend(lambda v: -v["decay"], {"decay": 0.5}, {"decay": 0.5 * FACTOR})[0] == {"decay": 0.5 * FACTOR}


def test_what_cannot_be_is_said():
    model, (x, y) = model_of(), columns(IDS)
    with pytest.raises(RequestError, match="neural model"):
        DynamicEvaluation(UnigramCache(V, 3), SGD)
    with pytest.raises(RequestError, match="RMS"):
        DynamicEvaluation(model, RMS)
    with pytest.raises(RequestError, match="batch of 2"):
        adapted(model, SGD).initial_state(2)
    with pytest.raises(DataError, match="too short"):
        gradient_rms(model, TRAIN[:9], 0, RMS)
    wild = DynamicEvaluation(model_of().float(), dataclasses.replace(SGD, lr=1e38))
    with pytest.raises(RunError, match=r"lr = 1e\+38"):
        wild.score(x, y, wild.initial_state(1))
    for values, says in (({"lr": -1}, "lr = -1"), ({"rule": "adam"}, "rms"), ({"segments": 5}, "'segment'")):
        with pytest.raises(ConfigError, match=says):
            dynamic_config(values)
    assert dynamic_config({"rule": "sgd"}).decay == 0 and dynamic_config({}).lr == 5e-5


class Graph:
    """Stands in for a CUDA graph on the CPU: captured without an effect, its replay fills the tensors of the capture."""

    def __init__(self, work, segments: Segments):
        kept = [(t, t.detach().clone()) for t in (*segments.weights, *state_leaves(segments.state))]
        work()
        with torch.no_grad():
            for tensor, before in kept:
                tensor.copy_(before)
        ((self.key, self.outputs),) = ((key, list(found)) for key, found in segments.fixed.items())
        self.work, self.segments, self.replays = work, segments, 0

    def replay(self) -> None:
        self.replays += 1
        self.work()
        for old, new in zip(self.outputs, self.segments.fixed[self.key], strict=True):
            old.copy_(new)
        self.segments.fixed[self.key] = self.outputs


@pytest.mark.parametrize("scores", [True, False])
def test_segments_are_replayed_from_the_second_on(scores, monkeypatch):
    graphs, dynamic, (x, y) = [], adapted(model_of(), RMS), columns(IDS)
    expected = dynamic.read(x, dynamic.initial_state(1), y if scores else None)
    dynamic = adapted(model_of(), RMS)
    monkeypatch.setattr(kernels, "graph_of", lambda work: graphs.append(Graph(work, dynamic.segments)) or graphs[-1])
    dynamic.segments.capture = True
    for _ in range(2):
        found = dynamic.read(x, dynamic.initial_state(1), y if scores else None)
        for a, b in zip(
            (*found[:2], *state_leaves(found[2])), (*expected[:2], *state_leaves(expected[2])), strict=True
        ):
            assert torch.equal(a, b)
    assert [graph.replays for graph in graphs] == [2 * ((len(x) - 1) // RMS.segment) - 1]


def test_a_model_that_cannot_be_captured_is_read_as_it_is(monkeypatch):
    def fails(work):
        raise RuntimeError("operation not permitted when stream is capturing")

    dynamic, (x, y) = adapted(model_of(), SGD), columns(IDS)
    expected, _ = dynamic.score(x, y, dynamic.initial_state(1))
    monkeypatch.setattr(kernels, "graph_of", fails)
    dynamic.segments.capture, dynamic.segments.graphs = True, {}
    with pytest.warns(RuntimeWarning, match="not permitted"):
        found, _ = dynamic.score(x, y, dynamic.initial_state(1))
    assert torch.equal(found, expected)
    assert torch.equal(dynamic.score(x, y, dynamic.initial_state(1))[0], expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("config", [RMS, SGD])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("layer", LAYERS)
def test_graphs_on_a_gpu_change_nothing(layer, head, config):
    model, (x, y) = model_of(layer, head).float().cuda(), (a.cuda() for a in columns(IDS))
    out = []
    for capture in (False, True, True):
        rms = gradient_rms(model, TRAIN, 0, config, capture) if config.rule == "rms" else None
        dynamic = DynamicEvaluation(model, config, rms, capture)
        out.append(dynamic.score(x, y, dynamic.initial_state(1))[0])
        assert not capture or any(dynamic.segments.graphs.values())
    torch.testing.assert_close(out[1], out[0], rtol=1e-4, atol=1e-5)
    assert torch.equal(out[1], out[2])


def test_it_may_be_made_in_inference_mode():
    expected = mean_loss(DynamicEvaluation(model_of(), SGD), IDS, 0, 1, "exact")
    model = model_of()
    with torch.inference_mode():
        assert mean_loss(DynamicEvaluation(model, SGD), IDS, 0, 1, "exact") == expected
