"""The same text, number of weights and time in characters, byte pairs, unigram pieces and words: which unit pays?

    python bench/granularity.py run DATA OUT.jsonl --limit 190     everything, then the table (OUT.md) and the picture (OUT.svg)
    python bench/granularity.py report OUT.jsonl                   table and picture again

Every model has an embedding of 256, tied, and LSTM layers, the last of 256; the others are as wide as the weights
allow. Each update reads about the same text, 40 windows of 400 bytes, at a constant rate, and the exponential mean of the
iterates is measured: nothing needs to know when the time will be over. First each unit runs with each of RATES for some
updates, all side by side; the one with the least training loss is the unit's own. Then one unit after the other has the machine
for itself, for the same time, its kernels compiled already. `--limit` is for everything: what is left of it is shared.

Compared in bits per byte of the text as it is. Where rare words are already <unk> in the text (WikiText-2, Penn
Treebank) words miss nothing that the others have to spell.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import multiprocessing
import tempfile
import time
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

KINDS = {
    "char": ("tokenizer.kind=char",),
    "bpe": ("tokenizer.kind=bpe", "tokenizer.vocab_size=8000"),
    "unigram": ("tokenizer.kind=unigram", "tokenizer.vocab_size=8000"),
    "word": ("tokenizer.kind=word",),
}
RATES = {
    "Adam 0.002": ("optimizer.name=adam", "optimizer.lr=2e-3", "schedule.warmup_steps=50"),
    "SGD 10": ("optimizer.name=sgd", "optimizer.lr=10", "schedule.warmup_steps=0"),
    "SGD 30": ("optimizer.name=sgd", "optimizer.lr=30", "schedule.warmup_steps=0"),
}
EMBEDDING, ROWS, WINDOW = 256, 40, 400  # units, streams, bytes
BASE = (
    f"data.batch_size={ROWS}", "data.bptt_full_share=1", "data.bptt_spread=0", f"model.embedding_size={EMBEDDING}",
    "model.head=tied", "dropout.embedding=0", "dropout.input=0.2", "dropout.hidden=0.2", "dropout.output=0.2",
    "dropout.weight=0.2", "optimizer.clip=0.25", "schedule.name=constant", "averaging.name=ema", "averaging.decay=0.998",
    "averaging.start=0", "train.tensorboard=false", "train.checkpoint_seconds=1e8", "train.epochs=100000",
    "data.eval_batch_size=200",
)  # fmt: skip
AROUND = 6.0  # seconds that a unit takes beyond its training: warm-up, the model's files, the test text


def parameters(vocab: int, hidden: int, layers: int) -> int:
    sizes = [EMBEDDING, *[hidden] * (layers - 1), EMBEDDING]
    return vocab * (EMBEDDING + 1) + sum(4 * b * (a + b + 2) for a, b in itertools.pairwise(sizes))


def width(vocab: int, layers: int, wanted: float) -> int:
    """The multiple of 16 that comes nearest to the wanted number of weights."""
    return min(range(16, 8192, 16), key=lambda hidden: abs(parameters(vocab, hidden, layers) - wanted))


def prepared(unit: str, data: str, folder: Path) -> tuple[str, float]:
    """(the unit, seconds): writes its store."""
    from recurlm.config import Config, apply_assignments
    from recurlm.text.store import prepare

    start = time.perf_counter()
    prepare(data, apply_assignments(Config(), list(KINDS[unit])).tokenizer, folder / unit)
    return unit, time.perf_counter() - start


def settings_of(unit: str, folder: Path, wanted: float, layers: int) -> list[str]:
    """The settings of a unit's runs, all but the rate."""
    from recurlm.text.store import open_store

    store = open_store(folder / unit)
    text = store.info["train"]
    sizes = [width(store.vocab_size, layers, wanted)] * (layers - 1) + [EMBEDDING]
    window = round(WINDOW * text.tokens / text.bytes)
    half = round(text.bytes / (2 * ROWS * WINDOW))  # updates of half a pass over the text
    return [*BASE, f"model.hidden_sizes={sizes}", f"data.bptt={window}", f"train.eval_every={max(1, half)}"]


def trained(unit: str, folder: Path, settings: list[str], name: str, seconds: float = math.inf, steps: int = 0) -> Any:
    """The result of a run named FOLDER/UNIT NAME, which ends after so many seconds or steps."""
    from recurlm import api
    from recurlm.config import Config, apply_assignments

    more = (
        [f"train.max_steps={steps}", f"train.eval_every={steps}", f"train.log_every={min(10, steps)}"] if steps else []
    )
    config = apply_assignments(Config(), [*settings, *more, f'data.path="{folder / unit}"'])
    return api.train(config, folder / f"{unit} {name}", max_seconds=seconds, quiet=True)


