"""Cross-entropy of a cluster's rows: on the CPU and in Triton against the formula in float64, every gradient."""

import pytest
import torch

from recurlm import kernels
from recurlm.kernels import cross_entropy, reference
from support import in_the_interpreter

SHAPES = [
    (1, 64, 1),
    (2, 100, 17),
    (3, 8, 2),
    (131, 64, 257),
    (70, 33, 300),
    (200, 130, 140),
    (65, 500, 129),
    (90, 5, 40),
]
LARGE = [(1400, 400, 10000), (8400, 8, 50000), (5600, 104, 33278), (1400, 512, 700), (1400, 1000, 700)]
SHARES = [0.0, 0.1, 1.0]
CUDA = torch.cuda.is_available()


def inputs(shape, share, dtype, device="cpu", scale=1.0, seed=0):
    """[hidden, weight, bias], targets of which about a share is in the cluster, upstream gradients."""
    N, F, V = shape
    g = torch.Generator().manual_seed(seed)
    values = [torch.randn(N, F, generator=g), torch.randn(V, F, generator=g) * 2 * scale / F**0.5]
    values.append(torch.randn(V, generator=g) * scale)
    inside = torch.rand(N, generator=g) < share
    outside = torch.where(torch.rand(N, generator=g) < 0.5, -1 - torch.arange(N), V + torch.arange(N))
    targets = torch.where(inside, torch.randint(V, (N,), generator=g), outside)
    upstream = torch.randn(N, generator=g) * (torch.rand(N, generator=g) > 0.3)
    return [x.to(device, dtype).requires_grad_() for x in values], targets.to(device), upstream.to(device)


def alone(function):
    """The function of one cluster, whose ids begin with 0."""
    return lambda h, w, b, targets: function([h], [w], [b], targets, [0])


