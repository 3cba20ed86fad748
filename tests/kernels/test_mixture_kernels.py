"""The mixture's loss: in torch and in Triton against the plain formula in float64, every gradient."""

import pytest
import torch

from recurlm import kernels
from recurlm.kernels import cross_entropy, reference
from support import in_the_interpreter

# tokens, experts, features, words
SHAPES = [(1, 3, 8, 17), (2, 1, 100, 3), (9, 5, 33, 300), (40, 15, 28, 129), (23, 2, 130, 257)]
LARGE = [(140, 15, 280, 10_000), (75, 15, 300, 33_278), (131, 4, 276, 5_003)]
NAMES = ("nll", "drows", "dweight", "dbias", "dprior")
CUDA = torch.cuda.is_available()


def inputs(shape, dtype, device="cpu", scale=1.0):
    """[rows, weight, bias, log_prior], targets."""
    (N, K, D, V), g = shape, torch.Generator().manual_seed(0)
    rows, weight = torch.randn(N * K, D, generator=g), torch.randn(V, D, generator=g) * 2 * scale / D**0.5
    bias, prior = torch.randn(V, generator=g) * scale, torch.randn(N, K, generator=g).log_softmax(1)
    leaves = [x.to(device, dtype).requires_grad_() for x in (rows, weight, bias)]
    wide = torch.promote_types(dtype, torch.float32)
    return [*leaves, prior.to(device, wide).requires_grad_()], torch.randint(V, (N,), generator=g).to(device)


def outcome(function, leaves, targets, uniform):
    rows, weight, bias, prior = leaves
    nll = function(rows, weight, bias, targets, prior)
    weights = torch.linspace(-1, 2, len(nll), device=nll.device, dtype=nll.dtype)
    loss = 3 * cross_entropy.mean(nll) if uniform else (nll * weights).sum()
    return [nll.detach(), *torch.autograd.grad(loss, leaves)]


def compare(function, shape, dtype, device="cpu", scale=1.0, uniform=True):
    """At most twice the error of the plain formula in the same type, and two runs equal bit by bit."""
    leaves, targets = inputs(shape, dtype, device, scale)
    wide = [x.detach().double().requires_grad_() for x in leaves]
    expected = outcome(reference.mixture_cross_entropy, wide, targets, uniform)
    plain = outcome(reference.mixture_cross_entropy, leaves, targets, uniform)
    found = outcome(function, leaves, targets, uniform)
    rounding = 1e-6 * (1 + reference.logits(*wide[:3]).abs().max().item())
    for name, ours, theirs, truth in zip(NAMES, found, plain, expected, strict=True):
        error, allowed = ((x.double() - truth).norm().item() for x in (ours, theirs))
        assert ours.dtype == theirs.dtype
        assert error <= 2 * allowed + rounding * (1 + truth.norm().item()), (name, shape, dtype, scale, uniform)
    for first, second in zip(found, outcome(function, leaves, targets, uniform), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("uniform", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_on_the_cpu(shape, uniform):
    for dtype in (torch.float32, torch.bfloat16):
        compare(kernels.mixture_cross_entropy, shape, dtype, uniform=uniform)


def test_gradcheck():
    (rows, weight, bias, prior), targets = inputs((3, 4, 5, 7), torch.float64)
    function = kernels.mixture_cross_entropy
    leaves = rows, weight, bias, prior
    assert torch.autograd.gradcheck(lambda h, w, b, p: function(h, w, b, targets, p), leaves)


def test_the_mean_is_the_mean():
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.equal(cross_entropy.mean(x), x.mean())
    assert torch.autograd.gradcheck(cross_entropy.mean, [x])
    (gradient,) = torch.autograd.grad(cross_entropy.mean(x), x)
    assert gradient.stride() == (0, 0)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((840, 15, 280, 10_000), 168),
        ((1400, 15, 280, 10_000), 175),
        ((1050, 15, 304, 33_280), 66),
        ((3, 15, 280, 10**7), 1),
    ],
)
def test_chunks_are_near_equal_and_their_rows_even(shape, expected):
    pytest.importorskip("triton", reason="triton is not installed")
    from recurlm.kernels import mixture_triton as fused

    tokens, experts, depth, columns = shape
    assert fused.chunk_tokens(tokens, experts, columns, depth, 2, 132) == expected
    assert expected == 1 or 2 * expected * experts * columns <= fused.CHUNK_BYTES


