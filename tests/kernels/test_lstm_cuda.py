"""The LSTM with resident weights: its kernels run by fibres on the CPU, and compiled on a GPU."""

import ctypes
import functools
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from recurlm import kernels
from recurlm.bench import lstm as bench
from recurlm.kernels import lstm_cuda, nvrtc, reference
from recurlm.kernels.lstm_cuda import Card, Layout

CUDA = torch.cuda.is_available()
H200, SMALL, SMALL_HOPPER = (
    Card(132, 232448, (9, 0), ((2, 66), (3, 39), (4, 30), (8, 15), (9, 9), (16, 7))),
    Card(8, 60000, (8, 0)),
    Card(36, 232448, (9, 0), ((2, 14), (3, 8), (4, 2), (8, 2))),
)
TYPES = (torch.bfloat16, torch.float16)

# ---- layouts ------------------------------------------------------------------------------------------------


def assert_batch_is_covered(of, batch):
    """No group is without a row: its blocks would wait for nothing and run ahead."""
    groups = of["PARTS"] * of.get("TEAMS", 1) * of["GROUPS"]
    assert groups * of["GROUP_BATCH"] >= batch > (groups - 1) * of["GROUP_BATCH"]


@pytest.mark.parametrize("card", [H200, Card(108, 166912, (8, 0)), SMALL])
@pytest.mark.parametrize("H, batch", [(16, 1), (400, 20), (1152, 20), (1152, 80), (1856, 128), (2048, 20), (2048, 128)])
def test_every_layout_covers_the_layer_within_the_cards_limits(card, H, batch):
    for name, layouts in lstm_cuda.LAYOUTS.items():
        found = layouts(H, batch, card)
        assert found or card is not H200, name
        for layout in found:
            of = dict(layout.macros)
            assert layout.name == name and layout.blocks <= card.processors and layout.shared <= card.shared
            assert_batch_is_covered(of, batch)
            assert of["TILES_N"] * 8 >= of["GROUP_BATCH"] and 0 <= of["REGISTERS_K"] <= of["BLOCKS_K"]
            if name == "forward":
                assert layout.blocks // of["PARTS"] * of["UNITS"] >= H and of["UNITS"] % 4 == 0
                assert layout.warps * of["BLOCKS_K"] * 32 >= H
            else:
                strips, rows = -(-H // of["COLUMNS"]), -(-H // of["ROW_UNITS"])
                assert (
                    layout.blocks == of["PARTS"] * strips * rows
                    and of["COLUMNS"] % 16 == 0
                    and of["ROW_UNITS"] % 16 == 0
                )
                assert layout.warps * of["BLOCKS_K"] * 8 >= of["ROW_UNITS"]


@pytest.mark.parametrize("H, batch", [(400, 20), (1152, 20), (1152, 80), (1024, 32)])
def test_every_layout_with_clusters_covers_the_layer_within_the_cards_limits(H, batch):
    for name in lstm_cuda.LAYOUTS:
        found = lstm_cuda.cluster_layouts(name, H, batch, H200)
        assert found
        for layout in found:
            of = dict(layout.macros)
            assert (
                layout.blocks <= layout.cluster * dict(H200.clusters)[layout.cluster] and layout.shared <= H200.shared
            )
            assert_batch_is_covered(of, batch)
            assert of["WARPS"] == of["WARPS_M"] + of["TEAMS"] * of["TEAM_WARPS"] and of["WARPS_M"] % 4 == 0
            of_both = of["WARPS_M"] * of["MULTIPLY_REGISTERS"] + of["TEAMS"] * of["TEAM_WARPS"] * of["TEAM_REGISTERS"]
            assert of_both <= 65536 // (32 * of["WARPS"]) // 8 * 8 * of["WARPS"]
            assert 0 <= of["REGISTERS_K"] <= of["BLOCKS_K"]
            strips, rows, k = (
                layout.blocks // layout.cluster // of["PARTS"],
                of["WARPS_M"] * of["WARP_TILES"],
                of["BLOCKS_K"],
            )
            if name == "forward":
                assert of["UNITS"] == 4 * rows and strips * of["UNITS"] >= H and layout.cluster * k * 32 >= H
            else:
                assert of["COLUMNS"] == 16 * rows and strips * of["COLUMNS"] >= H
                assert of["ROW_UNITS"] == 8 * k and layout.cluster * of["ROW_UNITS"] >= H


@pytest.mark.parametrize("T", (*range(1, 40), 70, 75, 200))
def test_products_beside_a_kernel_begin_at_steps_that_there_are(T):
    for (name, H, batch), shares in lstm_cuda.BESIDE.items():
        layout = lstm_cuda.measured(name, H, batch, H200, lstm_cuda.FASTEST[name, H, batch])
        assert layout and layout.beside == shares
        stops = lstm_cuda._stops(layout, T)
        assert stops == sorted(set(stops)) and all(0 < stop < T for stop in stops)
        assert name == "forward" or (layout.cluster > 1 and len(shares) <= lstm_cuda.STOPS)
        assert bool(stops) == (T >= lstm_cuda.LEAST_STEPS)


def test_a_layer_too_large_for_the_card_has_no_layout():
    assert not lstm_cuda.forward_layouts(4096, 20, H200) and not lstm_cuda.backward_layouts(1152, 20, SMALL)


# ---- on the CPU ---------------------------------------------------------------------------------------------

PARAMETERS = {
    "forward": "const T16* weights, const T16* b_ih, const T16* b_hh, T16* gates, const T16* h0, const void* c0, T16* x, "
    "T16* y, float* c, T16* h_last, void* c_last, int is_short, int T, int* trouble, "
    "unsigned long long limit",
    "backward": "const T16* weights, const T16* gates, const float* c, const T16* d_h, const T16* d_hT, "
    "const float* d_cT, T16* x, T16* d_gates, float* d_h0, float* d_c0, float* ring, int T, int* trouble, "
    "unsigned long long limit",
    "bias_gradient": "const T16* d_gates, T16* d_bias, int rows",
}
CLUSTERED = PARAMETERS | {
    "backward": PARAMETERS["backward"].replace("float* ring", "unsigned* written, int first, int second"),
    "wait_for_steps": "const unsigned* written, int teams, T16* d_gates, int* trouble, unsigned long long limit",
}


def on_cpu(layout: Layout, half: bool, folder: Path):
    """The layout's kernel as a function of its arguments and of a seed, run by fibres in an order drawn from that; or by name
    the other one of its source."""
    folder.mkdir(parents=True)
    code = f'#include "{Path(__file__).with_name("cuda_on_cpu.hpp")}"\n{lstm_cuda.source(layout)}'
    known = CLUSTERED if layout.cluster > 1 else PARAMETERS
    for name in ("forward",) if layout.name == "forward" else set(known) - {"forward"}:
        signature = known[name].replace("const ", "")
        parameters = [p.strip() for p in signature.split(",")]
        names = [p.split()[-1] for p in parameters]
        code += f"namespace of_{name} {{\n" + "".join(f"static {p}_;\n" for p in parameters)
        code += f"static void go() {{ {name}({', '.join(n + '_' for n in names)}); }}\n}}\n"
        assign = "".join(f"of_{name}::{n}_ = {n}; " for n in names)
        code += (
            f'extern "C" int run_{name}(int blocks, int warps, int bytes, unsigned seed, int lagging, {signature}) '
            f"{{ {assign}return launch(of_{name}::go, blocks, warps, bytes, seed, lagging); }}\n"
        )
    (folder / "kernel.cpp").write_text(code)
    macros = [f"-D{name}={value}" for name, value in (*layout.macros, ("HALF", int(half)))]
    command = ["g++", "-O1", "-std=c++20", "-w", "-shared", "-fPIC", "-o", "kernel.so", "kernel.cpp", *macros]
    subprocess.run(command, cwd=folder, check=True)
    made = ctypes.CDLL(str(folder / "kernel.so"))

    def call(arguments, seed: int, name: str = layout.name, lagging: int = -1) -> bool:
        values = [ctypes.c_void_p(a.data_ptr()) if isinstance(a, Tensor) else ctypes.c_longlong(a) for a in arguments]
        blocks, warps, shared = layout.blocks, layout.warps, layout.shared
        if name == "bias_gradient":
            blocks, shared = layout.get("H") // 8, layout.warps * 1024
        if name == "wait_for_steps":
            blocks, warps, shared = 1, 1, 0
        return bool(getattr(made, f"run_{name}")(blocks, warps, shared, ctypes.c_uint(seed), lagging, *values))

    return call


def truth(x_TBG, weight_GH, h_BH, c_BH):
    """(h_TBH, c_TBH) from the gates' sums without h's part."""
    hs, cs = [], []
    for x_BG in x_TBG:
        i, f, g, o = (x_BG + h_BH @ weight_GH.T).chunk(4, -1)
        c_BH = f.sigmoid() * c_BH + i.sigmoid() * g.tanh()
        h_BH = o.sigmoid() * c_BH.tanh()
        hs.append(h_BH)
        cs.append(c_BH)
    return torch.stack(hs), torch.stack(cs)


def picked(name: str, H: int, B: int, cluster: int, choice: int | dict[str, int]) -> Layout:
    """The layout of this number; or with clusters the first with these macros, its weights in registers or not as they say."""
    if isinstance(choice, int):
        return lstm_cuda.LAYOUTS[name](H, B, SMALL)[choice]
    wanted = {"CLUSTER": cluster, **choice} if cluster > 1 else dict(choice)
    kept = wanted.pop("REGISTERS_K", None)
    layout = lstm_cuda.measured(name, H, B, SMALL_HOPPER if cluster > 1 else SMALL, wanted)
    assert layout
    if kept is None:
        return layout
    of = dict(layout.macros)
    moved = of["WARPS_M"] * (of["REGISTERS_K"] - kept) * 2 * of["WARP_TILES"] * 512
    return layout._replace(macros=tuple((of | {"REGISTERS_K": kept}).items()), shared=layout.shared + moved)


CASES = (  # units, batch, steps, what is picked of the forward and of the backward layouts, fp16, blocks of a cluster
    (48, 5, 6, 0, 0, False, 1),
    (80, 11, 3, 5, 3, False, 1),
    (32, 3, 11, 2, 1, True, 1),
    (16, 1, 1, 0, 0, False, 1),
    (64, 17, 2, -1, -1, True, 1),
    (48, 5, 4, {"PACE": 600}, {"PACE": 900}, False, 1),
    (48, 33, 5, {"PARTS": 2}, {"PARTS": 2, "GROUPS": 2}, False, 1),
    (32, 50, 3, {"PARTS": 3, "GROUPS": 2}, {"PARTS": 3}, True, 1),
    (48, 5, 9, {"PACE": 600}, {"PACE": 600}, False, 2),
    (80, 1, 1, {}, {}, False, 3),
    (240, 3, 3, {}, {}, True, 8),
    (96, 39, 5, {"TEAMS": 1, "PARTS": 2}, {"TEAMS": 1, "PARTS": 2}, False, 2),
    (96, 75, 3, {"TILES_N": 10, "REGISTERS_K": 1}, {"TILES_N": 10, "REGISTERS_K": 0}, True, 3),
    (96, 62, 3, {"TILES_N": 8}, {"TILES_N": 8, "REGISTERS_K": 1}, False, 3),
    (96, 37, 6, {"TEAMS": 2, "WARPS_M": 4}, {"TEAMS": 2, "WARPS_M": 4}, False, 2),
    (112, 70, 5, {"TEAMS": 2, "PARTS": 2}, {"TEAMS": 2, "PARTS": 2, "REGISTERS_K": 2}, False, 2),
    (96, 50, 3, {"TEAMS": 2, "WARPS_M": 8}, {"TEAMS": 2, "WARPS_M": 8}, True, 3),
    (48, 49, 1, {"TEAMS": 2}, {"TEAMS": 2}, False, 2),
    (
        112,
        69,
        10,
        {"TEAMS": 2, "WARP_TILES": 2, "REGISTERS_K": 0},
        {"TEAMS": 2, "WARPS_M": 4, "REGISTERS_K": 1},
        True,
        4,
    ),
)


@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
@pytest.mark.skipif(CUDA, reason="a GPU is here: the compiled kernel is tested instead")
@pytest.mark.parametrize("H, B, T, fore, back, half, cluster", CASES)
def test_kernels_on_the_cpu_equal_the_formula(H, B, T, fore, back, half, cluster, tmp_path):
    dtype, unit = (torch.float16, 2**-11) if half else (torch.bfloat16, 2**-8)
    draw = torch.Generator().manual_seed(H + B)

    def values(*shape: int, of=dtype) -> Tensor:
        return torch.randn(*shape, generator=draw).to(of)

    weight_GH, x_TBG = (values(4 * H, H, of=torch.float32) * H**-0.5).to(dtype), values(T, B, 4 * H)
    h_BH, c_BH = values(B, H) / 2, values(B, H, of=torch.float32)
    b_ih, b_hh = values(4 * H), values(4 * H)
    leaves = [t.double().requires_grad_() for t in (x_TBG, weight_GH, h_BH, c_BH)]
    h_TBH, c_TBH = truth(leaves[0] + b_ih.double() + b_hh.double(), *leaves[1:])
    trouble, limit = torch.zeros(1, dtype=torch.int32), 10**9

    layout = picked("forward", H, B, cluster, fore)
    gates, y = x_TBG.clone(), torch.empty(T + 1, B, H, dtype=dtype)
    cpu = torch.device("cpu")
    c, h_last, c_last = torch.full((T + 1, B, H), float("nan")), torch.empty_like(h_BH), torch.empty_like(c_BH)

    run_forward = on_cpu(layout, half, tmp_path / "forward")

    def forward(seed: int, gates: Tensor, y: Tensor) -> None:
        x = lstm_cuda.exchange_of(layout, B, cpu)[0]
        given = weight_GH, b_ih, b_hh, gates, h_BH, c_BH, x, y, c, h_last, c_last
        assert run_forward((*given, 0, T, trouble, limit), seed) and not trouble

    forward(1, gates, y)
    assert (
        torch.equal(y[0], h_BH)
        and torch.equal(c[0], c_BH)
        and torch.equal(h_last, y[-1])
        and torch.equal(c_last, c[-1])
    )
    torch.testing.assert_close(y[1:].double(), h_TBH.detach(), rtol=0, atol=T**0.5 * unit)
    torch.testing.assert_close(c[1:].double(), c_TBH.detach(), rtol=0, atol=T**0.5 * unit)
    again = torch.empty(T + 1, B, H, dtype=dtype)
    forward(2, x_TBG.clone(), again)
    assert torch.equal(again.view(torch.int16), y.view(torch.int16)), "the order of threads changes the result"

    d_h, d_hT, d_cT = values(T, B, H), values(B, H), values(B, H, of=torch.float32)
    objective = (h_TBH * d_h.double()).sum() + (h_TBH[-1] * d_hT.double()).sum() + (c_TBH[-1] * d_cT.double()).sum()
    expected = torch.autograd.grad(objective, (leaves[0], *leaves[2:]))
    layout = picked("backward", H, B, cluster, back)
    d_gates, (x, ring) = torch.empty(T, B, 4 * H, dtype=dtype), lstm_cuda.exchange_of(layout, B, cpu)
    d_h0, d_c0 = torch.full((B, H), float("nan")), torch.full((B, H), float("nan"))
    run = on_cpu(layout, half, tmp_path / "backward")
    arguments = weight_GH, gates, c, d_h, d_hT, d_cT, x, d_gates, d_h0, d_c0, ring
    if cluster > 1:
        arguments = *arguments, 1, T
    assert run((*arguments, T, trouble, limit), 3) and not trouble
    if cluster > 1:  # all have said that the first step and that all steps are written
        assert (ring.view(torch.int32) + 1 == layout.blocks * layout.get("TEAMS")).all()
        for i in range(2):
            waits = ring[2 * i :], layout.blocks * layout.get("TEAMS"), d_gates, trouble, limit
            assert run(waits, 4, "wait_for_steps") and not trouble
    d_bias = torch.empty(4 * H, dtype=dtype)
    assert run((d_gates, d_bias, T * B), 4, "bias_gradient")
    exact_bias = d_gates.double().sum((0, 1))
    torch.testing.assert_close(d_bias.double(), exact_bias, rtol=unit, atol=1e-5 * exact_bias.abs().max().item())
    for found, exact in zip((d_gates, d_h0, d_c0), expected, strict=True):
        scale = exact.abs().max().item()
        torch.testing.assert_close(found.double(), exact, rtol=0, atol=2 * T**0.5 * unit * scale)


@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
@pytest.mark.skipif(CUDA, reason="a GPU is here")
def test_a_warp_that_has_places_behind_the_layer_alone_may_lag(tmp_path):
    """Others do not wait for it: it must not wait for sums, which would be overwritten before it comes."""
    H, B, T, strips = 304, 1, 5, 3
    card = Card(9, 232448, (9, 0), ((3, strips),))
    layout = lstm_cuda.measured("forward", H, B, card, {"CLUSTER": 3, "UNITS": 128, "WARPS_M": 8, "TEAM_WARPS": 4})
    assert layout
    draw = torch.Generator().manual_seed(1)
    weights = (torch.randn(4 * H, H, generator=draw) * H**-0.5).bfloat16()
    gates, zeros = torch.randn(T, B, 4 * H, generator=draw).bfloat16(), torch.zeros(4 * H, dtype=torch.bfloat16)
    h, c0, trouble = torch.zeros(B, H, dtype=torch.bfloat16), torch.zeros(B, H), torch.zeros(1, dtype=torch.int32)
    run, found = on_cpu(layout, False, tmp_path / "forward"), []
    last_strip = (strips - 1) * layout.cluster * layout.warps
    for lagging in (-1, last_strip + layout.get("WARPS_M") + 1):
        x, y = lstm_cuda.exchange_of(layout, B, torch.device("cpu"))[0], torch.zeros(T + 1, B, H).bfloat16()
        c, h_last, c_last = torch.zeros(T + 1, B, H), torch.empty_like(h), torch.empty_like(c0)
        given = weights, zeros, zeros, gates.clone(), h, c0, x, y, c, h_last, c_last, 0, T, trouble, 10_000
        assert run(given, 1, lagging=lagging) and not trouble
        found.append(y)
    assert torch.equal(*found)


@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
@pytest.mark.skipif(CUDA, reason="a GPU is here")
def test_a_block_that_waits_in_vain_gives_up_and_says_it(tmp_path):
    H, B, T = 48, 2, 4
    layout = lstm_cuda.forward_layouts(H, B, SMALL)[0]
    lonely = layout._replace(blocks=layout.blocks - 1)  # as if one block could not be resident
    x, y = lstm_cuda.exchange_of(layout, B, torch.device("cpu"))[0], torch.zeros(T + 1, B, H, dtype=torch.bfloat16)
    last = torch.zeros(B, H, dtype=torch.bfloat16), torch.zeros(B, H)
    c, trouble = torch.zeros(T + 1, B, H), torch.zeros(1, dtype=torch.int32)
    zeros, bias = torch.zeros(4 * H, H, dtype=torch.bfloat16), torch.zeros(4 * H, dtype=torch.bfloat16)
    gates, h = torch.zeros(T, B, 4 * H, dtype=torch.bfloat16), torch.zeros(B, H, dtype=torch.bfloat16)
    run = on_cpu(lonely, False, tmp_path / "forward")
    assert run((zeros, bias, bias, gates, h, torch.zeros(B, H), x, y, c, *last, 0, T, trouble, 2000), 1)
    assert trouble.item() == 1 and y[-1, :, : layout.get("UNITS")].isnan().all()


@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
@pytest.mark.skipif(CUDA, reason="a GPU is here")
@pytest.mark.parametrize("H, T, cluster", [(48, 4, 1), (46, 4, 2), (46, lstm_cuda.LEAST_STEPS, 2)])
def test_a_layer_and_its_gradients_on_the_cpu_equal_the_reference(H, T, cluster, tmp_path, monkeypatch):
    B, E, dtype, ran = 5, 12, torch.bfloat16, []

    @functools.cache
    def run(layout: Layout, half: bool):
        return on_cpu(layout._replace(beside=()), half, tmp_path / layout.name)

    def named(name: str | None = None):
        def kernel(layout: Layout, half: bool, index: int | None):
            def launch(blocks: int, threads: int, arguments, running=None) -> None:
                ran.append(name or layout.name)
                assert run(layout, half)(arguments, 1, name or layout.name)

            return launch

        return kernel

    class OneStream:  # products run where they are asked for: behind the kernel
        main = side = None

        def __init__(self, index, wanted: bool):
            self.running = self if wanted else None

        def wait(self) -> None: ...

        fork = join = wait

        def __enter__(self):
            return self

        def __exit__(self, *error): ...

    for name in ("bias_gradient", "wait_for_steps"):
        monkeypatch.setattr(lstm_cuda, "_" + name, named(name))
    monkeypatch.setattr(lstm_cuda, "_kernel", named())
    monkeypatch.setattr(lstm_cuda, "_Beside", OneStream)
    monkeypatch.setattr(lstm_cuda, "_trouble", lambda index: torch.zeros(1, dtype=torch.int32))
    choice = {} if cluster > 1 else 0
    fore, back = picked("forward", 48, B, cluster, choice), picked("backward", 48, B, cluster, choice)
    if cluster > 1:
        fore, back = fore._replace(beside=(0.4,)), back._replace(beside=(0.25, 0.6))
    given = random_case(T, B, E, H, dtype, 1, "cpu")
    found = outcome(lambda x, h, c, w: lstm_cuda.lstm(x, h, c, w, (fore, back)), given, dtype)
    for ours, exact in zip(found, outcome(reference.lstm, given, torch.float64), strict=True):
        assert (ours.double() - exact).norm() <= 0.02 * exact.norm()
    in_parts = T >= lstm_cuda.LEAST_STEPS
    assert ran.count("forward") == 1 + in_parts and ran.count("wait_for_steps") == 2 * in_parts
    x, h, c, *weights = (t.requires_grad_() for t in given[:7])
    y = lstm_cuda.lstm(x, h, c, weights, (fore, back))[0]  # the last state unused
    everything = torch.autograd.grad(y.sum(), (x, h, c, *weights))
    for some in ((x,), (weights[0], x), (weights[1], weights[3])):  # gradients of some inputs alone
        for t in (x, h, c, *weights):
            t.requires_grad_(any(t is one for one in some))
        alone = torch.autograd.grad(lstm_cuda.lstm(x, h, c, weights, (fore, back))[0].sum(), some)
        for t, gradient in zip(some, alone, strict=True):
            expected = next(g for one, g in zip((x, h, c, *weights), everything, strict=True) if one is t)
            assert torch.equal(gradient, expected)


@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
@pytest.mark.skipif(CUDA, reason="a GPU is here")
def test_who_waits_for_steps_in_vain_gives_up_and_says_it(tmp_path):
    run = on_cpu(picked("backward", 48, 5, 2, {}), False, tmp_path / "backward")
    written, trouble = torch.full((1,), -1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    d_gates = torch.zeros(8, dtype=torch.bfloat16)
    assert run((written, 3, d_gates, trouble, 1000), 1, "wait_for_steps")
    assert trouble.item() == 1 and d_gates[:2].isnan().all()


# ---- compiling ----------------------------------------------------------------------------------------------


def test_without_cuda_bindings_lstm_falls_back_and_says_why(monkeypatch):
    monkeypatch.setattr(nvrtc, "missing", lambda: "cuda-bindings is not installed")
    with pytest.warns(RuntimeWarning, match=r"cuda-bindings is not installed: LSTM layers run by cuDNN"):
        assert kernels.TABLE["lstm", "cuda", torch.bfloat16]() is reference.lstm


# ---- on a GPU -----------------------------------------------------------------------------------------------

gpu = pytest.mark.skipif(not CUDA, reason="no GPU here")
# Of cuDNN, which would have all weights in one piece of memory; torch's own filter is reset by pytest.
cudnn = pytest.mark.filterwarnings("ignore:RNN module weights")


def outcome(function, given, dtype) -> list[Tensor]:
    """Outputs and all gradients."""
    leaves = [t.to(dtype).requires_grad_() for t in given[:7]]
    results = function(*leaves[:3], leaves[3:])
    upstream = [u.to(r.dtype) for u, r in zip(given[7:], results, strict=True)]
    return [*results, *torch.autograd.grad(results, leaves, upstream)]


def random_case(T, B, E, H, dtype, seed, device="cuda"):
    draw = torch.Generator(device).manual_seed(seed)

    def values(*shape: int) -> Tensor:
        return 2 * torch.rand(*shape, device=device, generator=draw) - 1

    weights = [values(*shape) * H**-0.5 for shape in ((4 * H, E), (4 * H, H), (4 * H,), (4 * H,))]
    given = values(T, B, E), values(B, H), values(B, H), *weights, values(T, B, H), values(B, H), values(B, H)
    return [t.to(dtype) for t in given]


@gpu
@cudnn
@pytest.mark.parametrize("ten", range(10))
def test_outputs_and_gradients_are_as_near_to_the_truth_as_cudnns(ten):
    for number in range(10 * ten, 10 * ten + 10):
        check_against_cudnn(number)
    assert not lstm_cuda.waited_too_long(torch.device("cuda"))


def check_against_cudnn(number: int) -> None:
    draw = torch.Generator().manual_seed(number)

    def pick(*of: int) -> int:
        return of[int(torch.randint(len(of), (), generator=draw))]

    T, B, E = pick(1, 2, 5, 13, 31), pick(1, 2, 7, 20, 33, 64, 80), pick(1, 17, 64, 300)
    H, dtype = pick(1, 2, 16, 50, 126, 400, 650, 1024, 1150, 1152), TYPES[number % 2]
    given = random_case(T, B, E, H, dtype, number)
    exact = outcome(reference.lstm, given, torch.float64)
    theirs, ours, again = (outcome(f, given, dtype) for f in (reference.lstm, kernels.lstm, kernels.lstm))
    assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))
    for a, b, true in zip(ours, theirs, exact, strict=True):
        error, allowed = ((t.double() - true).norm() / true.norm().clamp(min=1e-12) for t in (a, b))
        floor = torch.finfo(
            dtype
        ).eps  # what rounding costs, of the result and of what it is made of: some have one element
        assert error <= 2 * max(allowed.item(), floor), (T, B, E, H, dtype)


