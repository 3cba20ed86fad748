"""The measurements of heads and of the mixture's loss, at small sizes; no time is compared with another."""

import functools

import pytest
import torch

from recurlm.bench import heads, mixture, timing
from recurlm.errors import RunError

CUDA = torch.cuda.is_available()


@pytest.fixture
def small(monkeypatch):
    sizes = (heads.Size(20, 64, 100), heads.Size(20, 64, 400))
    monkeypatch.setattr(heads, "SIZES", {"cpu": sizes, "cuda": sizes})
    monkeypatch.setattr(heads, "PUBLISHED_CUTS", (20, 60, 150))
    monkeypatch.setattr(heads, "TREES", (50, 500))
    monkeypatch.setattr(
        heads, "cpu_time", lambda works, **_: functools.partial(timing.cpu_time, seconds=0, rounds=1)(works)
    )


@pytest.mark.filterwarnings("ignore:The AccumulateGrad node:UserWarning")  # of the leaves, on the stream that captures
def test_every_head_is_measured_and_drawn(small, tmp_path):
    rows = heads.rows()
    measures = {row["measure"] for row in rows}
    for name in heads.VARIANTS:
        assert {f"{name}, training", f"{name}, scoring", f"{name}, best 10"} <= measures
    beside = {row["peer"].partition(",")[0] for row in rows if "published" in row["measure"]}
    assert beside == {"nn.AdaptiveLogSoftmaxWithLoss"}
    assert all(row["ours_us"] > 0 and row["peer_us"] > 0 for row in rows)
    assert CUDA or sum(row["measure"] == "balanced tree, scoring" for row in rows) == 2
    heads.picture(rows, str(tmp_path / "heads.svg"))
    drawn = (tmp_path / "heads.svg").read_text()
    assert all(name in drawn for name in (*heads.VARIANTS, "torch, full softmax"))


def test_ours_and_torchs_adaptive_have_the_same_number_of_words_and_finite_losses(small):
    size = heads.Size(50, 16, 400)
    for it in (
        heads.subject("adaptive", size, "cpu", torch.float32, cutoffs=(20, 60)),
        heads.torchs_adaptive(size, "cpu", torch.float32, (20, 60)),
        heads.full(size, "cpu", torch.float32),
    ):
        nll = it.nll()
        assert nll.shape == (50,) and nll.isfinite().all() and (nll > 0).all()
        torch.autograd.grad(nll.mean(), it.leaves)


def test_the_mixtures_loss_is_the_formulas_and_another_is_refused(monkeypatch):
    given = mixture.inputs((30, 3, 8, 50), "cpu", torch.float32)
    mixture.check(given)
    torch.testing.assert_close(mixture.ours(*given), mixture.formula(*given))
    for a, b in zip(mixture.both(mixture.ours, given), mixture.both(mixture.formula, given), strict=True):
        torch.testing.assert_close(a, b)
    monkeypatch.setattr(mixture, "ours", lambda leaves, targets, *_: 1.1 * mixture.formula(leaves, targets))
    real = mixture.both

    def both(function, given):
        return real(mixture.formula if given[0][0].dtype == torch.float64 else function, given)

    monkeypatch.setattr(mixture, "both", both)
    with pytest.raises(RunError, match="the loss's values"):
        mixture.check(given)


@pytest.mark.skipif(not CUDA, reason="no GPU here")
def test_rows_of_the_mixture(monkeypatch):
    monkeypatch.setattr(mixture, "SHAPES", {"small": ((60, 3, 40, 500), "soon")})
    for row in mixture.rows():
        assert row["ours_us"] > 0 and row["peer_us"] > 0 and row["limit_us"] > 0