def interpreted():
    """What the subprocess below runs. The interpreter multiplies fp32 and float16, but not bfloat16."""
    from recurlm.kernels import cross_entropy_triton as whole
    from recurlm.kernels import mixture_triton as fused

    torch.use_deterministic_algorithms(True)  # uninitialised memory holds NaN
    whole.KEPT_BYTES, fused.ONCE = 0, True
    function, calls = fused.mixture_cross_entropy, []
    by_columns = whole.by_columns
    whole.by_columns = lambda *given: calls.append(1) or by_columns(*given)
    for limit in (1 << 30, 1 << 15, 1):  # one chunk, some, and one for each token
        fused.CHUNK_BYTES = limit
        for shape in SHAPES if limit > 1 else SHAPES[:2]:
            compare(function, shape, torch.float32)
    assert not calls
    for scale in (30, 100, 5000):  # targets far below the best word
        compare(function, (9, 5, 64, 257), torch.float32, scale=scale)
    compare(function, (9, 5, 33, 300), torch.float16)
    compare(function, (9, 5, 33, 300), torch.float16, scale=10)
    assert not calls
    for shape in SHAPES[1:]:
        compare(function, shape, torch.float32, uniform=False)
    assert calls
    leaves, targets = inputs((6, 3, 8, 20), torch.float32)
    targets[1] = 20  # outside of the vocabulary
    nll = function(*leaves[:3], targets, leaves[3])
    assert nll.isnan().tolist() == [False, True, *4 * [False]]
    targets[1] = 19
    nll = function(*leaves[:3], targets, leaves[3])
    first, second = (torch.autograd.grad(cross_entropy.mean(nll), leaves, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_triton_in_the_interpreter():
    in_the_interpreter("kernels/test_mixture_kernels", "interpreted()")


@pytest.mark.skipif(not CUDA, reason="no GPU here")
@pytest.mark.parametrize("chunk", [1 << 20, 64 << 20])
@pytest.mark.parametrize("shape", [*SHAPES, *LARGE])
def test_triton_on_the_gpu(shape, chunk, monkeypatch):
    from recurlm.kernels import cross_entropy_triton as whole
    from recurlm.kernels import mixture_triton as fused

    monkeypatch.setattr(whole, "KEPT_BYTES", 0)
    monkeypatch.setattr(fused, "ONCE", True)
    monkeypatch.setattr(fused, "CHUNK_BYTES", max(chunk, 2 * shape[0] * shape[1] * shape[3] // 16))
    torch.full((1 << 28,), float("nan"), device="cuda")  # what the allocator hands out next holds NaN
    for scale in (1, 30, 1000):
        compare(kernels.mixture_cross_entropy, shape, torch.bfloat16, "cuda", scale)
    compare(kernels.mixture_cross_entropy, shape, torch.bfloat16, "cuda", uniform=False)


@pytest.mark.skipif(not CUDA, reason="no GPU here")
def test_a_graph_replays_it(monkeypatch):
    from recurlm.kernels import cross_entropy_triton as whole
    from recurlm.kernels import mixture_triton as fused

    monkeypatch.setattr(whole, "KEPT_BYTES", 0)
    monkeypatch.setattr(fused, "ONCE", True)
    monkeypatch.setattr(fused, "CHUNK_BYTES", 1 << 20)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):  # where autograd first meets the leaves, it waits for them ever after
        leaves, targets = inputs((131, 4, 276, 5_003), torch.bfloat16, "cuda")
        found = [outcome(kernels.mixture_cross_entropy, leaves, targets, True)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        found.append(outcome(kernels.mixture_cross_entropy, leaves, targets, True))
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