def three(function):
    """The function of three clusters of other sizes and depths over one matrix of features, which they share in strips."""

    def nll(h, w, b, targets):
        V, F = w.shape
        words, depths = (V // 2, V // 3, V - V // 2 - V // 3), (F - 2, F // 2, 1)
        features = [h[:, :depth] for depth in depths]
        weights = [part[:, :depth].contiguous() for part, depth in zip(w.split(words), depths, strict=True)]
        firsts = (0, words[0], words[0] + words[1])
        return function(features, weights, b.split(words), targets, firsts)

    return nll


def outcome(function, leaves, targets, upstream):
    nll = function(*leaves, targets)
    return [nll.detach(), *torch.autograd.grad(nll, leaves, upstream.to(nll.dtype))]


def errors(found, expected):
    return [(a.double() - b).norm().item() for a, b in zip(found, expected, strict=True)]


def compare(function, shape, share, dtype, device="cpu", scale=1.0, truth=alone(reference.cluster_cross_entropies)):
    """At most twice the error of the plain formula in the same type, two runs equal bit by bit, rows outside exactly 0."""
    leaves, targets, upstream = inputs(shape, share, dtype, device, scale)
    wide = [x.detach().double().requires_grad_() for x in leaves]
    expected = outcome(truth, wide, targets, upstream)
    plain = errors(outcome(truth, leaves, targets, upstream), expected)
    found = outcome(function, leaves, targets, upstream)
    rounding = 1e-6 * (1 + reference.logits(*wide).abs().max().item())
    factors = (0.0, wide[1].norm().item(), wide[0].norm().item(), 0.0)  # of P - 1, which may be nothing but rounding
    for name, error, allowed, value, factor in zip(
        ("nll", "dh", "dw", "db"), errors(found, expected), plain, expected, factors, strict=True
    ):
        bound = 2 * allowed + rounding * (1 + value.norm().item() + factor)
        assert error <= bound, (name, shape, share, dtype, scale, error)
    assert [x.dtype for x in found] == [torch.float32, *(x.dtype for x in leaves)]
    outside = (targets < 0) | (targets >= shape[2])
    assert not found[0][outside].any() and not found[1][outside].any()
    for first, second in zip(found, outcome(function, leaves, targets, upstream), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("shape", SHAPES)
def test_on_the_cpu(shape, share, dtype):
    compare(alone(kernels.cluster_cross_entropies), shape, share, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("share", SHARES)
def test_three_clusters_on_the_cpu(share, dtype):
    truth = three(reference.cluster_cross_entropies)
    compare(three(kernels.cluster_cross_entropies), (131, 64, 257), share, dtype, truth=truth)


def test_gradcheck():
    leaves, targets, _ = inputs((9, 3, 5), 0.5, torch.float64)
    for function in (alone(cross_entropy.cluster_cross_entropies), alone(reference.cluster_cross_entropies)):
        assert torch.autograd.gradcheck(lambda h, w, b, f=function: f(h, w, b, targets), leaves)


@pytest.mark.parametrize(("features", "itemsize"), [(8, 2), (104, 2), (400, 2), (1000, 2), (104, 4), (400, 4)])
@pytest.mark.parametrize("shared", [99 << 10, 163 << 10, 227 << 10])
def test_tiles_fit_the_chip(features, itemsize, shared):
    pytest.importorskip("triton", reason="triton is not installed")
    from recurlm.kernels import cluster_triton as fused

    it = fused.tiles(features, itemsize, shared, 132)
    assert it is not None and it.stay * features <= fused.MOST_HELD
    assert (it.stay + fused.STAGES * it.stream) * features * itemsize < shared
    assert fused.tiles(1 << 16, itemsize, shared, 132) is None


def interpreted():
    """What the subprocess below runs."""
    from recurlm.kernels import cluster_triton as fused

    torch.use_deterministic_algorithms(True)  # uninitialised memory holds NaN
    for shape in SHAPES:
        for share in SHARES:
            compare(alone(fused.cluster_cross_entropies), shape, share, torch.float32)
    compare(alone(fused.cluster_cross_entropies), (70, 33, 300), 0.5, torch.float16)
    fused._device = lambda index: (1 << 17, 9)
    fused.LISTED = 16
    fused.SHAPES = ((16, 16),)  # several tiles of rows, each split
    real = fused.tiles
    fused.tiles = lambda features, itemsize, shared, slots: real(features, itemsize, shared, 9)
    for share in SHARES:
        compare(alone(fused.cluster_cross_entropies), (131, 64, 257), share, torch.float32)
    for scale in (100, 5000):
        compare(alone(fused.cluster_cross_entropies), (131, 64, 257), 0.4, torch.float32, scale=scale)
    truth = three(reference.cluster_cross_entropies)
    compare(three(fused.cluster_cross_entropies), (131, 64, 257), 0.6, torch.float32, truth=truth)
    leaves, targets, upstream = inputs((40, 24, 130), 0.5, torch.float32)
    nll = alone(fused.cluster_cross_entropies)(*leaves, targets)
    first, second = (torch.autograd.grad(nll, leaves, upstream, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    only_weight = torch.autograd.grad(
        alone(fused.cluster_cross_entropies)(leaves[0].detach(), *leaves[1:], targets), leaves[1:], upstream
    )
    assert all(torch.equal(a, b) for a, b in zip(first[1:], only_weight, strict=True))
    assert alone(fused.cluster_cross_entropies)(*(x[:0] for x in leaves[:1]), *leaves[1:], targets[:0]).shape == (0,)
    fused.tiles = lambda *_: None  # too many features
    compare(alone(fused.cluster_cross_entropies), (20, 24, 30), 0.5, torch.float32)


def test_triton_in_the_interpreter():
    in_the_interpreter("kernels/test_cluster", "interpreted()")


@pytest.mark.skipif(not CUDA, reason="no GPU here")
@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("shape", [*SHAPES, *LARGE])
def test_triton_on_the_gpu(shape, share):
    torch.full((1 << 28,), float("nan"), device="cuda")  # what the allocator hands out next holds NaN
    for scale in (1, 100):
        compare(alone(kernels.cluster_cross_entropies), shape, share, torch.bfloat16, "cuda", scale)
    compare(alone(kernels.cluster_cross_entropies), shape, share, torch.float32, "cuda")


@pytest.mark.skipif(not CUDA, reason="no GPU here")
@pytest.mark.parametrize("share", SHARES)
def test_three_clusters_on_the_gpu(share):
    torch.full((1 << 28,), float("nan"), device="cuda")
    truth = three(reference.cluster_cross_entropies)
    for shape in ((131, 64, 257), (1400, 104, 10000)):
        compare(three(kernels.cluster_cross_entropies), shape, share, torch.bfloat16, "cuda", truth=truth)


@pytest.mark.skipif(not CUDA, reason="no GPU here")
def test_a_graph_replays_it_with_other_rows():
    leaves, targets, upstream = inputs((900, 100, 1000), 0.1, torch.bfloat16, "cuda")
    _, others, _ = inputs((900, 100, 1000), 0.8, torch.bfloat16, "cuda", seed=1)
    outcome(alone(kernels.cluster_cross_entropies), leaves, targets, upstream)
    graph, given = torch.cuda.CUDAGraph(), targets.clone()
    with torch.cuda.graph(graph):
        found = outcome(alone(kernels.cluster_cross_entropies), leaves, given, upstream)
    for now in (targets, others, targets):
        given.copy_(now)
        graph.replay()
        torch.cuda.synchronize()
        expected = outcome(alone(kernels.cluster_cross_entropies), leaves, now, upstream)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
