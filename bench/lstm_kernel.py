"""Every way to lay out the LSTM kernels, checked against float64 and timed; then layers with the fastest ones beside cuDNN.

    python bench/lstm_kernel.py [--seconds 150] [--each 1 | --paces] [--shapes 1152,20,bf16 ...]
    python bench/lstm_kernel.py --layers [--shapes 1152,20,bf16 ...] | --beside [--shapes ...] | --steps | --together

All kernels are compiled first, in parallel. Each shape has a process of its own, which goes on behind a layout that broke the
GPU's context; a layout that waits in vain for a fifth of a second is reported and counts for nothing. What is printed:
microseconds of the kernel alone at T 70 (the fill of its outputs taken off), the largest relative error of its results, whether
two runs gave the same bits, and the layout. A table of layers comes last. --paces tries several paces on
a few layouts instead; --layers and --steps time layers and training steps, also with what the last call found fastest, --beside
layers with products that begin beside the kernels at several steps, --together two kernels side by side.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recurlm.bench import lstm as bench
from recurlm.bench import step
from recurlm.bench.timing import gpu_time, in_turn
from recurlm.kernels import lstm_cuda, nvrtc, reference
from recurlm.kernels.lstm_cuda import Card, Layout

T = 70
SHAPES = ("1152,20,bf16", "1152,80,bf16", "400,20,bf16")
PATIENCE = 200_000_000
KEPT = Path(tempfile.gettempdir()) / "lstm-kernel"  # the fastest layouts of each shape, for the layers' table


PACES = None, 0, 700, 900, 1200, 1500, 2000, 2500


def candidates(name: str, H: int, B: int, card: Card, each: int) -> list[Layout]:
    """The `each` estimated best of each kind, as far as they are promising; if it is 0, three with clusters and three without,
    and the one in use, with every pace."""
    if not each:
        known = lstm_cuda.FASTEST.get((name, H, B), {})
        found = [lstm_cuda.measured(name, H, B, card, {k: v for k, v in known.items() if k != "PACE"})]
        found += lstm_cuda.LAYOUTS[name](H, B, card)[:3] + lstm_cuda.cluster_layouts(name, H, B, card)[:3]
        layouts = dict.fromkeys(layout for layout in found if layout)
        return [
            layout._replace(macros=layout.macros + (() if pace is None else (("PACE", pace),)))
            for layout in layouts
            for pace in PACES
        ]
    counts: Counter[tuple[int, ...]] = Counter()
    made = lstm_cuda.LAYOUTS[name](H, B, card) + lstm_cuda.cluster_layouts(name, H, B, card)
    best, found = min(layout.cost for layout in made), []
    for layout in made:
        of = dict(layout.macros)
        kind = of["PARTS"], of.get("TEAMS", 1), layout.cluster, of["TILES_N"], layout.warps // 4
        counts[kind] += 1
        if counts[kind] <= each and layout.cost < 1.5 * best:
            found.append(layout)
    return found


def compiled(layout: Layout, half: bool, capability: tuple[int, int]) -> str:
    try:
        nvrtc.compiled(lstm_cuda.source(layout), {**dict(layout.macros), "HALF": int(half)}, capability)
    except RuntimeError as error:
        return str(error)
    return ""


class Case:
    """One shape's values, what float64 makes of them, and calls of the kernels."""

    def __init__(self, H: int, B: int, dtype: torch.dtype):
        draw = torch.Generator("cuda").manual_seed(H + B)

        def values(*shape: int) -> Tensor:
            return torch.randn(*shape, device="cuda", generator=draw)

        self.H, self.B, self.dtype = H, B, dtype
        self.weight = (values(4 * H, H) * H**-0.5).to(dtype)
        self.gates, self.h0, self.c0 = values(T, B, 4 * H).to(dtype), values(B, H).to(dtype), values(B, H)
        self.d_h, self.d_hT, self.d_cT = values(T, B, H).to(dtype), values(B, H).to(dtype), values(B, H)
        self.trouble = torch.zeros(1, dtype=torch.int32, device="cuda")
        self.y, self.c = values(T + 1, B, H).to(dtype), torch.empty(T + 1, B, H, device="cuda")
        self.d_gates = torch.empty_like(self.gates)
        self.last = torch.empty_like(self.h0), torch.empty_like(self.c0)
        self.b_ih, self.b_hh = values(4 * H).to(dtype) / 2, values(4 * H).to(dtype) / 2
        self.d_h0, self.d_c0 = torch.empty_like(self.c0), torch.empty_like(self.c0)
        leaves = [t.double().requires_grad_() for t in (self.gates, self.h0, self.c0)]
        weight, (x, h, c), hs, cs = self.weight.double(), leaves, [], []
        activated = []
        for x_BG in x:
            i, f, g, o = (x_BG + h @ weight.T + self.b_ih.double() + self.b_hh.double()).chunk(4, -1)
            i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
            activated.append(torch.cat((i, f, g, o), -1))
            c = f * c + i * g
            h = o * c.tanh()
            hs.append(h)
            cs.append(c)
        exact = torch.stack(hs), torch.stack(cs)
        objective = (
            (exact[0] * self.d_h.double()).sum() + (h * self.d_hT.double()).sum() + (c * self.d_cT.double()).sum()
        )
        self.truth = {
            "forward": [t.detach() for t in exact],
            "backward": [t.detach() for t in torch.autograd.grad(objective, leaves)],
        }
        self.activated, self.c_given = (
            torch.stack(activated).detach().to(dtype),
            torch.cat((self.c0[None], exact[1].detach().float())),
        )
        self.worked = self.gates.clone()

    def fill(self, name: str, layout: Layout) -> tuple[Tensor, ...]:
        x, ring = lstm_cuda.exchange_of(layout, self.B, self.c0.device)
        return x, ring

    def run(self, name: str, layout: Layout, kernel: nvrtc.Kernel) -> None:
        x, scratch = self.fill(name, layout)
        last = T, self.trouble, PATIENCE
        if name == "forward":
            given = self.weight, self.b_ih, self.b_hh, self.worked, self.h0, self.c0, x, self.y, self.c
            arguments = *given, *self.last, 0, *last
        else:
            given = self.weight, self.activated, self.c_given, self.d_h, self.d_hT, self.d_cT
            stops = [0] * lstm_cuda.STOPS if layout.cluster > 1 else []  # nobody waits for a step
            arguments = *given, x, self.d_gates, self.d_h0, self.d_c0, scratch, *stops, *last
        kernel(layout.blocks, 32 * layout.warps, arguments)

    def checked(self, name: str, layout: Layout, kernel: nvrtc.Kernel) -> tuple[float, bool, bool]:
        """The largest relative error, whether two runs were equal, whether none waited in vain."""
        runs = []
        for _ in range(2):
            self.worked.copy_(self.gates)
            self.run(name, layout, kernel)
            results = (self.y[1:], self.c[1:]) if name == "forward" else (self.d_gates, self.d_h0, self.d_c0)
            runs.append([t.clone() for t in results])
        errors = [((a.double() - b).norm() / b.norm()).item() for a, b in zip(runs[0], self.truth[name], strict=False)]
        patient = not self.trouble.item()
        self.trouble.zero_()
        same = all(torch.equal(a.view(torch.int16), b.view(torch.int16)) for a, b in zip(*runs, strict=True))
        return max(errors, key=lambda e: (e != e, e)), same, patient


