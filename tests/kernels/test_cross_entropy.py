"""The fused linear cross-entropy: chunked in torch and in Triton against the plain formula in float64, every gradient."""

import subprocess
import sys

import pytest
import torch

from recurlm import kernels
from recurlm.kernels import cross_entropy, reference
from support import in_the_interpreter

SHAPES = [(1, 64, 1), (2, 100, 17), (3, 8, 2), (131, 64, 257), (70, 33, 300), (200, 400, 140), (65, 1024, 129)]
LARGE = [(1400, 400, 10000), (1031, 280, 5003), (5600, 100, 33278)]
CUDA = torch.cuda.is_available()


def inputs(shape, dtype, device="cpu", scale=1.0, seed=0):
    """[hidden, weight, bias], targets, upstream gradients of both signs with zeros among them."""
    N, H, V = shape
    g = torch.Generator().manual_seed(seed)
    values = [torch.randn(N, H, generator=g), torch.randn(V, H, generator=g) * 2 * scale / H**0.5]
    values.append(torch.randn(V, generator=g) * scale)
    upstream = torch.randn(N, generator=g) * (torch.rand(N, generator=g) > 0.3)
    targets = torch.randint(V, (N,), generator=g)
    return [x.to(device, dtype).requires_grad_() for x in values], targets.to(device), upstream.to(device)


def outcome(function, leaves, targets, upstream):
    nll = function(*leaves, targets)
    return [nll.detach(), *torch.autograd.grad(nll, leaves, upstream.to(nll.dtype))]


def errors(found, expected):
    return [(a.double() - b).norm().item() for a, b in zip(found, expected, strict=True)]


def compare(function, shape, dtype, device="cpu", scale=1.0):
    """Loss and gradients: at most twice the error of the plain formula in the same type, and two runs equal bit by bit."""
    leaves, targets, upstream = inputs(shape, dtype, device, scale)
    wide = [x.detach().double().requires_grad_() for x in leaves]
    expected = outcome(reference.linear_cross_entropy, wide, targets, upstream)
    plain = errors(outcome(reference.linear_cross_entropy, leaves, targets, upstream), expected)
    found = outcome(function, leaves, targets, upstream)
    # Besides: what fp32 makes of logits of this size.
    rounding = 1e-6 * (1 + reference.logits(*wide).abs().max().item())
    for name, error, allowed, truth in zip(
        ("nll", "dh", "dw", "db"), errors(found, expected), plain, expected, strict=True
    ):
        assert error <= 2 * allowed + rounding * (1 + truth.norm().item()), (name, shape, dtype, scale)
    assert [x.dtype for x in found] == [torch.float32, *(x.dtype for x in leaves)]
    for first, second in zip(found, outcome(function, leaves, targets, upstream), strict=True):
        assert torch.equal(first, second)


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(cross_entropy, "LOGITS", 1000)


@pytest.fixture
def poisoned():
    """Uninitialised memory holds NaN."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.usefixtures("small_chunks", "poisoned")
def test_by_rows_equals_the_formula(shape, dtype):
    compare(cross_entropy.linear_cross_entropy, shape, dtype)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("scale", [100, 5000])
def test_extreme_logits(scale):
    compare(cross_entropy.linear_cross_entropy, (131, 64, 257), torch.float32, scale=scale)


def certain(function, device="cpu"):
    """One logit of 8192 among zeros, in the target's place or in another: losses and gradients without any rounding."""
    h = torch.ones(40, 64, dtype=torch.bfloat16, device=device).requires_grad_()
    w = torch.zeros(300, 64, dtype=torch.bfloat16, device=device).requires_grad_()
    b, db_expected = torch.zeros(2, 300, device=device)
    b[7] = 8192
    right = torch.arange(40, device=device) % 2 == 0
    leaves = [h, w, b.detach().clone().requires_grad_()]
    nll, dh, dw, db = outcome(function, leaves, torch.where(right, 7, 250), torch.ones(40, device=device))
    db_expected[7], db_expected[250] = 20, -20
    assert torch.equal(nll, torch.where(right, 0.0, 8192.0))
    assert torch.equal(db, db_expected)
    assert torch.equal(dw.float(), db_expected[:, None].expand(300, 64))
    assert not dh.any()


