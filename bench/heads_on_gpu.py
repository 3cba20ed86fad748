"""What the output layers do on a GPU, in some minutes: correct steps, then every measurement of heads and of the mixture.

    python bench/heads_on_gpu.py all OUT [--ptb DATA] [--wt2 DATA] [--only PART ...]      everything, a log for each part in OUT
    python bench/heads_on_gpu.py train OUT DATA KIND                    every head trained, tied and not; KIND ptb or wt2
    python bench/heads_on_gpu.py smoke HEAD DATA                        30 steps of one head, captured and not
    python bench/heads_on_gpu.py steps DATA RECIPE [--quick]            the time of a step of a recipe

First parts run side by side and quickly, so that what they need is compiled by several processes; then those that measure run
alone, one after the other. A part that fails or takes too long costs no other part.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

HEADS = {
    "softmax": ("model.head=softmax",),
    "tied": ("model.head=tied",),
    "hierarchical": ("model.head=hierarchical",),
    "balanced": ("model.head=hierarchical", "model.tree=balanced"),
    "adaptive": ("model.head=adaptive", "model.cutoffs=[1000,4000]"),
    "tied-adaptive": ("model.head=tied-adaptive", "model.cutoffs=[1000,4000]"),
    "adaptive-inputs": ("model.head=tied-adaptive", "model.cutoffs=[1000,4000]", "model.adaptive_inputs=true"),
    "mixture": ("model.head=mixture", "model.experts=15", "model.embedding_size=300", "model.hidden_sizes=[650,330]"),
    "mixture-adaptive": (
        "model.head=mixture",
        "model.experts=5",
        "model.base=tied-adaptive",
        "model.cutoffs=[1000,4000]",
    ),
}
BODY = (
    "data.batch_size=12", "data.bptt=70", "data.bptt_spread=0", "data.bptt_full_share=1", "tokenizer.kind=word",
    "tokenizer.vocab_splits=all", "model.layer=lstm", "model.embedding_size=400", "model.hidden_sizes=[650,400]",
    "dropout.weight=0.3", "dropout.latent=0.2", "objective.ar=2", "objective.tar=1", "optimizer.name=sgd", "optimizer.lr=20",
    "optimizer.clip=0.25", "schedule.name=constant", "train.dtype=bf16", "train.tensorboard=false",
)  # fmt: skip
NO_DROPOUT = tuple(f"dropout.{name}=0" for name in ("embedding", "input", "hidden", "output", "weight", "latent"))
STEPS = 30


def smoke(head: str, data: str) -> None:
    """The same steps as graphs, launch by launch and (without dropout) operation by operation give the same losses, which fall."""
    import tempfile

    from recurlm.config import Config, apply_assignments
    from recurlm.model import precision
    from recurlm.text.store import Store, prepare
    from recurlm.training.captured import CapturedStep
    from recurlm.training.trainer import Trainer

    config = apply_assignments(Config(), [*BODY, *HEADS[head]])

    def losses(store: Store, folder: str, steps: int, graphs: bool, *settings: str) -> list[float]:
        trainer = Trainer(apply_assignments(config, settings), store, Path(folder), quiet=True)
        if isinstance(trainer.stepper, CapturedStep):
            trainer.stepper.most_graphs *= graphs
        elif "train.capture=false" not in settings:
            raise SystemExit(f"{head}: the step is not captured")
        found = []
        with precision.applied(trainer.precision):
            for _ in range(steps):
                trainer.advance()
                if len(trainer.waiting) >= trainer.stepper.lag:
                    found += trainer.read()[0]
            numbers, failure = trainer.read()
        if failure:
            raise SystemExit(f"{head}: {failure}")
        return [one["loss_nats"] for _, one in found + numbers]

    with tempfile.TemporaryDirectory() as scratch:
        store = prepare(data, config.tokenizer, Path(scratch) / "store")
        graphs, bare = (losses(store, scratch, STEPS, captured) for captured in (True, False))
        plain = losses(store, scratch, 4, False, *NO_DROPOUT, "train.capture=false")
        same = losses(store, scratch, 4, True, *NO_DROPOUT)
    bits = "the same bits" if graphs == bare else f"NOT THE SAME {graphs[-3:]} {bare[-3:]}"
    off = max(abs(a - b) for a, b in zip(plain, same, strict=True))
    falls = "falls" if graphs[-1] < graphs[0] - 0.5 else "DOES NOT FALL"
    print(
        f"{head}: graphs and launches {bits}; without dropout {off:.4f} nats from the plain step{' TOO FAR' * (off > 0.05)}; "
        f"loss {graphs[0]:.3f} {falls} to {graphs[-1]:.3f}"
    )


def steps(data: str, recipe: str, quick: bool) -> None:
    """The time of a training step of full windows in bf16, and what of the limit it is."""
    import tempfile

    from recurlm.bench import step
    from recurlm.config import apply_assignments, load_recipe
    from recurlm.text.store import prepare

    with tempfile.TemporaryDirectory() as scratch:
        store = prepare(data, load_recipe(recipe).tokenizer, Path(scratch) / "store")
        if quick:
            step.WARM, step.STEPS = 3, 1
        for batch in ("", "data.batch_size=20"):
            chosen = ("train.dtype=bf16", *filter(None, [batch]))
            size = apply_assignments(load_recipe(recipe), list(chosen)).data
            elapsed, trainer = step.microseconds(recipe, store, *chosen)
            need = step.limit(trainer) if not quick else 0.0
            tokens = size.batch_size * size.bptt
            print(
                f"{recipe}, {size.batch_size} x {size.bptt} bf16: {elapsed:,.0f} us a step, {tokens / elapsed:.3f} M tokens/s, "
                f"limit {need:,.0f} us", flush=True,
            )  # fmt: skip


def _begin(command: list[str], log: Path) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    with log.open("wb") as file:
        return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)


def _end(process: subprocess.Popen[bytes], name: str, until: float) -> None:
    start = time.perf_counter()
    try:
        code = process.wait(max(0.1, until - start))
    except subprocess.TimeoutExpired:
        process.kill()
        code = "out of time"
    if code:
        print(f"-- {name}: {code}", flush=True)


def everything(out: Path, ptb: str, wt2: str, seconds: float, only: list[str]) -> None:
    start = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    this, module = [sys.executable, __file__], [sys.executable, "-m"]
    recipes = {"ptb": [ptb, "awd-lstm-mos-ptb"], "wt2": [wt2, "awd-lstm-mos-wt2"]}
    once = [*module, "recurlm.bench.heads", "--once"]
    first = {  # what compiles most, no kernel twice
        "smoke-tied": [*this, "smoke", "tied", ptb],
        **{f"quick-{name}": [*this, "steps", *given, "--quick"] for name, given in recipes.items()},
        "quick-mixture": [*module, "recurlm.bench.mixture", "--once"],
        "quick-adaptive": [*once, "adaptive"],
        "quick-tied-adaptive": [*once, "tied-adaptive"],
        "quick-full": [*once, "tied", "torch"],
    }
    then = {f"smoke-{head}": [*this, "smoke", head, ptb] for head in HEADS if head != "tied"}
    if only:
        first, then = {name: command for name, command in first.items() if name.startswith("quick")}, {}
        first |= {f"smoke-{head}": [*this, "smoke", head, ptb] for head in ("mixture", "adaptive")}
    for commands, most in ((first, 50), (then, 35)):
        begun = time.perf_counter()
        running = {name: _begin(command, out / f"{name}.txt") for name, command in commands.items()}
        for name, process in running.items():
            _end(process, name, begun + most)
        print(f"compiled and checked until {time.perf_counter() - start:.0f} s", flush=True)
        for name in commands:
            print(_last_line(out / f"{name}.txt"), flush=True)
    again = [
        "hierarchical",
        "hierarchical, balanced",
        "adaptive",
        "adaptive, published cuts",
        "tied-adaptive, published cuts",
    ]
    alone = {
        "mixture": ([*module, "recurlm.bench.mixture"], 30),
        "heads": ([*module, "recurlm.bench.heads", str(out / "heads.svg")], 90),
        "heads-again": ([*module, "recurlm.bench.heads", "--only", *again], 30),
        "cross-entropy": ([*module, "recurlm.bench.cross_entropy"], 20),
        "steps-ptb": ([*this, "steps", *recipes["ptb"]], 25),
        "steps-wt2": ([*this, "steps", *recipes["wt2"]], 25),
        "mixture-sweep": ([*module, "recurlm.bench.mixture", "--sweep"], 60),
        "mixture-profile": ([*module, "recurlm.bench.mixture", "--profile"], 15),
        "heads-tiles": ([*module, "recurlm.bench.heads", "--tiles"], 40),
        "heads-profile": ([*module, "recurlm.bench.heads", "--profile"], 15),
    }
    for name in only or alone:
        command, most = alone[name]
        begun = time.perf_counter()
        _end(_begin(command, out / f"{name}.txt"), name, min(begun + most, start + seconds))
        print(f"== {name}, {time.perf_counter() - begun:.0f} s\n{(out / f'{name}.txt').read_text()}", flush=True)


TRAINED = {
    "ptb": ("tied", "softmax", "hierarchical, huffman", "mixture of 15, tied"),  # adaptive ones have no tails there
    "wt2": ("tied", "softmax", "adaptive", "hierarchical, huffman"),
}


def trained(out: Path, data: str, kind: str, seconds: float) -> None:
    """The published QRNN with some heads and the published LSTM tied and not, all for the same time, in about `seconds`."""
    start, out, heads = time.perf_counter(), out / f"heads-{kind}", TRAINED[kind]
    out.mkdir(parents=True, exist_ok=True)
    this = [sys.executable, str(Path(__file__).with_name("heads.py")), "run", data]
    qrnn, lstm = ["--recipe", f"awd-qrnn-{kind}", "--only"], ["--recipe", f"awd-lstm-{kind}", "--only"]
    quick = {
        f"quick-{n}": [*this, str(out / "quick.jsonl"), "--seconds", "0", *qrnn, head] for n, head in enumerate(heads)
    }
    quick["quick-lstm"] = [*this, str(out / "quick.jsonl"), "--seconds", "0", *lstm, "tied"]
    running = {name: _begin(command, out / f"{name}.txt") for name, command in quick.items()}
    for name, process in running.items():
        _end(process, name, start + 45)
    left = seconds - (time.perf_counter() - start)
    print(f"compiled in {seconds - left:.0f} s", flush=True)
    each = (left - 2 * 10 - 3 * (len(heads) + 2)) / (len(heads) + 2)  # two processes; beginnings and validations
    for name, chosen in (("qrnn", [*qrnn, *heads]), ("lstm", [*lstm, "tied", "softmax"])):
        command = [*this, str(out / f"{name}.jsonl"), "--seconds", f"{each:.1f}", *chosen]
        _end(_begin(command, out / f"{name}.txt"), name, start + 1.15 * seconds)
        print((out / f"{name}.txt").read_text(), flush=True)
    files = [str(file) for file in (out / "qrnn.jsonl", out / "lstm.jsonl") if file.exists()]
    subprocess.run([*this[:2], "report", str(out / "quality.svg"), *files], check=False)


def _last_line(log: Path) -> str:
    lines = log.read_text().strip().splitlines()
    return f"{log.stem}: {lines[-1] if lines else 'nothing'}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    one = verbs.add_parser("all")
    one.add_argument("out", type=Path)
    one.add_argument("--ptb", default="ptb")
    one.add_argument("--wt2", default="wikitext-2")
    one.add_argument("--seconds", type=float, default=170)
    one.add_argument("--only", nargs="*", default=[])
    four = verbs.add_parser("train")
    four.add_argument("out", type=Path)
    four.add_argument("data")
    four.add_argument("kind", choices=["ptb", "wt2"])
    four.add_argument("--seconds", type=float, default=200)
    two = verbs.add_parser("smoke")
    two.add_argument("head", choices=list(HEADS))
    two.add_argument("data")
    three = verbs.add_parser("steps")
    three.add_argument("data")
    three.add_argument("recipe")
    three.add_argument("--quick", action="store_true")
    given = parser.parse_args()
    if given.verb == "all":
        everything(given.out, given.ptb, given.wt2, given.seconds, given.only)
    elif given.verb == "train":
        trained(given.out, given.data, given.kind, given.seconds)
    elif given.verb == "smoke":
        smoke(given.head, given.data)
    else:
        steps(given.data, given.recipe, given.quick)


if __name__ == "__main__":
    main()