def worker(H: int, B: int, kind: str, each: int, start: int) -> None:
    """Prints a line for each layout from number `start` on; ends with code 9 behind one that broke the context."""
    dtype, half = bench.TYPES[kind], kind == "fp16"
    torch.set_float32_matmul_precision("highest")
    case, card = Case(H, B, dtype), lstm_cuda.card(torch.cuda.current_device())
    jobs = [(name, layout) for name in lstm_cuda.LAYOUTS for layout in candidates(name, H, B, card, each)]
    idle = {}
    for name in lstm_cuda.LAYOUTS:
        one = next(layout for n, layout in jobs if n == name)
        idle[name] = gpu_time(lambda name=name, one=one: case.fill(name, one), graph=False, repeats=5)
    for number, (name, layout) in enumerate(jobs[start:], start):
        line: dict[str, Any] = {"n": number, "name": name, "layout": dict(layout.macros), "blocks": layout.blocks}
        line |= {"shared": layout.shared, "estimated": round(layout.cost * T, 1)}
        try:
            kernel = lstm_cuda._kernel(layout, half, torch.cuda.current_device())
            line["resident"] = kernel.resident_blocks(32 * layout.warps)
            error, same, patient = case.checked(name, layout, kernel)
            line |= {"error": error, "same": same, "patient": patient}
            if patient and error < 0.02:
                spent = gpu_time(
                    lambda name=name, layout=layout, k=kernel: case.run(name, layout, k), graph=False, repeats=7
                )
                line["us"] = round(spent - idle[name], 1)
        except Exception as error:  # whatever it is, the others are measured
            line["failed"] = " ".join(str(error).split())[:200]
        print(json.dumps(line), flush=True)
        try:
            torch.cuda.synchronize()
        except Exception:
            os._exit(9)


