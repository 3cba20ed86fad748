"""The fast twins of QRNN pooling against the reference, every gradient; Triton in its interpreter without a GPU."""

import contextlib
import itertools

import pytest
import torch

from recurlm import kernels
from recurlm.kernels import pool_numba, reference
from support import in_the_interpreter

SHAPES = [(1, 1, 1), (7, 3, 5), (2, 1, 67), (33, 4, 64), (5, 2, 130)]
NAMES = ("h", "c", "grad gates", "grad c", "grad bias")
CUDA = torch.cuda.is_available()


def inputs(shape, dtype, device, with_scale, pooling, seed=0):
    T, B, H = shape
    g = torch.Generator().manual_seed(seed)
    gates = (
        (torch.randn(T, B, reference.GATES[pooling] * H, generator=g, dtype=torch.float64) * 2)
        .to(device, dtype)
        .requires_grad_()
    )
    c = torch.randn(B, H, generator=g, dtype=torch.float64).to(device, dtype).requires_grad_()
    scale = (torch.rand(T, B, H, generator=g) > 0.3).to(device, dtype) if with_scale else None
    return gates, c, scale


def bias_of(gates):
    """A bias for these gates: the same numbers for each type."""
    g = torch.Generator().manual_seed(gates.shape[-1])
    return torch.randn(gates.shape[-1], generator=g).bfloat16().to(gates).requires_grad_()


def outcome(function, gates, c, scale, pooling, bias=None):
    """h, the last c and the gradients of gates, first c and bias (if there is one), in float64."""
    h, last = function(gates, c, scale, pooling, bias)
    g = torch.Generator().manual_seed(9)
    wh = torch.randn(h.shape, generator=g).to(h)
    wl = torch.randn(last.shape, generator=g).to(h)
    grads = torch.autograd.grad((h * wh).sum() + (last * wl).sum(), [x for x in (gates, c, bias) if x is not None])
    return [t.double().cpu() for t in (h.detach(), last.detach(), *grads)]


def compare(function, shape, dtype, device, with_scale, tolerance, poolings=tuple(reference.GATES)):
    for pooling in poolings:
        given = inputs(shape, dtype, device, with_scale, pooling)
        wide = (x if x is None else x.double().detach().requires_grad_() for x in given)
        wide = list(wide)
        expected = outcome(reference.pool, *wide, pooling, bias_of(wide[0]))
        found = outcome(function, *given, pooling, bias_of(given[0]))
        for name, a, b in zip(NAMES, found, expected, strict=True):
            assert (a - b).abs().max() <= tolerance * max(1.0, b.abs().max().item()), (pooling, name)


