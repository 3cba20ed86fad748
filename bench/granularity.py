"""The same text, model size and time in characters, byte pairs, unigram pieces and words: which unit pays?

    python bench/granularity.py run DATA OUT.jsonl --seconds 60 --parameters 20e6     one run after the other
    python bench/granularity.py report docs/granularity.svg OUT.jsonl ...            the table and the picture

Every model has an embedding of 400, tied, and two or three LSTM layers, the last of 400; the others are as wide as the
parameters allow. Each update reads about the same text: windows of 400 bytes in 40 streams. Adam, a constant rate and
an exponential mean of the iterates: nothing needs to know when the time will be over. Compared in bits per byte of the text
as it is. Where rare words are already <unk> in the text (WikiText-2, Penn Treebank) words miss nothing that the
others have to spell.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import tempfile
import time
from pathlib import Path
from typing import Any

KINDS = {
    "char": ("tokenizer.kind=char",),
    "bpe 2k": ("tokenizer.kind=bpe", "tokenizer.vocab_size=2000"),
    "bpe 8k": ("tokenizer.kind=bpe", "tokenizer.vocab_size=8000"),
    "unigram 8k": ("tokenizer.kind=unigram", "tokenizer.vocab_size=8000"),
    "word": ("tokenizer.kind=word",),
}
BASE = (
    "data.batch_size=40", "data.bptt_full_share=1", "data.bptt_spread=0", "model.embedding_size=400", "dropout.embedding=0",
    "dropout.input=0.2", "dropout.hidden=0.2", "dropout.output=0.2", "dropout.weight=0.2", "optimizer.name=adam",
    "optimizer.lr=2e-3", "optimizer.clip=0.25", "schedule.name=constant", "schedule.warmup_steps=50", "averaging.name=ema",
    "averaging.decay=0.998", "averaging.start=0", "train.tensorboard=false", "train.checkpoint_seconds=1e8", "train.epochs=100000",
)  # fmt: skip
WINDOW, EMBEDDING = 400, 400  # bytes, units


def parameters(vocab: int, hidden: int, layers: int) -> int:
    sizes = [EMBEDDING, *[hidden] * (layers - 1), EMBEDDING]
    return vocab * (EMBEDDING + 1) + sum(4 * b * (a + b + 2) for a, b in itertools.pairwise(sizes))


def width(vocab: int, layers: int, wanted: float) -> int:
    """The multiple of 16 that comes nearest to the wanted number of parameters."""
    return min(range(16, 8192, 16), key=lambda hidden: abs(parameters(vocab, hidden, layers) - wanted))


def one(name: str, data: str, seconds: float, wanted: float, layers: int, more: list[str]) -> dict[str, Any]:
    """The record of one run."""
    from recurlm import api
    from recurlm.config import Config, apply_assignments
    from recurlm.text.store import prepare
    from recurlm.training.monitor import read_metrics

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        settings = [*BASE, *KINDS[name], *more]
        start = time.perf_counter()
        store = prepare(data, apply_assignments(Config(), settings).tokenizer, folder / "store")
        prepared = time.perf_counter() - start
        of = store.info["train"]
        hidden, window = width(store.vocab_size, layers, wanted), round(WINDOW * of.tokens / of.bytes)
        settings += [f"model.hidden_sizes={[hidden] * (layers - 1) + [EMBEDDING]}", f"data.bptt={window}"]
        config = apply_assignments(Config(), [*settings, f'data.path="{folder / "store"}"'])
        result = api.train(config, folder / "run", max_seconds=seconds, quiet=True)
        bits = {s: store.info[s].tokens / store.info[s].bytes / math.log(2) for s in store.splits}
        curve = [
            {"seconds": r["seconds"], "step": r["step"], "epoch": r["epoch"], "valid": bits["valid"] * r["loss_nats"]}
            for r in read_metrics(folder / "run")
            if r["event"] in ("valid", "stopped")
        ]
        model = api.load(folder / "run")
        start = time.perf_counter()
        test = api.evaluate(model, data=str(folder / "store"), split="test", batch_size=20, with_ranks=False)
        return {
            "name": name, "settings": settings, "vocab": store.vocab_size, "hidden": hidden, "layers": layers, "window": window,
            "parameters": model.parameters, "bytes_per_token": of.bytes / of.tokens, "prepared": prepared,
            "read": curve[-1]["step"] * 40 * window * of.bytes / of.tokens, "train_bytes": of.bytes, "curve": curve,
            "tokenizer_bytes": (folder / "store" / "tokenizer.json").stat().st_size, "test_bpb": test["bpb"],
            "test_ppl": test["ppl"], "test_ppl_word": test["ppl_word"], "test_oov": test["oov_rate"],
            "test_seconds": time.perf_counter() - start, "test_bytes": store.info["test"].bytes, "steps": result.step,
        }  # fmt: skip


def run(data: str, out: Path, seconds: float, wanted: float, layers: int, names: list[str], more: list[str]) -> None:
    import torch

    from recurlm.bench import commit

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    head = {"data": data, "seconds": seconds, "parameters": wanted, "set": more, "device": device,
            "torch": torch.__version__, "commit": commit()}  # fmt: skip
    with out.open("w", encoding="utf-8") as file:
        file.write(json.dumps(head) + "\n")
        for name in names or KINDS:
            record = one(name, data, seconds, wanted, layers, more)
            file.write(json.dumps(record) + "\n")
            file.flush()
            print(f"{name}: {record['test_bpb']:.4f} bits per byte on test, {record['steps']} updates", flush=True)


def report(picture: Path, paths: list[Path]) -> None:
    import matplotlib
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5 * len(paths), 4), layout="constrained")
    for axes, path in zip(figure.subplots(1, len(paths), squeeze=False)[0], paths, strict=True):
        head, *rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        print(f"{head['data']}: {head['seconds']:g} s, {head['device']}, commit {head['commit']}\n")
        columns = "unit, vocabulary, bytes a token, layers, parameters, read (times), valid, test bits per byte, test ppl a word"
        print("| " + columns.replace(", ", " | ") + " | test read in |")
        print("|---|---|---|---|---|---|---|---|---|---|")
        for r in rows:
            sizes = " ".join(map(str, [r["hidden"]] * (r["layers"] - 1) + [EMBEDDING]))
            print(
                f"| {r['name']} | {r['vocab']:,} | {r['bytes_per_token']:.2f} | {sizes} | {r['parameters'] / 1e6:.1f} M | "
                f"{r['read'] / r['train_bytes']:.1f} | {min(c['valid'] for c in r['curve']):.4f} | **{r['test_bpb']:.4f}** | "
                f"{r['test_ppl_word']:,.1f} | {r['test_seconds']:.1f} s |"
            )
            axes.plot([c["seconds"] for c in r["curve"]], [c["valid"] for c in r["curve"]], label=r["name"])
        low = min(c["valid"] for r in rows for c in r["curve"])
        axes.set(xlabel="seconds of training", ylabel="bits per byte, valid", title=Path(head["data"]).name)
        axes.set_ylim(0.98 * low, 1.5 * low)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
        print()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "granularity"}):
        figure.savefig(picture, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    ran = verbs.add_parser("run")
    ran.add_argument("data")
    ran.add_argument("out", type=Path)
    ran.add_argument("--seconds", type=float, default=60)
    ran.add_argument("--parameters", type=float, default=20e6)
    ran.add_argument("--layers", type=int, default=2)
    ran.add_argument("--only", action="append", default=[], choices=KINDS)
    ran.add_argument("--set", action="append", default=[], help="a setting for every run, after its own")
    told = verbs.add_parser("report")
    told.add_argument("picture", type=Path)
    told.add_argument("files", type=Path, nargs="+")
    given = parser.parse_args()
    if given.verb == "report":
        report(given.picture, given.files)
    else:
        run(given.data, given.out, given.seconds, given.parameters, given.layers, given.only, given.set)


if __name__ == "__main__":
    main()
