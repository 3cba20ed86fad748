"""The QRNN's poolings, and what its weight drop acts on."""

import pytest
import torch

from recurlm.config import ModelConfig
from recurlm.kernels import GATES
from recurlm.model.layers.qrnn import QRNN


def make(pooling: str, generator: torch.Generator, window: int = 2) -> QRNN:
    return QRNN.build(3, 5, 0, ModelConfig(windows=(window,), pooling=pooling), generator)


def test_weight_drop_acts_on_the_input_weight_of_all_gates_and_window_steps(generator):
    made = make("fo", generator)
    assert made.droppable is made.weight
    assert made.weight.shape == (15, 6)


@pytest.mark.parametrize("pooling", GATES)
def test_every_pooling_is_its_formula_over_time(pooling, generator):
    made = make(pooling, generator, window=1).double()
    x = torch.randn(6, 2, 3, generator=generator, dtype=torch.float64)
    (c,) = made.initial_state(2, x)
    y, (last,) = made(x, (c,), made.droppable, 0.0, None)
    for t in range(6):
        z, f, *rest = (x[t] @ made.weight.T + made.bias).chunk(GATES[pooling], dim=-1)
        keep = 1 - f.sigmoid()
        enters = rest[1].sigmoid() if pooling == "ifo" else f.sigmoid()
        c = keep * c + enters * z.tanh()
        torch.testing.assert_close(y[t], rest[0].sigmoid() * c if rest else c)
    torch.testing.assert_close(last, c)


@pytest.mark.parametrize("pooling", GATES)
def test_every_pooling_carries_its_state(pooling, generator):
    made = make(pooling, generator)
    x = torch.randn(7, 2, 3, generator=generator)
    whole, _ = made(x, made.initial_state(2, x), made.droppable, 0.0, None)
    first, state = made(x[:3], made.initial_state(2, x), made.droppable, 0.0, None)
    second, _ = made(x[3:], state, made.droppable, 0.0, None)
    torch.testing.assert_close(torch.cat((first, second)), whole)