@pytest.mark.usefixtures("small_chunks")
def test_certain_outcomes():
    certain(cross_entropy.linear_cross_entropy)


def test_gradcheck(monkeypatch):
    leaves, targets, _ = inputs((7, 3, 5), torch.float64)
    for size in (1 << 26, 10):
        monkeypatch.setattr(cross_entropy, "LOGITS", size)
        assert torch.autograd.gradcheck(lambda h, w, b: cross_entropy.linear_cross_entropy(h, w, b, targets), leaves)


def test_small_outputs_are_the_formula_bit_by_bit():
    leaves, targets, upstream = inputs((40, 24, 50), torch.float32)
    found = outcome(kernels.linear_cross_entropy, leaves, targets, upstream)
    expected = outcome(reference.linear_cross_entropy, leaves, targets, upstream)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.usefixtures("small_chunks")
def test_mixed_types_as_under_autocast():
    """bfloat16 activations, fp32 weights: gradients arrive in fp32."""
    (h, w, b), targets, upstream = inputs((60, 32, 90), torch.bfloat16)
    leaves = [h, w.detach().float().requires_grad_(), b.detach().float().requires_grad_()]
    found = outcome(kernels.linear_cross_entropy, leaves, targets, upstream)
    expected = outcome(reference.linear_cross_entropy, leaves, targets, upstream)
    for a, e in zip(found, expected, strict=True):
        assert a.dtype == e.dtype
        assert (a.float() - e.float()).norm() <= 0.02 * e.float().norm()


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # torch's own, in forward_ad
def test_higher_and_forward_derivatives_are_refused():
    leaves, targets, upstream = inputs((40, 24, 50), torch.float64)
    nll = cross_entropy.linear_cross_entropy(*leaves, targets)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(nll, leaves, upstream.double(), create_graph=True)
    with (
        pytest.raises((RuntimeError, NotImplementedError), match=r"forward AD|jvp"),
        torch.autograd.forward_ad.dual_level(),
    ):
        dual = torch.autograd.forward_ad.make_dual(leaves[0], torch.ones_like(leaves[0]))
        cross_entropy.linear_cross_entropy(dual, *leaves[1:], targets)


def test_memory_of_large_outputs_is_bounded():
    """2,000 rows and 20,000 words: 160 MB of logits, of which the process holds 4 at a time."""
    code = (
        "import resource, torch; from recurlm.kernels import cross_entropy as c; torch.set_num_threads(1)\n"
        "c.LOGITS = 1_000_000\n"
        "h, w, b = (torch.randn(size).requires_grad_() for size in ((2000, 2), (20_000, 2), 20_000))\n"
        "run = lambda n: c.linear_cross_entropy(h[:n], w, b, torch.arange(n)).sum().backward()\n"
        "run(60); before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "run(2000); print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert int(done.stdout) < 60, done.stderr


def test_no_rows():
    leaves, targets, upstream = inputs((0, 8, 5), torch.float32)
    assert all(not x.any() for x in outcome(kernels.linear_cross_entropy, leaves, targets, upstream))


def interpreted():
    """What the subprocess below runs. The interpreter multiplies fp32 and float16, but not bfloat16."""
    from recurlm.kernels import cross_entropy_triton as fused

    torch.use_deterministic_algorithms(True)  # uninitialised memory holds NaN
    fused.CHUNK_SHARE = 0
    for limit in (1 << 30, 1):  # one chunk of the vocabulary, and as many as there can be
        fused.CHUNK_BYTES = limit
        fused.KEPT_BYTES = 0
        for shape in SHAPES:
            compare(fused.linear_cross_entropy, shape, torch.float32)
        compare(fused.linear_cross_entropy, (70, 33, 300), torch.float16)
    for kept in (0, 1 << 30):
        fused.KEPT_BYTES = kept
        for scale in (100, 5000):
            compare(fused.linear_cross_entropy, (131, 64, 257), torch.float32, scale=scale)
    for shape in SHAPES:
        compare(fused.linear_cross_entropy, shape, torch.float32)
    compare(fused.linear_cross_entropy, (70, 33, 300), torch.float16)
    leaves, targets, upstream = inputs((40, 24, 130), torch.float32)
    nll = fused.linear_cross_entropy(*leaves, targets)
    first, second = (torch.autograd.grad(nll, leaves, upstream, retain_graph=True) for _ in range(2))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(first, second, strict=True))
    leaves, targets, upstream = inputs((3, 8, 20), torch.float32)
    targets[1] = 20  # outside of the vocabulary
    assert fused.linear_cross_entropy(*leaves, targets).isnan().tolist() == [False, True, False]
    leaves[1] = leaves[1].detach().half()  # another type than the hidden rows
    leaves[1].requires_grad_()
    targets[1] = 19
    for a, b in zip(
        outcome(fused.linear_cross_entropy, leaves, targets, upstream),
        outcome(reference.linear_cross_entropy, leaves, targets, upstream),
        strict=True,
    ):
        assert a.dtype == b.dtype
        assert torch.allclose(a.float(), b.float(), rtol=1e-3, atol=1e-5)


