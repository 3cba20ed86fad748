"""Every output layer at the same sizes: training (loss and gradients), scoring (loss), the ten best words of one row.

    recurlm bench heads                                   the rows of this machine
    python -m recurlm.bench.heads PICTURE.svg             the same, and a picture of the times over the vocabulary
    python -m recurlm.bench.heads --only NAME ...         some rows of it
    python -m recurlm.bench.heads --tiles                 (GPU) times of other tiles in the kernels of an adaptive softmax
    python -m recurlm.bench.heads --profile               (GPU) times of the kernels of an adaptive softmax
    python -m recurlm.bench.heads --once NAME ...         (GPU) these heads, or torch, once at every size: compiled, and checked

Words are drawn by Zipf's law. The peer is torch's full softmax (on a GPU compiled, too), and for the adaptive ones
nn.AdaptiveLogSoftmaxWithLoss with the same cut points; on a GPU everything is in bfloat16, on the CPU in fp32. On the CPU
also the hierarchical softmax alone over more and more words. Perplexities: bench/heads.py.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Generator, Tensor, nn

from recurlm import kernels
from recurlm.bench.timing import Row, cpu_time, duration, gpu_memory, gpu_time
from recurlm.config import ModelConfig
from recurlm.kernels import reference
from recurlm.kernels.cross_entropy import mean
from recurlm.model.heads import HEADS
from recurlm.model.heads.base import Use
from recurlm.model.heads.cuts import zipf

PUBLISHED_CUTS = (2_800, 20_000, 76_000)  # of AWD-QRNN on WikiText-103
BEST = 10
ADAPTIVE = ("adaptive", "tied-adaptive")


class Size(NamedTuple):
    """Rows of a training step, units, words."""

    rows: int
    units: int
    words: int


SIZES = {
    "cuda": (Size(1400, 400, 10_000), Size(5600, 400, 33_278), Size(8400, 400, 267_735)),
    "cpu": (Size(256, 256, 10_000), Size(256, 256, 33_278), Size(64, 256, 267_735)),
}
TREES = (1_000, 10_000, 100_000, 1_000_000)  # words of the hierarchical softmax alone
TREE_UNITS = 64
VARIANTS: dict[str, dict[str, Any]] = {
    **{name: {"head": name} for name in HEADS if name != "mixture"},
    "hierarchical, balanced": {"head": "hierarchical", "tree": "balanced"},
    "mixture of 5, tied": {"head": "mixture", "experts": 5, "base": "tied"},
    "mixture of 5, tied-adaptive": {"head": "mixture", "experts": 5, "base": "tied-adaptive"},
}


class Subject(NamedTuple):
    """A head or a peer: its loss, its leaves, and what draws the ten best words of a row."""

    nll: Callable[[], Tensor]
    leaves: list[Tensor]
    best: Callable[[], object]
    captured: bool = True


def targets(size: Size, device: str) -> Tensor:
    """Ids by Zipf's law, the most frequent first."""
    shares = torch.from_numpy(zipf(size.words))
    return shares.multinomial(size.rows, replacement=True, generator=Generator().manual_seed(1)).to(device)


def subject(name: str, size: Size, device: str, dtype: torch.dtype, **more: Any) -> Subject:
    """A head of ours, with what it settles for these words and this device."""
    counts_V = zipf(size.words)
    config = ModelConfig(embedding_size=size.units, **VARIANTS[name] | more)
    head = HEADS[config.head]
    config, _ = head.settle(config, size.units, Use(lambda: counts_V, size.rows, device))
    made = head.build(size.words, size.units, config, Generator().manual_seed(1)).to(device, dtype)
    hidden, embedding = _given(size, device, dtype)
    y = targets(size, device)
    shares = made.tied or (config.head == "mixture" and HEADS[config.base].tied)
    leaves = [hidden, *([embedding] if shares else []), *made.parameters()]

    def best() -> object:
        with torch.inference_mode():
            return made.topk(hidden[:1], BEST, embedding)

    return Subject(lambda: made.nll(hidden, y, embedding), leaves, best)


def full(size: Size, device: str, dtype: torch.dtype, compiled: bool = False) -> Subject:
    """Torch's formula of the full softmax."""
    (hidden, weight), y = _given(size, device, dtype), targets(size, device)
    bias = torch.zeros(size.words, device=device, dtype=dtype, requires_grad=True)

    def best() -> object:
        with torch.inference_mode():
            return reference.logits(hidden[:1], weight, bias).log_softmax(-1).topk(BEST)

    formula = reference.linear_cross_entropy
    formula = torch.compile(formula, dynamic=False) if compiled else formula
    return Subject(lambda: formula(hidden, weight, bias, y), [hidden, weight, bias], best)