def sweep(shape: str, each: int, until: float) -> None:
    """Runs workers for a shape, prints what they say as text, keeps the fastest layouts."""
    H, B, kind = shape.split(",")
    print(f"# T {T}, {H} units, batch {B}, {kind}", flush=True)
    start, lines = 0, []
    for _ in range(12):
        command = [sys.executable, __file__, "--worker", H, B, kind, str(each), str(start)]
        left = until - time.monotonic()
        if left < 5:
            print("# out of time", flush=True)
            break
        with tempfile.TemporaryFile("w+") as output:
            try:
                code = subprocess.run(command, stdout=output, timeout=min(left, 45), check=False).returncode
            except subprocess.TimeoutExpired:
                code = "its time over"
            output.seek(0)
            text = output.read()
        new = [json.loads(line) for line in text.splitlines() if line.startswith("{") and line.endswith("}")]
        lines += new
        for line in new:
            show(line)
        if code == 0:
            break
        start = (lines[-1]["n"] if new else start) + 1
        print(f"# the process ended with {code}; going on at layout {start}", flush=True)
    best = {}
    for name in lstm_cuda.LAYOUTS:
        timed = sorted(
            (line for line in lines if line["name"] == name and "us" in line and line["same"]), key=lambda x: x["us"]
        )
        for line in timed[:4]:
            print("best:", end=" ")
            show(line)
        if timed:
            best[name] = timed[0]
    KEPT.mkdir(parents=True, exist_ok=True)
    (KEPT / f"{shape}.json").write_text(json.dumps(best))


def show(line: dict[str, Any]) -> None:
    of = line["layout"]
    hidden = ("H", "BATCH", "WARPS")
    layout = " ".join(f"{key} {value}" for key, value in of.items() if key not in hidden)
    spent = (
        f"{line['us']:7.1f} us {line['us'] / T:5.2f} a step"
        if "us" in line
        else "      - " + line.get("failed", "wrong")
    )
    about = f"error {line['error']:.1e}" if "error" in line else ""
    marks = "" if line.get("same", True) else " DIFFERS"
    marks += "" if line.get("patient", True) else " WAITED IN VAIN"
    resident = f"{line['blocks']}/{line.get('resident', '?')} blocks {of['WARPS']} warps {line['shared'] >> 10} kB"
    print(f"{line['name']:8} {spent} {about}{marks} estimated {line['estimated']} | {resident} | {layout}", flush=True)