@pytest.mark.parametrize("pooling", reference.GATES)
def test_a_constant_scale_equals_its_tensor(pooling):
    gates, c, _ = inputs((5, 2, 3), torch.float64, "cpu", False, pooling)
    full = torch.full((5, 2, 3), 0.85, dtype=torch.float64)
    for a, b in zip(
        outcome(reference.pool, gates, c, 0.85, pooling), outcome(reference.pool, gates, c, full, pooling), strict=True
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("pooling", reference.GATES)
def test_gradcheck(pooling):
    gates, c, scale = inputs((4, 2, 3), torch.float64, "cpu", True, pooling)
    given = gates, c, bias_of(gates)
    assert torch.autograd.gradcheck(lambda a, b, d: reference.pool(a, b, scale, pooling, d), given)


KINDS = (torch.float32, torch.bfloat16, torch.float16)
SCALES = (None, "mask", 0.85)


@contextlib.contextmanager
def poisoned():
    """New buffers are filled with NaN, so that an element that is read or returned before it is written shows."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def check_triton(function, shape, pooling, dtype, scale, device, seed=0, with_bias=True):
    """Against float64, no more than twice as far from it as the reference in the same type; equal bits each time."""
    gates, c, mask = inputs(shape, dtype, device, scale == "mask", pooling, seed)
    scale, bias = mask if scale == "mask" else scale, bias_of(gates) if with_bias else None
    given = (gates, c, scale, pooling, bias)
    exact = outcome(
        reference.pool, *(x.double().detach().requires_grad_() if isinstance(x, torch.Tensor) else x for x in given)
    )
    eager = outcome(reference.pool, *given)
    with poisoned():
        found, again = (outcome(function, *given) for _ in range(2))
        with torch.no_grad():
            plain = function(*given)
    for name, ours, twin, theirs, true in zip(NAMES, found, again, eager, exact, strict=False):
        # of a few numbers the reference may by luck have rounded none
        floor = 2 * true.norm() * torch.finfo(dtype).eps if true.numel() < 1000 else 0.0
        error, allowed = (ours - true).norm().item(), (2 * (theirs - true).norm() + floor).item()
        assert error <= allowed, (name, shape, pooling, dtype, error, allowed)
        assert torch.equal(ours, twin), (name, shape, pooling, dtype)
    assert len(found) == len(exact) == 4 + with_bias
    assert all(torch.equal(a.double().cpu(), b) for a, b in zip(plain, found, strict=False)), (shape, pooling, dtype)


def check_triton_cases(shapes, plans):
    """In the interpreter: every shape with every pooling, with a different pair of type and scale each time.

    `plans` is a pair of layouts that stand in for those that the kernels would choose.
    """
    from recurlm.kernels import pool_triton

    with pytest.MonkeyPatch.context() as patch:
        for name, plan in zip(("forward_plan", "backward_plan"), plans, strict=True):
            patch.setattr(pool_triton, name, lambda *_, plan=plan: pool_triton.Plan(*plan))
        for n, (shape, pooling) in enumerate(itertools.product(shapes, reference.GATES)):
            pairs = list(itertools.product(KINDS, SCALES))
            dtype, scale = pairs[n * 4 % 9]
            check_triton(pool_triton.pool, shape, pooling, dtype, scale, "cpu", seed=n, with_bias=n % 5 > 0)


WHOLE = ((16, 1, 8, 10**6, True, "plain"), (16, 1, 2, 10**6, False, "plain"))
SPLIT = ((16, 1, 2, 6, True, "plain"), (32, 2, 2, 4, True, "plain"))
SPARSE = ((16, 1, 2, 10**6, True, "plain"), (16, 1, 4, 10**6, True, "plain"))  # fewer marks than rounds of loads
AT_ONCE = ((16, 1, 3, 10**6, True, "plain", 4), (16, 1, 3, 10**6, True, "plain"))
IN_THE_INTERPRETER = (
    ([(1, 1, 1), (12, 1, 18), (7, 3, 5)], AT_ONCE),
    ([(1, 1, 1), (7, 3, 5), (2, 1, 37), (5, 1, 18)], WHOLE),
    ([(1, 2, 3), (7, 1, 5), (13, 2, 18), (41, 1, 4)], SPLIT),
    ([(7, 2, 5)], SPARSE),
)


def interpreted():
    """What the test below runs."""
    for shapes, plans in IN_THE_INTERPRETER:
        check_triton_cases(shapes, plans)


def test_triton_in_the_interpreter():
    in_the_interpreter("kernels/test_pool", "interpreted()")


# few, for each kernel of each takes a second or more to compile: (shape, pooling, type, scale, plans or None for its own)
ON_THE_GPU = (
    ((7, 3, 18), "ifo", torch.float32, "mask", WHOLE),
    ((13, 2, 18), "f", torch.float32, "mask", SPLIT),
    ((13, 2, 18), "ifo", torch.float16, 0.85, SPLIT),
    ((701, 1, 18), "fo", torch.bfloat16, None, SPLIT),
    ((13, 2, 18), "fo", torch.float16, "mask", SPARSE),
    ((1, 1, 1), "fo", torch.float32, "mask", WHOLE),
    ((12, 2, 18), "f", torch.float32, 0.85, AT_ONCE),
    ((77, 3, 67), "ifo", torch.float16, "mask", None),
    ((70, 20, 1550), "fo", torch.bfloat16, None, None),
    ((140, 60, 2500), "fo", torch.bfloat16, "mask", None),
    ((65, 30, 2500), "fo", torch.float32, None, None),
    ((2001, 1, 400), "fo", torch.bfloat16, 0.85, None),
)


@pytest.mark.skipif(not CUDA, reason="no GPU here")
@pytest.mark.parametrize(("shape", "pooling", "dtype", "scale", "plans"), ON_THE_GPU)
def test_triton_on_the_gpu(shape, pooling, dtype, scale, plans, monkeypatch):
    from recurlm.kernels import pool_triton

    for name, plan in zip(("forward_plan", "backward_plan"), plans or (), strict=False):
        how = "exact" if dtype == torch.float32 else "mixed"
        monkeypatch.setattr(
            pool_triton, name, lambda *_, plan=plan, how=how: pool_triton.Plan(*plan)._replace(activation=how)
        )
    check_triton(pool_triton.pool, shape, pooling, dtype, scale, "cuda")


@pytest.mark.skipif(not CUDA, reason="no GPU here")
def test_triton_at_offsets_beyond_32_bits():
    """The last steps of gates with more than 2^31 elements, against the reference of the same steps alone."""
    if torch.cuda.mem_get_info()[0] < 16 << 30:
        pytest.skip("needs 16 GiB of free GPU memory")
    from recurlm.kernels.pool_triton import pool

    T, B, H, last = 300, 640, 4096, 4
    with torch.no_grad():
        gates = torch.zeros(T, B, 3 * H, dtype=torch.bfloat16, device="cuda")  # c decays to 0: z is 0
        gates[-last:].normal_()
    gates.requires_grad_()
    c = torch.zeros(B, H, dtype=torch.bfloat16, device="cuda")
    found = pool(gates, c, None, "fo")[0]
    upstream = torch.zeros_like(found)
    upstream[-last:] = 1
    (grad,) = torch.autograd.grad(found, gates, upstream)
    tail = gates.detach()[-last:].float().requires_grad_()
    expected = reference.pool(tail, c.float(), None, "fo")[0]
    (grad_tail,) = torch.autograd.grad(expected, tail, torch.ones_like(expected))
    assert torch.allclose(found[-last:].float(), expected, rtol=0.01, atol=0.01)
    assert torch.allclose(grad[-last:].float(), grad_tail, rtol=0.01, atol=0.01)
    assert not found[:-last].any()


@pytest.mark.skipif(not CUDA, reason="no GPU here")
def test_triton_in_a_cuda_graph():
    """Split in time, with a bias: replayed on other numbers it gives what a call gives."""
    from recurlm.kernels.pool_triton import pool

    side = torch.cuda.Stream()  # where autograd first meets the leaves, it waits for them ever after
    with torch.cuda.stream(side):
        gates, c, _ = inputs((700, 1, 130), torch.float32, "cuda", False, "fo")
        bias = bias_of(gates)

    def call():
        h, last = pool(gates, c, 0.9, "fo", bias)
        return [h, last, *torch.autograd.grad(h.sum() + last.sum(), (gates, c, bias))]

    with torch.cuda.stream(side):
        call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        captured = call()
    with torch.cuda.stream(side):
        with torch.no_grad():
            gates.mul_(0.5)
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, call(), strict=True))


def test_the_table_serves_what_it_names():
    gates, c, _ = inputs((3, 2, 4), torch.float32, "cpu", False, "fo")
    assert torch.equal(kernels.pool(gates, c, None, "fo")[0], pool_numba.pool(gates, c, None, "fo")[0])
    half = kernels.pool(gates.bfloat16(), c.bfloat16(), None, "fo")[0]
    wide = pool_numba.pool(gates.bfloat16().float(), c.bfloat16().float(), None, "fo")[0]
    assert torch.equal(half, wide.bfloat16())
    assert kernels._load("pool", "xpu", torch.float32) is reference.pool


def test_empty_time():
    gates, c, _ = inputs((1, 2, 3), torch.float32, "cpu", False, "fo")
    h, last = kernels.pool(gates[:0], c, None, "fo")
    assert h.shape == (0, 2, 3)
    assert torch.equal(last, c)
