"""The dropouts' shapes, sharing and scale."""

import torch

from recurlm.model import dropout


def test_locked_dropout_shares_its_mask_over_time_alone(generator):
    out = dropout.locked(torch.ones(50, 40, 30), 0.4, generator)
    assert torch.equal(out, out[:1].expand_as(out))
    assert set(out.unique().tolist()) == {0.0, torch.tensor(1 / 0.6).item()}
    assert (out[0] == 0).float().mean().sub(0.4).abs() < 0.05
    assert not torch.equal(out[0, 0], out[0, 1])


def test_embedding_dropout_drops_whole_words_everywhere(generator):
    weight = torch.rand(200, 8) + 0.5
    ids = torch.randint(200, (30, 20), generator=generator)
    out = dropout.embed(ids, weight, 0.5, 0.0, torch.float32, generator)
    gone = (out == 0).all(-1)
    assert torch.equal(gone, (out == 0).any(-1))
    for word in ids.unique():
        assert gone[ids == word].unique().numel() == 1
    torch.testing.assert_close(out[~gone], weight[ids][~gone] * 2)


def test_no_generator_or_no_probability_changes_nothing(generator):
    x = torch.rand(3, 2, 4)
    assert dropout.locked(x, 0.5, None) is x
    assert dropout.locked(x, 0.0, generator) is x
    assert dropout.weight_drop(x, 0.5, None) is x


def test_the_raw_weight_gets_the_gradient_of_its_survivors(generator):
    raw = torch.ones(20, 20, requires_grad=True)
    dropped = dropout.weight_drop(raw, 0.5, generator)
    dropped.sum().backward()
    assert torch.equal(raw.grad, (dropped > 0).float() * 2)