def part_of(card: Card, processors: int) -> Card:
    clusters = tuple((size, most * processors // card.processors) for size, most in card.clusters)
    return card._replace(processors=processors, clusters=clusters)


def together(seconds: float) -> None:
    """Whether two kernels, each on a part of the GPU, run at the same time: what layers overlapped in time would need."""
    H, B, until = 1152, 20, time.monotonic() + seconds
    card = lstm_cuda.card(torch.cuda.current_device())
    plan = {}
    for processors in (64, 48):
        for name, make in lstm_cuda.LAYOUTS.items():
            here = part_of(card, processors)
            plan[processors, name] = lstm_cuda.cluster_layouts(name, H, B, here)[:8] + make(H, B, here)[:2]
    jobs = [(layout, False, card.capability) for layouts in plan.values() for layout in layouts]
    with ProcessPoolExecutor(os.cpu_count(), mp_context=torch.multiprocessing.get_context("spawn")) as pool:
        list(pool.map(compiled, *zip(*jobs, strict=True)))
    cases, streams = [Case(H, B, torch.bfloat16) for _ in range(2)], [torch.cuda.Stream() for _ in range(2)]
    for (processors, name), layouts in plan.items():
        timed = []
        for layout in layouts:
            if time.monotonic() > until:
                print("# out of time", flush=True)
                return
            kernel = lstm_cuda._kernel(layout, False, torch.cuda.current_device())
            timed.append((gpu_time(lambda: cases[0].run(name, layout, kernel), graph=False, repeats=5), layout))  # noqa: B023
        spent, layout = min(timed, key=lambda pair: pair[0])
        kernel = lstm_cuda._kernel(layout, False, torch.cuda.current_device())

        def both(name=name, layout=layout, kernel=kernel) -> None:
            main = torch.cuda.current_stream()
            for case, stream in zip(cases, streams, strict=True):
                stream.wait_stream(main)
                with torch.cuda.stream(stream):
                    case.run(name, layout, kernel)
            for stream in streams:
                main.wait_stream(stream)

        for graph in (False, True):
            two = gpu_time(both, graph=graph, repeats=5)
            print(
                f"{name} on {processors} processors, {layout.blocks} blocks: one {spent / T:.2f} us a step, two at once "
                f"{two / T:.2f} ({'graph' if graph else 'eager'}) {dict(layout.macros)}",
                flush=True,
            )


def measured(shape: str) -> dict[str, Layout]:
    """The fastest layouts that a sweep found for a shape."""
    place, found = KEPT / f"{shape}.json", {}
    for name, line in json.loads(place.read_text()).items() if place.is_file() else ():
        of = line["layout"]
        found[name] = Layout(name, tuple(of.items()), line["blocks"], of["WARPS"], line["shared"], 0.0)
    return found


def with_beside(found: Layout | None, picked: Layout) -> Layout:
    """What was found, if anything was, with products beside it as the one in use has them."""
    return found._replace(beside=picked.beside) if found else picked


def use_measured() -> None:
    """Makes the fastest layouts that the last sweep found those in use."""
    picked = lstm_cuda.best

    def best(units: int, batch: int, index: int) -> tuple[Layout, Layout] | None:
        H = -(-units // lstm_cuda.MULTIPLE) * lstm_cuda.MULTIPLE
        pair, found = picked(units, batch, index), measured(f"{H},{batch},bf16")
        return pair and (with_beside(found.get("forward"), pair[0]), with_beside(found.get("backward"), pair[1]))

    lstm_cuda.best = best  # type: ignore[assignment]


def steps() -> None:
    """Training steps with the fastest layouts found, and with large batches left to cuDNN or not."""
    warnings.simplefilter("ignore")
    use_measured()
    with tempfile.TemporaryDirectory() as scratch:
        for recipe, words, types, limits in (
            ("awd-lstm-ptb", 300_000, 10_000, (128,)),
            ("awd-lstm-wt2", 900_000, 33_278, (128, 48)),
        ):
            folder = Path(scratch) / recipe
            folder.mkdir()
            store = step.text(folder, words, types)
            for most in limits:
                lstm_cuda._left_to_cudnn = lambda units, batch, index, most=most: batch > most
                spent, _ = step.microseconds(recipe, store, "train.dtype=bf16")
                print(
                    f"step {recipe} bf16, weights resident up to batches of {most}: {spent / 1000:.3f} ms", flush=True
                )


def by(pair: tuple[Layout, Layout] | None) -> bench.Layer:
    """The layer with these layouts; by cuDNN where there are none."""
    return (lambda x, h, c, weights: lstm_cuda.lstm(x, h, c, weights, pair)) if pair else reference.lstm


def in_use(H: int, B: int) -> tuple[Layout, Layout]:
    """The layouts in use; the script ends where there are none."""
    pair = lstm_cuda.best(H, B, torch.cuda.current_device())
    if not pair:
        raise SystemExit(f"A layer of {H} units does not fit on this GPU with batches of {B}.")
    return pair


def profile(shape: str, layouts: tuple[Layout, Layout]) -> None:
    """Where the time of a layer, forward and backward, goes."""
    H, B, kind = shape.split(",")
    call = bench.layer(by(layouts), T, int(B), int(H), int(H), bench.TYPES[kind], True)
    call()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
        for _ in range(5):
            call()
        torch.cuda.synchronize()
    for event in sorted(found.key_averages(), key=lambda event: -event.self_device_time_total)[:16]:
        print(f"  {event.self_device_time_total / 5:8.1f} us x {event.count / 5:.0f} {event.key[:90]}", flush=True)


FORWARD = (), (0.3,), (0.4,), (0.5,), (0.6,), (0.7,), (0.75,), (0.8,)
BACKWARD = (), (0.4,), (0.15, 0.5), (0.21, 0.55), (0.26, 0.6), (0.3, 0.62), (0.35, 0.67)


def beside(shapes: Sequence[str]) -> None:
    """Layers of which products begin beside the kernels in use at several shares of the steps."""
    for shape in shapes:
        H, B = map(int, shape.split(",")[:2])
        fore, back = in_use(H, B)
        tried = [((fore._replace(beside=shares), back), False) for shares in FORWARD]
        tried += [((fore, back._replace(beside=shares)), True) for shares in BACKWARD if back.cluster > 1]
        for pair, backward in tried:
            spent = timed(by(pair), H, B, bench.TYPES[shape.split(",")[2]], backward)
            shares = pair[backward].beside
            print(f"T {T} {shape} {'f+b' if backward else 'f'}, beside from {shares}: {spent:.1f} us", flush=True)


def timed(function: bench.Layer, H: int, B: int, dtype: torch.dtype, backward: bool) -> float:
    """Microseconds of a layer, caches cold."""
    works = in_turn(lambda: bench.layer(function, T, B, H, H, dtype, backward), 2 * (8 * H * H + 11 * T * B * H))
    return gpu_time(works, repeats=8)


def layers(shapes: Sequence[str]) -> None:
    """Layers with the layouts in use, with the fastest found if any, and by cuDNN; a profile of the first."""
    for shape in shapes:
        kind = shape.split(",")[2]
        H, B = map(int, shape.split(",")[:2])
        found, default = measured(shape), in_use(H, B)
        fastest = with_beside(found.get("forward"), default[0]), with_beside(found.get("backward"), default[1])
        for backward in (False, True):
            spent = {}
            functions = {"as picked": default, "fastest": fastest, "cuDNN": None}
            for name, pair in functions.items():
                if name == "fastest" and not found:
                    continue
                try:
                    spent[name] = round(timed(by(pair), H, B, bench.TYPES[kind], backward), 1)
                except Exception as error:
                    spent[name] = " ".join(str(error).split())[:80]
            print(f"layer T {T} B {B} {H} {kind} {'f+b' if backward else 'f'}:", spent, flush=True)
        if shape == shapes[0]:
            profile(shape, fastest)
        torch.cuda.empty_cache()


def a_shape(text: str) -> str:
    """The text; argparse says what is wrong with it."""
    of = text.split(",")
    if (
        len(of) != 3
        or not (of[0].isdecimal() and of[1].isdecimal() and int(of[0]) and int(of[1]))
        or of[2] not in bench.TYPES
    ):
        raise argparse.ArgumentTypeError(f"'{text}' is not units, batch and type, as in 1152,20,bf16")
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description="Times every layout of the LSTM kernels.")
    parser.add_argument("--seconds", type=float, default=150)
    parser.add_argument("--each", type=int, default=1, help="layouts of a kind")
    parser.add_argument("--paces", action="store_const", const=0, dest="each", help="several paces on a few layouts")
    parser.add_argument("--shapes", nargs="*", type=a_shape, default=SHAPES)
    parser.add_argument("--worker", nargs=5)
    parser.add_argument("--layers", action="store_true")
    parser.add_argument(
        "--steps", action="store_true", help="training steps with what the last sweep found, and nothing else"
    )
    parser.add_argument("--beside", action="store_true", help="products beside the kernels, and nothing else")
    parser.add_argument(
        "--together", action="store_true", help="two kernels at once on parts of the GPU, and nothing else"
    )
    given = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("it needs a CUDA GPU, and torch sees none here")
    if given.worker:
        H, B, kind, each, start = given.worker
        return worker(int(H), int(B), kind, int(each), int(start))
    if given.layers:
        return layers(given.shapes)
    if given.beside:
        return beside(given.shapes)
    if given.steps:
        return steps()
    if given.together:
        return together(given.seconds)
    until = time.monotonic() + given.seconds
    card = lstm_cuda.card(0)
    print(f"# {torch.cuda.get_device_name()}, torch {torch.__version__}, {card}", flush=True)
    jobs = []
    for shape in given.shapes:
        H, B, kind = shape.split(",")
        for name in lstm_cuda.LAYOUTS:
            for layout in candidates(name, int(H), int(B), card, given.each):
                jobs.append((layout, kind == "fp16", card.capability))
    start = time.monotonic()
    with ProcessPoolExecutor(os.cpu_count(), mp_context=torch.multiprocessing.get_context("spawn")) as pool:
        for job, why in zip(jobs, pool.map(compiled, *zip(*jobs, strict=True), timeout=given.seconds / 2), strict=True):
            if why:
                print(f"does not compile: {dict(job[0].macros)} {why[:300]}", flush=True)
    print(f"# {len(jobs)} kernels compiled in {time.monotonic() - start:.0f} s", flush=True)
    for shape in given.shapes:
        sweep(shape, given.each, until - 25)
    left = until - time.monotonic()
    try:
        subprocess.run(
            [sys.executable, __file__, "--layers", "--shapes", *given.shapes], timeout=max(left, 15), check=False
        )
    except subprocess.TimeoutExpired:
        print("# out of time", flush=True)


if __name__ == "__main__":
    main()