def test_triton_in_the_interpreter():
    in_the_interpreter("kernels/test_cross_entropy", "interpreted()")


@pytest.mark.skipif(not CUDA, reason="no GPU here")
@pytest.mark.parametrize("kept", [0, 1 << 30])
@pytest.mark.parametrize("chunk", [1, 48 << 20])
@pytest.mark.parametrize("shape", [*SHAPES, *LARGE])
def test_triton_on_the_gpu(shape, chunk, kept, monkeypatch):
    from recurlm.kernels import cross_entropy_triton as fused

    if kept and chunk == 1:
        pytest.skip("where the exponentials are kept, there are no chunks")
    monkeypatch.setattr(fused, "KEPT_BYTES", kept)
    monkeypatch.setattr(fused, "CHUNK_SHARE", 0)
    monkeypatch.setattr(fused, "CHUNK_BYTES", max(chunk, 2 * shape[0] * shape[2] // 16))
    torch.full((1 << 28,), float("nan"), device="cuda")  # what the allocator hands out next holds NaN
    for scale in (1, 100):
        compare(kernels.linear_cross_entropy, shape, torch.bfloat16, "cuda", scale)


@pytest.mark.skipif(not CUDA, reason="no GPU here")
def test_certain_outcomes_on_the_gpu():
    certain(kernels.linear_cross_entropy, "cuda")


@pytest.mark.skipif(not CUDA, reason="no GPU here")
def test_a_graph_replays_it():
    leaves, targets, upstream = inputs((300, 100, 1000), torch.bfloat16, "cuda")
    expected = outcome(kernels.linear_cross_entropy, leaves, targets, upstream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = outcome(kernels.linear_cross_entropy, leaves, targets, upstream)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.skipif(not CUDA, reason="no GPU here")
@pytest.mark.parametrize("shape", [(1397, 276, 5003), (2048, 304, 5000)])
def test_two_streams_change_no_bit(shape, monkeypatch):
    """Rows, features and words that are multiples of nothing, and such that are; captured too."""
    from recurlm.kernels import cross_entropy_triton as fused

    leaves, targets, upstream = inputs(shape, torch.bfloat16, "cuda")
    monkeypatch.setattr(fused, "KEPT_BYTES", 0)
    monkeypatch.setattr(fused, "CHUNK_SHARE", 0)
    monkeypatch.setattr(fused, "CHUNK_BYTES", 2 * shape[0] * 512)
    found = []
    for streams in (False, True):
        monkeypatch.setattr(fused, "TWO_STREAMS", streams)
        found.append(outcome(kernels.linear_cross_entropy, leaves, targets, upstream))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found.append(outcome(kernels.linear_cross_entropy, leaves, targets, upstream))
        graph.replay()
        torch.cuda.synchronize()
    for others in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], others, strict=True))


def test_the_table_serves_what_it_names():
    operation = "linear_cross_entropy"
    assert kernels._load(operation, "cpu", torch.float32) is cross_entropy.linear_cross_entropy
    assert kernels._load(operation, "xpu", torch.float32) is reference.linear_cross_entropy
