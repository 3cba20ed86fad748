"""The step loop of the gated layers against cuDNN's and oneDNN's way, and against the papers."""

import pytest
import torch

from recurlm.config import ModelConfig
from recurlm.errors import ConfigError
from recurlm.model.layers import gated, gru, lstm, rnn
from recurlm.training.settings import check_settings
from support import tiny_config

CELLS = {"lstm": lstm.cell, "gru": gru.cell, "rnn_tanh": rnn.CELLS["tanh"], "rnn_relu": rnn.CELLS["relu"]}
GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}


def case(kind: str, generator: torch.Generator):
    weights = [w.double() for w in gated.weights(GATES[kind], 3, 5, generator)]
    x = torch.randn(7, 2, 3, generator=generator, dtype=torch.float64)
    state = tuple(torch.randn(2, 5, generator=generator, dtype=torch.float64) for _ in range(1 + (kind == "lstm")))
    return x, state, weights


@pytest.mark.parametrize("kind", CELLS)
def test_the_loop_equals_the_library(kind, generator):
    x, state, weights = case(kind, generator)
    none = (0.0,) * len(state)
    fast, fast_state = gated.run(kind, CELLS[kind], x, state, weights, 0.0, none, None)
    slow, slow_state = gated._steps(CELLS[kind], x, state, weights, None, none)
    torch.testing.assert_close(slow, fast, rtol=0, atol=1e-13)
    for a, b in zip(slow_state, fast_state, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-13)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_the_fused_cell_of_a_gpu_equals_the_formula(generator):
    parts = [torch.randn(3, n, generator=generator, dtype=torch.float64) for n in (20, 20, 5, 5, 5)]
    found = []
    for device in ("cpu", "cuda"):
        x, r, c, up_h, up_c = (p.to(device, copy=True).requires_grad_() for p in parts)
        h, new_c = lstm.cell(x, r, (c, c))
        found.append([t.cpu() for t in (h, new_c, *torch.autograd.grad((h * up_h + new_c * up_c).sum(), (x, r, c)))])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_variational_dropout_uses_one_mask_for_all_steps(generator):
    """With W_ih = 0 and U = I a simple network keeps h: units that the mask drops are 0 after one step, for good."""
    size = 200
    weights = [torch.zeros(size, 3), torch.eye(size), torch.zeros(size), torch.zeros(size)]
    x, state = torch.zeros(6, 2, 3), (torch.ones(2, size),)
    y, _ = gated.run("rnn_relu", rnn.CELLS["relu"], x, state, weights, 0.4, (0.0,), generator)
    dropped = y[0] == 0
    assert 0.25 < dropped.float().mean() < 0.55
    assert not torch.equal(dropped[0], dropped[1])  # each row has its own
    for t, row in enumerate(y, 1):
        assert torch.equal(row == 0, dropped)
        torch.testing.assert_close(row[~dropped], torch.full_like(row[~dropped], (1 / 0.6) ** t))


def test_lstm_zoneout_keeps_cell_and_output_apart(generator):
    """Krueger et al. 2017: c = d c' + (1 - d) (f c' + i g), and h from the cell before its zoneout."""
    x, (h, c), weights = case("lstm", generator)
    new_h, new_c = lstm.cell(x[0] @ weights[0].T + weights[2], h @ weights[1].T + weights[3], (h, c))
    y, (got_h, got_c) = gated.run("lstm", lstm.cell, x[:1], (h, c), weights, 0.0, (0.0, 0.25), None)
    torch.testing.assert_close(got_c, 0.25 * c + 0.75 * new_c)
    torch.testing.assert_close(got_h, new_h)
    torch.testing.assert_close(y[0], got_h)
    _, (got_h, got_c) = gated.run("lstm", lstm.cell, x[:1], (h, c), weights, 0.0, (0.1, 0.0), None)
    torch.testing.assert_close(got_h, 0.1 * h + 0.9 * new_h)
    torch.testing.assert_close(got_c, new_c)


def test_relu_differs_from_tanh(generator):
    x = torch.randn(4, 2, 3, generator=generator)
    found = []
    for nonlinearity in rnn.CELLS:
        config = ModelConfig(nonlinearity=nonlinearity)
        made = rnn.RNN.build(3, 5, 0, config, torch.Generator().manual_seed(1))
        found.append(made(x, made.initial_state(2, x), made.droppable, 0.0, None)[0])
    assert (found[0] < 0).any() and (found[1] >= 0).all()


def test_recurrent_dropout_of_a_layer_without_the_product_is_refused():
    with pytest.raises(ConfigError, match="no hidden-to-hidden product"):
        check_settings(tiny_config("model.layer=qrnn", "dropout.recurrent=0.2"))
    check_settings(tiny_config("model.layer=gru", "dropout.recurrent=0.2"))