@gpu
@pytest.mark.parametrize("T, B, H", [(35, 80, 1152), (17, 64, 1150)])
def test_products_beside_the_kernels_change_roundings_alone(T, B, H):
    found = lstm_cuda.best(H, B, torch.cuda.current_device())
    assert found
    alone = found[0]._replace(beside=()), found[1]._replace(beside=())
    given = random_case(T, B, 320, H, torch.bfloat16, T)
    given[0] = given[0].transpose(0, 1).contiguous().transpose(0, 1)  # the batch first in memory

    def by(layouts):
        return lambda x, h, c, weights: lstm_cuda.lstm(x, h, c, weights, layouts)

    ours, again, plain = (outcome(by(layouts), given, torch.bfloat16) for layouts in (found, found, alone))
    assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))
    for a, b in zip(ours, plain, strict=True):
        assert (a.double() - b.double()).norm() <= 0.01 * b.double().norm()
    call = bench.layer(by(found), T, B, 320, H, torch.bfloat16, True)
    eager, graph = call(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    for _ in range(3):
        graph.replay()
    for a, b in zip(captured, eager, strict=True):
        assert (a.double() - b.double()).norm() <= 0.01 * b.double().norm()
    assert not lstm_cuda.waited_too_long(torch.device("cuda"))


@gpu
def test_too_many_blocks_are_refused_before_they_could_hang():
    layout = lstm_cuda.forward_layouts(64, 2, SMALL)[0]
    kernel = lstm_cuda._kernel(layout, False, torch.cuda.current_device())
    with pytest.raises(RuntimeError, match="cannot be launched"):
        kernel(kernel.resident_blocks(32 * layout.warps) + 1, 32 * layout.warps, [0] * 9)


@gpu
def test_ten_thousand_launches_end():
    given = random_case(3, 4, 16, 64, torch.bfloat16, 1)
    first = kernels.lstm(*given[:3], given[3:7])[0]
    for _ in range(10_000):
        last = kernels.lstm(*given[:3], given[3:7])[0]
    assert torch.equal(first, last) and not lstm_cuda.waited_too_long(torch.device("cuda"))


@gpu
@cudnn
def test_a_layer_that_does_not_fit_runs_by_cudnn_and_says_why():
    given = random_case(4, 2, 8, 6000, torch.bfloat16, 1)
    with pytest.warns(RuntimeWarning, match="6000 units with batches of 2 do not fit"):
        y = kernels.lstm(*given[:3], given[3:7])[0]
    assert torch.equal(y, reference.lstm(*given[:3], given[3:7])[0])