def tried(unit: str, rate: str, folder: Path, settings: list[str], steps: int) -> float:
    """Nats a token in training over the last quarter of so many updates."""
    from recurlm.training.monitor import read_metrics

    trained(unit, folder, [*settings, *RATES[rate]], rate, steps=steps)
    losses = [r["loss_nats"] for r in read_metrics(folder / f"{unit} {rate}") if r["event"] == "step"]
    last = losses[-max(1, len(losses) // 4) :]
    return sum(last) / len(last)


def race(data: str, folder: Path, given: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """For each unit its store's seconds, its settings without a rate, and the loss of each rate; all side by side."""
    units: dict[str, dict[str, Any]] = {}
    with ProcessPoolExecutor(given.jobs, multiprocessing.get_context("spawn")) as pool:
        waiting: dict[Future, tuple[str, str]] = {
            pool.submit(prepared, unit, data, folder): (unit, "") for unit in given.only or KINDS
        }
        while waiting:
            done = next(as_completed(waiting))
            unit, rate = waiting.pop(done)
            try:
                found = done.result()
            except Exception as error:  # one that fails costs the others nothing
                print(f"{unit} {rate}: {type(error).__name__}: {error}", flush=True)
                continue
            if rate:
                bits = found / math.log(2) / units[unit]["bytes_per_token"]
                units[unit]["tried"][rate] = bits
                print(f"{unit}, {rate}: {bits:.3f} bits per byte in training by update {given.race}", flush=True)
                continue
            settings = [*settings_of(unit, folder, given.parameters, given.layers), *given.set]
            units[unit] = {"prepared": found[1], "settings": settings, "tried": {}, **facts(folder / unit)}
            for rate in RATES:
                waiting[pool.submit(tried, unit, rate, folder, settings, given.race)] = unit, rate
    return units


def facts(place: Path) -> dict[str, Any]:
    """What a store says of its unit."""
    from recurlm.text.store import open_store

    store = open_store(place)
    text = store.info["train"]
    return {
        "vocab": store.vocab_size, "bytes_per_token": text.bytes / text.tokens, "train_bytes": text.bytes,
        "tokenizer_bytes": (place / "tokenizer.json").stat().st_size,
        "bits_per_nat": {s: store.info[s].tokens / store.info[s].bytes / math.log(2) for s in store.splits},
    }  # fmt: skip


def measured(unit: str, folder: Path, known: dict[str, Any], seconds: float) -> dict[str, Any]:
    """The record of the unit's own run."""
    from recurlm import api
    from recurlm.training.monitor import read_metrics

    rate = min(known["tried"], key=known["tried"].get, default="SGD 10")  # that, should every try have failed
    settings = [*known["settings"], *RATES[rate]]
    trained(unit, folder, settings, "warm-up", steps=4)
    result = trained(unit, folder, settings, "run", seconds)
    place = folder / f"{unit} run"
    per_update = next(int(s.split("=")[1]) for s in settings if s.startswith("data.bptt=")) * ROWS
    passes = per_update * known["bytes_per_token"] / known["train_bytes"]
    curve = [
        {"seconds": r["seconds"], "passes": r["step"] * passes,
         "valid": known["bits_per_nat"]["valid"] * r["loss_nats"]}
        for r in read_metrics(place) if r["event"] in ("valid", "stopped")
    ]  # fmt: skip
    model = api.load(place)
    start = time.perf_counter()
    test = api.evaluate(model, data=str(folder / unit), split="test", batch_size=20, with_ranks=False)
    return {
        **known, "unit": unit, "rate": rate, "parameters": model.parameters, "steps": result.step, "curve": curve,
        "test_bpb": test["bpb"], "test_ppl_word": test["ppl_word"], "test_seconds": time.perf_counter() - start,
    }  # fmt: skip


def run(given: argparse.Namespace) -> None:
    import torch

    from recurlm.bench import commit

    began, gpu = time.monotonic(), torch.cuda.is_available()
    if gpu:
        given.set.insert(0, "train.dtype=bf16")
    with tempfile.TemporaryDirectory() as scratch, given.out.open("w", encoding="utf-8") as file:
        folder = Path(scratch)
        units = race(given.data, folder, given)
        units = {unit: units[unit] for unit in KINDS if unit in units}
        raced = time.monotonic() - began
        seconds = max(1.0, (given.limit - raced) / max(1, len(units)) - AROUND)
        head = {
            "data": given.data, "seconds": seconds, "weights": given.parameters, "layers": given.layers, "race": given.race,
            "set": given.set, "device": torch.cuda.get_device_name() if gpu else "CPU", "torch": torch.__version__,
            "commit": commit(),
        }  # fmt: skip
        file.write(json.dumps(head) + "\n")
        print(f"{raced:.0f} s so far; each unit now trains for {seconds:.1f} s", flush=True)
        for unit, known in units.items():
            start = time.monotonic()
            try:
                record = measured(unit, folder, known, seconds)
            except Exception as error:
                print(f"{unit}: {type(error).__name__}: {error}", flush=True)
                continue
            file.write(json.dumps(record) + "\n")
            file.flush()
            print(
                f"{unit}, {record['rate']}: {record['test_bpb']:.4f} bits per byte on test, {record['steps']} updates, "
                f"{time.monotonic() - start:.0f} s in all",
                flush=True,
            )
    report(given.out)


def at(curve: list[dict[str, float]], passes: float) -> float:
    """Bits per byte after so many passes, on straight lines between measurements."""
    for a, b in itertools.pairwise(curve):
        if a["passes"] <= passes <= b["passes"]:
            share = (passes - a["passes"]) / max(1e-9, b["passes"] - a["passes"])
            return a["valid"] + share * (b["valid"] - a["valid"])
    return curve[-1]["valid"]


def report(path: Path) -> None:
    """Writes the table beside the records, and the picture; prints the table."""
    head, *rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    if not rows:
        print("no unit was measured")
        return
    common = min(r["curve"][-1]["passes"] for r in rows)
    columns = (
        "unit", "vocabulary", "bytes a token", "units of the layers", "weights", "tokenizer", "rate", "passes over the text",
        "seconds a pass", f"valid after {common:.1f} passes", f"valid after {head['seconds']:.0f} s", "**test**",
        "test perplexity a word", "reading test",
    )  # fmt: skip
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for r in rows:
        sizes = next(s for s in r["settings"] if s.startswith("model.hidden_sizes="))
        passes = r["curve"][-1]["passes"]
        cells = (
            r["unit"], f"{r['vocab']:,}", f"{r['bytes_per_token']:.2f}", sizes.split("=")[1].strip("[]"),
            f"{r['parameters'] / 1e6:.1f} M", f"{r['tokenizer_bytes'] / 1e3:.0f} kB", r["rate"], f"{passes:.1f}",
            f"{r['curve'][-1]['seconds'] / passes:.2f}", f"{at(r['curve'], common):.4f}",
            f"{min(c['valid'] for c in r['curve']):.4f}", f"**{r['test_bpb']:.4f}**", f"{r['test_ppl_word']:,.1f}",
            f"{r['test_seconds']:.2f} s",
        )  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    commit = head["commit"][:7] + head["commit"][40:]  # perhaps with changes
    where = f"{Path(head['data']).name}, {head['device']}, {head['seconds']:.1f} s a unit, commit {commit}"
    table = f"{where}; losses in bits per byte.\n\n" + "\n".join(lines) + "\n"
    path.with_suffix(".md").write_text(table, encoding="utf-8")
    print(table)
    draw(path.with_suffix(".svg"), rows)


def draw(picture: Path, rows: list[dict[str, Any]]) -> None:
    import matplotlib
    from matplotlib.figure import Figure

    low = min(c["valid"] for r in rows for c in r["curve"])
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "granularity"}):
        figure = Figure(figsize=(10, 4), layout="constrained")
        for axes, (key, label) in zip(
            figure.subplots(1, 2), (("seconds", "seconds of training"), ("passes", "passes over the text")), strict=True
        ):
            for r in rows:
                axes.plot([c[key] for c in r["curve"]], [c["valid"] for c in r["curve"]], label=r["unit"])
            axes.set(xlabel=label, ylabel="bits per byte, valid", ylim=(0.95 * low, 2.5 * low))
            axes.grid(alpha=0.3)
            axes.legend(frameon=False)
        figure.savefig(picture, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    ran = verbs.add_parser("run")
    ran.add_argument("data")
    ran.add_argument("out", type=Path, help="OUT.jsonl")
    ran.add_argument("--limit", type=float, default=190, help="seconds for everything")
    ran.add_argument("--race", type=int, default=500, help="updates with each rate")
    ran.add_argument("--jobs", type=int, default=12, help="of the race, at once")
    ran.add_argument("--parameters", type=float, default=12e6)
    ran.add_argument("--layers", type=int, default=2)
    ran.add_argument("--only", action="append", default=[], choices=KINDS)
    ran.add_argument("--set", action="append", default=[], help="a setting for every run")
    told = verbs.add_parser("report")
    told.add_argument("out", type=Path)
    given = parser.parse_args()
    report(given.out) if given.verb == "report" else run(given)


if __name__ == "__main__":
    main()