def torchs_adaptive(size: Size, device: str, dtype: torch.dtype, cutoffs: tuple[int, ...]) -> Subject:
    """nn.AdaptiveLogSoftmaxWithLoss; it waits for the host, so it cannot be captured."""
    peer = nn.AdaptiveLogSoftmaxWithLoss(size.units, size.words, list(cutoffs), head_bias=True).to(device, dtype)
    (hidden, _), y = _given(size, device, dtype), targets(size, device)

    def best() -> object:
        with torch.inference_mode():
            return peer.log_prob(hidden[:1]).topk(BEST)

    return Subject(lambda: -peer(hidden, y).output, [hidden, *peer.parameters()], best, captured=False)


def _given(size: Size, device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    draw = Generator(device).manual_seed(2)
    hidden = torch.randn(size.rows, size.units, generator=draw, device=device).to(dtype)
    embedding = torch.empty(size.words, size.units, device=device).uniform_(-0.1, 0.1, generator=draw).to(dtype)
    return hidden.requires_grad_(), embedding.requires_grad_()


class Cost(NamedTuple):
    """Microseconds of training, scoring and searching; megabytes of training beyond inputs and gradients (GPU)."""

    training: float
    scoring: float
    searching: float
    memory: float | None


def in_turn(ours: Subject, theirs: Subject) -> tuple[Cost, Cost]:
    """What ours and the peer take on the CPU, where they take turns, so that whatever else it does meets both."""
    works = {f"{n} {m}": work for n, it in enumerate((ours, theirs)) for m, work in enumerate(_works(it))}
    best = {name: found.best for name, found in cpu_time(works, seconds=0.3, rounds=3).items()}
    one, two = (Cost(best[f"{n} 0"], best[f"{n} 1"], best[f"{n} 2"], None) for n in range(2))
    return one, two


def _works(it: Subject) -> tuple[Callable[[], object], ...]:
    """Training, scoring and searching."""

    def train() -> list[Tensor]:
        return list(torch.autograd.grad(mean(it.nll()), it.leaves, materialize_grads=True))

    def score() -> Tensor:
        with torch.no_grad():
            return it.nll()

    return train, score, it.best


def on_gpu(it: Subject) -> Cost:
    """What it takes alone."""
    works = _works(it)
    memory = gpu_memory(works[0]) - sum(leaf.nbytes for leaf in it.leaves) / 1e6
    graphs = it.captured, it.captured, False
    times = [gpu_time(work, graph=graph, repeats=5) for work, graph in zip(works, graphs, strict=True)]
    return Cost(times[0], times[1], times[2], memory)


def rows(report: Callable[[dict[str, Any]], None] = lambda row: None, only: Sequence[str] = ()) -> list[dict[str, Any]]:
    """A row for each head, size and what is done with it; adaptive ones with the published cut points beside torch's.

    `report` gets each row when it is there; `only` these heads, as the rows name them (none: all).
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    out: list[dict[str, Any]] = []

    def add(**columns: Any) -> None:
        out.append(Row(**columns).as_dict())
        report(out[-1])

    def compare(name: str, size: Size, ours: Callable[[], Subject], theirs: Peer, target: str = "") -> None:
        """The three rows of a head beside a peer; what fails is said and costs no other row."""
        try:
            mine, other = in_turn(ours(), theirs.subject) if theirs.subject else (on_gpu(ours()), theirs.times)
        except Exception as error:  # such as too little memory
            print(f"{name}, {size}: {type(error).__name__}: {str(error)[:300]}", file=sys.stderr, flush=True)
            return
        finally:
            _empty(device)
        kind = str(dtype).removeprefix("torch.")
        for what, rows_there, a, b in zip(
            ("training", "scoring", f"best {BEST}"), (size.rows, size.rows, 1), mine[:3], other[:3], strict=True
        ):
            training = what == "training"
            add(measure=f"{name}, {what}", shape=f"{rows_there:,} x {size.units} x {size.words:,} {kind}", ours_us=a, peer_us=b,
                peer=", ".join(filter(None, (theirs.name, theirs.more * training))), memory_mb=mine.memory if training else None,
                target=target if training else "")  # fmt: skip

    for size in SIZES[device]:
        peer = _peer("torch, full softmax", lambda size=size: full(size, device, dtype), device)
        if device == "cuda" and not only:
            compiled = _peer("", lambda size=size: full(size, device, dtype, compiled=True), device)
            peer = peer._replace(more=f"{peer.more}; compiled {duration(compiled.times[0])}, {compiled.more}")
        for name in [name for name in VARIANTS if not only or name in only]:
            compare(name, size, lambda name=name, size=size: subject(name, size, device, dtype), peer)
        if size.words > PUBLISHED_CUTS[-1]:
            torchs = _peer(
                "nn.AdaptiveLogSoftmaxWithLoss",
                lambda size=size: torchs_adaptive(size, device, dtype, PUBLISHED_CUTS),
                device,
            )
            for name in [name for name in ADAPTIVE if not only or f"{name}, published cuts" in only]:
                compare(f"{name}, published cuts", size,
                        lambda name=name, size=size: subject(name, size, device, dtype, cutoffs=PUBLISHED_CUTS), torchs,
                        "2 x torch's, 5 x full" if name == "adaptive" else "")  # fmt: skip
        del peer
    return out + (trees() if device == "cpu" else [])


class Peer(NamedTuple):
    """A peer, and what to measure in turn with ours (CPU), or what it took (GPU; None where it failed)."""

    name: str
    subject: Subject | None
    times: tuple[float | None, ...] = ()
    more: str = ""


def _peer(name: str, make: Callable[[], Subject], device: str) -> Peer:
    """A peer, on a GPU measured once for all heads; `more` says what it took besides its time."""
    if device == "cpu":
        return Peer(name, make())
    try:
        cost = on_gpu(make())
        return Peer(name, None, cost[:3], f"{cost.memory:,.0f} MB")
    except Exception as error:  # such as no C compiler: ours are worth having alone
        return Peer(name, None, (None, None, None), f"failed: {type(error).__name__}: {str(error)[:80]}")
    finally:
        _empty(device)


def _empty(device: str) -> None:
    if device == "cuda":
        torch.cuda.empty_cache()


def trees() -> list[dict[str, Any]]:
    """The hierarchical softmax on the CPU over more and more words: its loss grows as the bits of a code do."""
    out = []
    for words in TREES:
        size = Size(256, TREE_UNITS, words)
        it, plain = subject("hierarchical, balanced", size, "cpu", torch.float32), full(size, "cpu", torch.float32)
        with torch.no_grad():
            times = cpu_time({"ours": it.nll, "peer": plain.nll}, seconds=0.5, rounds=3)
        row = Row(
            measure="balanced tree, scoring", shape=f"{size.rows} x {size.units} x {words:,} float32", ours_us=times["ours"].best,
            peer_us=times["peer"].best, peer="torch, full softmax", rate=f"{(words - 1).bit_length()} bits a word at most",
        )  # fmt: skip
        out.append(row.as_dict())
    return out


def picture(found: list[dict[str, Any]], path: str) -> None:
    """Draws training and scoring times over the vocabulary, a line for each head."""
    import matplotlib
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.6), layout="constrained")
    for axes, what in zip(figure.subplots(1, 2), ("training", "scoring"), strict=True):
        lines: dict[str, dict[int, float]] = {}
        for row in found:
            name, _, kind = row["measure"].rpartition(", ")
            if kind != what or "tree" in name or "published" in name:
                continue
            words = int(row["shape"].split(" x ")[2].split()[0].replace(",", ""))
            lines.setdefault(name, {})[words] = row["ours_us"] / 1000
            lines.setdefault("torch, full softmax", {})[words] = row["peer_us"] / 1000
        for name, times in lines.items():
            axes.plot(list(times), list(times.values()), marker=".", label=name, ls="--" if "torch" in name else "-")
        axes.set(xscale="log", yscale="log", xlabel="words", ylabel="milliseconds", title=what)
        axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "heads"}):
        figure.savefig(path, metadata={"Date": None})


def sweep(seconds: float = 28) -> None:
    """Prints the times of other tiles in the kernels of `cluster_triton`, at the tails of the published cut points."""
    from recurlm.kernels import cluster_triton as fused
    from recurlm.kernels import cross_entropy_triton as whole

    start, size = time.perf_counter(), SIZES["cuda"][-1]
    subjects = {name: subject(name, size, "cuda", torch.bfloat16, cutoffs=PUBLISHED_CUTS) for name in ADAPTIVE}

    def line(label: str, module: Any = fused, **changed: Any) -> None:
        cells = []
        for name, it in subjects.items():
            if time.perf_counter() - start > seconds:
                cells.append(f"{name} out of time")
                continue
            try:
                with mock.patch.multiple(module, **changed):
                    train, score, _ = _works(it)
                    cells.append(
                        f"{name} {gpu_time(train, repeats=5):7.0f} us, scoring {gpu_time(score, repeats=5):5.0f}"
                    )
            except Exception as error:  # such as too little shared memory
                cells.append(f"{name} {type(error).__name__}: {str(error)[:90]}")
        print(f"  {label:32} {'   '.join(cells)}", flush=True)

    line("as it is", SIDE_STREAMS=True)
    line("one stream", SIDE_STREAMS=False)
    line("1 program a multiprocessor", PER_SM=1)
    line("shortlist's exponentials kept", module=whole, KEPT_BYTES=80 << 20)
    for shape in ((128, 128), (64, 64), (128, 64)):
        for per_sm in (1, 2):
            line(f"{shape}, {per_sm}", SHAPES=(shape, *fused.SHAPES), PER_SM=per_sm)
    line("3 stages", STAGES=3)


def profile() -> None:
    """Prints the GPU time of every kernel of one training call, published cut points."""
    for head in ADAPTIVE:
        it = subject(head, SIZES["cuda"][-1], "cuda", torch.bfloat16, cutoffs=PUBLISHED_CUTS)
        torch.autograd.grad(mean(it.nll()), it.leaves)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as seen:
            torch.autograd.grad(mean(it.nll()), it.leaves)
            torch.cuda.synchronize()
        print(f"-- {head}")
        for event in sorted(seen.key_averages(), key=lambda e: -e.self_device_time_total)[:25]:
            print(f"{event.self_device_time_total:9.1f} us {event.count:4d} x {event.key[:70]}")


def once(names: list[str], device: str = "cuda") -> None:
    """Calls what `rows` measures of these heads (or of 'torch') once; says what fails, and whether adaptive losses are right."""
    dtype = torch.bfloat16
    makers: dict[tuple[str, Size], Callable[[], Subject]] = {}
    for name, size in ((name, size) for size in reversed(SIZES[device]) for name in names):
        if name == "torch":
            makers[name, size] = lambda size=size: full(size, device, dtype, compiled=True)
            continue
        makers[name, size] = lambda name=name, size=size: subject(name, size, device, dtype)
        if VARIANTS[name]["head"] in ADAPTIVE and size.words > PUBLISHED_CUTS[-1]:
            makers[f"{name}, published cuts", size] = lambda name=name, size=size: subject(
                name, size, device, dtype, cutoffs=PUBLISHED_CUTS
            )
    for (name, size), make in makers.items():
        try:
            it = make()
            train, score, best = _works(it)
            found = [score(), *train()]  # type: ignore[misc]
            best()
            if "adaptive" in name and "mixture" not in name:
                with mock.patch.object(kernels, "cluster_cross_entropies", reference.cluster_cross_entropies):
                    truth = [score(), *train()]  # type: ignore[misc]
                off = max(float((a - b).float().norm() / b.float().norm()) for a, b in zip(found, truth, strict=True))
                print(
                    f"{name}, {size}: {off:.4f} of the norm from the plain formula{' TOO FAR' * (off > 0.03)}",
                    flush=True,
                )
        except Exception as error:
            print(f"{name}, {size}: {type(error).__name__}: {str(error)[:600]}", flush=True)
        _empty(device)


def _show(row: dict[str, Any]) -> None:
    print(f"{row['measure']:40} {row['shape']:32} {duration(row['ours_us']):>9} {row['memory_mb'] or 0:7.0f} MB beside "
          f"{duration(row['peer_us'])} {row['peer']}", flush=True)  # fmt: skip


if __name__ == "__main__":
    if "--tiles" in sys.argv:
        sweep()
    elif "--profile" in sys.argv:
        profile()
    elif "--once" in sys.argv:
        once(sys.argv[2:])
    elif "--only" in sys.argv:
        rows(_show, sys.argv[2:])
    else:
        measured = rows(_show)
        if len(sys.argv) > 1:
            picture(measured, sys.argv[1])
