"""The CPU's fast twin of QRNN pooling: against float64, on extreme inputs, on any number of threads, in a fork."""

import os
import platform
import re
import subprocess
import sys
import threading

import numba
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recurlm.kernels import pool_numba, reference

POOLINGS = tuple(reference.GATES)
SHAPES = [
    (1, 1, 1),
    (7, 3, 5),
    (2, 1, 67),
    (33, 4, 64),
    (1, 5, 513),
    (9, 1, 1031),
    (8, 2, 512),
    (70, 20, 155),
    (17, 3, 1550),
]
NAMES = ("h", "c", "grad gates", "grad c")


def inputs(shape, dtype, scale, pooling, seed=0):
    """Gates, first c and scale ('none', 'mask' or 'constant'), rounded to the type, with gradients wanted."""
    T, B, H = shape
    g = torch.Generator().manual_seed(seed)
    gates = torch.randn(T, B, reference.GATES[pooling] * H, generator=g, dtype=torch.float64) * 3
    c = torch.randn(B, H, generator=g, dtype=torch.float64)
    mask = (torch.rand(T, B, H, generator=g) > 0.3).to(dtype)
    scale = {"none": None, "mask": mask, "constant": 0.7}[scale]
    return gates.to(dtype).requires_grad_(), c.to(dtype).requires_grad_(), scale


def outcome(function, gates, c, scale, pooling):
    """h, the last c and every gradient, for random gradients of h and of the last c."""
    h, last = function(gates, c, scale, pooling)
    g = torch.Generator().manual_seed(9)
    weights = [torch.randn(x.shape, generator=g).to(x.dtype) for x in (h, last)]
    return [h.detach(), last.detach(), *torch.autograd.grad((h, last), (gates, c), weights)]


def wide(x):
    return x.detach().double().requires_grad_(x.requires_grad) if isinstance(x, torch.Tensor) else x


@pytest.mark.parametrize("scale", ["none", "mask", "constant"])
@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("shape", SHAPES)
def test_error_is_at_most_twice_that_of_the_reference(shape, pooling, scale):
    check(shape, pooling, scale)


@settings(max_examples=30, deadline=None)
@given(
    st.tuples(st.integers(1, 40), st.integers(1, 5), st.integers(1, 3000)),
    st.sampled_from(POOLINGS),
    st.sampled_from(["none", "mask", "constant"]),
)
def test_shapes_at_random(shape, pooling, scale):
    check(shape, pooling, scale)


def check(shape, pooling, scale):
    values = inputs(shape, torch.float32, scale, pooling)
    truth = outcome(reference.pool, *(wide(x) for x in values), pooling)
    eager, found = outcome(reference.pool, *values, pooling), outcome(pool_numba.pool, *values, pooling)
    for name, t, a, b in zip(NAMES, truth, eager, found, strict=True):
        size = max(1.0, t.abs().max().item())
        allowed = (
            2 * (a - t).abs().max().item() + 2**-23 * size
        )  # a unit in the last place more: few elements are few draws
        assert (b - t).abs().max().item() <= allowed, name


@pytest.mark.parametrize("scale", ["none", "mask", "constant"])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_float64(pooling, scale):
    given = inputs((19, 2, 77), torch.float64, scale, pooling)
    truth, found = outcome(reference.pool, *given, pooling), outcome(pool_numba.pool, *given, pooling)
    for name, a, b in zip(NAMES, truth, found, strict=True):
        assert (a - b).abs().max() <= 1e-14 * max(1.0, a.abs().max().item()), name


@pytest.mark.parametrize("scale", ["none", "mask", "constant"])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_gradcheck(pooling, scale):
    gates, c, scale = inputs((10, 2, 3), torch.float64, scale, pooling)  # more steps than a segment has
    assert torch.autograd.gradcheck(lambda a, b: pool_numba.pool(a, b, scale, pooling), (gates / 3, c))


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_types_compute_in_fp32(dtype, pooling):
    given = inputs((12, 3, 40), dtype, "mask", pooling)
    h, last = pool_numba.pool(*given, pooling)
    exact = pool_numba.pool(*(x.float() for x in given), pooling)
    assert h.dtype == last.dtype == dtype
    assert torch.equal(h, exact[0].to(dtype))
    assert torch.equal(last, exact[1].to(dtype))
    assert all(g.dtype == dtype for g in torch.autograd.grad(h.float().sum(), given[:2]))


def _tanhs(x):
    out = np.full_like(x, np.nan)
    pool_numba._tanhs(x, out)
    return out


def _sigmoids(x):
    out = np.full_like(x, np.nan)
    pool_numba._sigmoids(x, out)
    return out


@pytest.mark.parametrize(("function", "exact"), [(_tanhs, np.tanh), (_sigmoids, lambda x: 1 / (1 + np.exp(-x)))])
def test_activations_to_three_units_in_the_last_place(function, exact):
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.standard_normal(300_000) * size for size in (1e-6, 1e-2, 1, 5, 30)])
    x = np.concatenate([x, np.linspace(-87, 87, 300_001)]).astype(np.float32)
    truth = exact(x.astype(np.float64))
    normal = np.abs(truth) > 2**-125
    units = np.abs(function(x) - truth)[normal] / np.spacing(np.abs(truth[normal]).astype(np.float32))
    if function is _sigmoids:
        assert units.max() <= 6
        units = units[truth[normal] > 1e-6]
    assert units.max() <= 3
    assert units.mean() < 0.5
    assert np.abs(function(x) - truth)[~normal].max(initial=0) < 2**-125


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_activations_of_extreme_inputs(dtype):
    x = np.array([0.0, -0.0, 1e-40, -1e-40, 100, -1e4, 1e4, 3e38, -3e38, np.inf, -np.inf, np.nan], dtype)
    for copies in (1, 7):  # alone, and in vectors
        found = _tanhs(np.tile(x, copies)), _sigmoids(np.tile(x, copies))
        for a, exact in zip(found, (np.tanh(x), torch.sigmoid(torch.from_numpy(x)).numpy()), strict=True):
            np.testing.assert_allclose(a, np.tile(exact, copies), rtol=1e-6, atol=1e-37)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_extreme_gates(pooling):
    """Saturated gates give the limits, a NaN reaches what depends on it and nothing else."""
    gates, c, _ = inputs((20, 2, 33), torch.float32, "none", pooling)
    with torch.no_grad():
        gates *= 1e4
        gates[3, 0] = float("inf")
        gates[5, 0] = -float("inf")
        gates[6, 1] = 1e-42
    truth = outcome(reference.pool, wide(gates), wide(c), None, pooling)
    found = outcome(pool_numba.pool, gates, c, None, pooling)
    for name, a, b in zip(NAMES, truth, found, strict=True):
        assert b.isfinite().all(), name
        assert (a - b).abs().max() <= 1e-5 * max(1.0, a.abs().max().item()), name
    with torch.no_grad():
        gates[10, 1, 7] = float("nan")
    h = pool_numba.pool(gates, c, None, pooling)[0]
    assert torch.equal(h.isnan(), reference.pool(gates, c, None, pooling)[0].isnan())


@pytest.mark.parametrize("pooling", POOLINGS)
def test_units_kept_by_zoneout_are_kept_exactly(pooling):
    gates, c, _ = inputs((9, 2, 40), torch.float32, "none", pooling)
    for scale in (0.0, torch.zeros(9, 2, 40)):
        assert torch.equal(pool_numba.pool(gates, c, scale, pooling)[1], c)


def test_scales_that_mean_the_same_give_the_same():
    gates, c, _ = inputs((9, 2, 40), torch.float32, "none", "fo")
    for number in (1.0, 0.7):
        expected = outcome(pool_numba.pool, gates, c, number, "fo")
        for scale in (torch.full((9, 2, 40), number), torch.full((1, 2, 1), number), torch.tensor(number).double()):
            assert all(map(torch.equal, expected, outcome(pool_numba.pool, gates, c, scale, "fo")))
    plain = outcome(pool_numba.pool, gates, c, None, "fo")
    assert all(map(torch.equal, plain, outcome(pool_numba.pool, gates, c, 1.0, "fo")))


@pytest.mark.parametrize("pooling", POOLINGS)
def test_inputs_that_are_not_contiguous(pooling):
    gates, c, scale = inputs((11, 4, 30), torch.float32, "mask", pooling)
    expected = outcome(pool_numba.pool, gates, c, scale, pooling)

    def strided(x):
        return torch.stack((x.detach(), torch.full_like(x, float("nan"))), dim=-1)[..., 0]

    strange = (
        strided(gates).requires_grad_(),
        strided(c).requires_grad_(),
        scale.transpose(0, 1).contiguous().transpose(0, 1),
    )
    assert not any(x.is_contiguous() for x in strange)
    assert all(map(torch.equal, expected, outcome(pool_numba.pool, *strange, pooling)))
    h, _ = pool_numba.pool(gates, c, scale, pooling)
    (one,) = torch.autograd.grad(h.sum(), gates, retain_graph=True)  # an expanded gradient
    (other,) = torch.autograd.grad(h, gates, torch.ones_like(h))
    assert torch.equal(one, other)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_every_number_of_threads_and_every_run_gives_the_same_bits(pooling, monkeypatch):
    """All results are written into memory full of NaN, by parts of the work that change with the number of threads."""
    given = inputs((13, 5, 1100), torch.float32, "mask", pooling)
    outcome(pool_numba.pool, *given, pooling)  # compiled from here on
    monkeypatch.setattr(pool_numba.np, "empty", lambda shape, dtype: np.full(shape, np.nan, dtype))
    monkeypatch.setattr(pool_numba, "ELEMENTS", 1)
    results = []
    for threads in (1, 1, 2, 3, 64):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        results.append(outcome(pool_numba.pool, *given, pooling))
    assert all(x.isfinite().all() for x in results[0])
    assert all(torch.equal(a, b) for result in results[1:] for a, b in zip(results[0], result, strict=True))


def test_one_thread_starts_no_other(monkeypatch):
    monkeypatch.setattr(pool_numba, "_workers", lambda: pytest.fail("asked for threads"))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    outcome(pool_numba.pool, *inputs((70, 4, 512), torch.float32, "none", "fo"), "fo")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    outcome(pool_numba.pool, *inputs((1, 4, 512), torch.float32, "none", "fo"), "fo")  # too little to share


def test_from_several_threads_at_once():
    given = [inputs((40, 8, 600), torch.float32, "mask", "ifo", seed) for seed in range(4)]
    expected = [outcome(pool_numba.pool, *g, "ifo") for g in given]
    found = [None] * 4

    def work(k):
        for _ in range(5):
            found[k] = outcome(pool_numba.pool, *given[k], "ifo")

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(a, b) for e, f in zip(expected, found, strict=True) for a, b in zip(e, f, strict=True))


def test_without_a_gradient_nothing_is_kept(monkeypatch):
    gates, c, _ = inputs((20, 2, 30), torch.float32, "none", "fo")
    expected = pool_numba.pool(gates, c, None, "fo")
    sizes = []
    pooled = pool_numba._pooled

    def recorded(*args, **kwargs):
        result = pooled(*args, **kwargs)
        sizes.append(result[2].size)
        return result

    monkeypatch.setattr(pool_numba, "_pooled", recorded)
    with torch.no_grad():
        quiet = pool_numba.pool(gates, c, None, "fo")
    detached = pool_numba.pool(gates.detach(), c.detach(), None, "fo")
    for found in (quiet, detached):
        assert not found[0].requires_grad
        assert all(map(torch.equal, expected, found))
    pool_numba.pool(gates, c.detach(), None, "fo")
    assert sizes == [0, 0, -(-20 // pool_numba.SEGMENT) * 2 * 30]


def test_a_second_derivative_is_refused():
    gates, c, _ = inputs((3, 1, 2), torch.float32, "none", "fo")
    (grad,) = torch.autograd.grad(pool_numba.pool(gates, c, None, "fo")[0].sum(), gates, create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        torch.autograd.grad(grad.sum(), gates)


def test_a_fork_after_first_use():
    """In a process of its own: threads do not live on in a fork, and locks do."""
    code = """
import os, sys, torch
from recurlm.kernels import pool_numba
torch.get_num_threads = lambda: 2
gates = torch.randn(70, 4, 3 * 700, generator=torch.Generator().manual_seed(0)).requires_grad_()
def run():
    h, _ = pool_numba.pool(gates, torch.zeros(4, 700), None, "fo")
    return h.detach(), torch.autograd.grad(h.sum(), gates)[0]
first = run()
assert len(pool_numba._workers()._threads) == 1
for child in range(3):
    pid = os.fork()
    if pid == 0:
        same = all(map(torch.equal, first, run())) and len(pool_numba._workers()._threads) == 1
        (sys.exit if child else os._exit)(0 if same else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
print("ok", all(map(torch.equal, first, run())))
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "ok True", done.stderr


def test_without_a_folder_for_compiled_code_it_is_compiled_each_time(monkeypatch):
    njit = pool_numba.numba.njit

    def nowhere(cache=False, **options):
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return njit(**options)

    monkeypatch.setattr(pool_numba.numba, "njit", nowhere)
    out = np.empty(3, np.float32)
    pool_numba._compiled(pool_numba._copy.py_func)(np.arange(3, dtype=np.float32), out)
    assert out.tolist() == [0, 1, 2]


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64", "arm64", "aarch64"), reason="no vectors known here")
@pytest.mark.parametrize(
    "name",
    ["_sigmoids", "_tanhs", "_advance", "_advance_ifo", "_output", "_step", "_step_ifo", "_add", "_output_backward",
     "_carry", "_zf_backward", "_carry_ifo", "_zi_backward", "_f_backward"],
)  # fmt: skip
def test_loops_compute_in_vectors_of_fp32(name):
    """LLVM gives up silently: where arrays might overlap in too many ways, and in double precision half of it is lost."""
    function = getattr(pool_numba, name).py_func
    fresh = numba.njit(**pool_numba.OPTIONS)(function)
    fresh.compile((numba.float32[::1],) * function.__code__.co_argcount)
    (code,) = fresh.inspect_llvm().values()
    assert re.search(r"= f(add|sub|mul|div) [a-z ]*<\d+ x float>", code)
    assert "x double>" not in code
