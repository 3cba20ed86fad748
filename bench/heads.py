"""The same small model with every output layer, each trained for the same time: parameters, speed, perplexity.

    python bench/heads.py run DATA OUT.jsonl --seconds 120 [--recipe NAME] [--only NAME ...] [--set section.key=value ...]
    python bench/heads.py report PICTURE.svg FILE.jsonl ...

One run after the other. The picture shows perplexity over time spent, the table what came of it; nothing is measured on
test. Tied and untied heads are among them, so this is also the comparison of tying. With --recipe the model is that recipe's
with another head, its windows all of one length and its weights a mean that forgets (docs/log.md); else it is a small one.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recurlm.config import Config
from recurlm.errors import RunError

if TYPE_CHECKING:
    from recurlm.text.store import Store

BASE = (
    "data.batch_size=20", "data.bptt=35", "tokenizer.kind=word", "tokenizer.vocab_splits=all", "model.layer=qrnn",
    "model.windows=[2]", "model.embedding_size=200", "model.hidden_sizes=[300,200]", "dropout.weight=0", "dropout.latent=0.1",
    "dropout.input=0.1", "dropout.hidden=0.1", "dropout.output=0.2", "optimizer.name=adam", "optimizer.lr=2e-3",
    "schedule.name=constant", "train.epochs=1000000", "train.tensorboard=false", "train.checkpoint_seconds=1e8",
    "train.log_every=1000000000", "train.dtype=auto",
)  # fmt: skip
OF_A_RECIPE = (  # its streams are moved instead of its windows; the mean from the first step on
    "data.bptt_spread=0", "data.bptt_full_share=1", "data.random_offset=true", "data.partial_shuffle=true",
    "averaging.name=tail", "averaging.start=0", "averaging.forget=3", "train.epochs=1000000", "train.tensorboard=false",
    "train.checkpoint_seconds=1e8", "train.log_every=1000000000", "train.dtype=bf16", "train.stages=1",
)  # fmt: skip
HEADS = {
    "softmax": ("model.head=softmax",),
    "tied": ("model.head=tied",),
    "adaptive": ("model.head=adaptive",),
    "tied-adaptive": ("model.head=tied-adaptive",),
    "hierarchical, huffman": ("model.head=hierarchical",),
    "hierarchical, balanced": ("model.head=hierarchical", "model.tree=balanced"),
    "mixture of 5, tied": ("model.head=mixture", "model.experts=5"),
    "mixture of 5, untied": ("model.head=mixture", "model.experts=5", "model.base=softmax"),
    "mixture of 5, tied-adaptive": ("model.head=mixture", "model.experts=5", "model.base=tied-adaptive"),
    "mixture of 15, tied": ("model.head=mixture", "model.experts=15", "dropout.latent=0.29"),
}
OTHER_RATES = {
    "hierarchical, huffman": 8,
    "hierarchical, balanced": 8,
}  # of SGD in a recipe: with 30 the nodes near the root diverge
POINTS = 5  # validations in a run, the last at its end; their time is not counted
VALID = 20_000  # tokens of valid, its first; with a recipe all


def run(data: str, out: Path, seconds: float, recipe: str, only: list[str], settings: list[str]) -> None:
    from recurlm.config import apply_assignments, load_recipe
    from recurlm.text.store import prepare

    base, given = (load_recipe(recipe), OF_A_RECIPE) if recipe else (Config(), BASE)
    config = apply_assignments(base, [*given, *settings])
    with tempfile.TemporaryDirectory() as scratch, out.open("a") as file:
        store = prepare(data, config.tokenizer, Path(scratch) / "store")
        for name in only or HEADS:
            try:
                rate = [f"optimizer.lr={OTHER_RATES[name]}"] if recipe and name in OTHER_RATES else []
                line = _trained(
                    apply_assignments(config, [*HEADS[name], *rate]),
                    store,
                    Path(scratch),
                    seconds,
                    None if recipe else VALID,
                )
            except Exception as error:  # the others are worth having
                print(f"{name}: {type(error).__name__}: {str(error)[:500]}", flush=True)
                continue
            if not seconds:  # all is compiled now
                continue
            about = {"data": Path(data).name, "head": name, "recipe": recipe, "settings": settings}
            notes = line.pop("notes")
            file.write(json.dumps(about | line) + "\n")
            file.flush()
            print(f"{name}: {line['steps']} steps, valid {line['curve'][-1][1]:.4f} nats", *notes, flush=True)


def _trained(config: Config, store: Store, folder: Path, seconds: float, most: int | None) -> dict[str, Any]:
    """What came of training for so many seconds; validations, of at most so many tokens, are not counted."""
    import torch

    from recurlm.evaluation.perplexity import mean_loss
    from recurlm.model import precision
    from recurlm.training.averaging import applied
    from recurlm.training.trainer import Trainer

    clock = time.perf_counter if torch.cuda.is_available() else time.process_time  # others may use the CPU too
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} thread(s)"
    trainer = Trainer(config, store, folder, quiet=True)
    valid, spent, curve = trainer.ids("valid")[:most], 0.0, []
    with precision.applied(trainer.precision):
        for _ in range(4):  # compiles, warms up and captures
            trainer.step()
        while spent < seconds:
            start, until = clock(), seconds / POINTS
            while (passed := clock() - start) < until:
                trainer.advance()
                if len(trainer.waiting) >= trainer.stepper.lag and (failure := trainer.read()[1]):
                    raise RunError(failure)
            trainer.read()
            spent += passed
            with torch.no_grad(), applied(trainer.averaging, trainer.parameters):
                curve.append((spent, mean_loss(trainer.model, valid, trainer.boundary, 10, "exact")))
    return {
        "device": card, "dtype": trainer.precision.name, "parameters": sum(p.numel() for p in trainer.parameters),
        "vocab_size": store.vocab_size, "step_ms": 1e3 * spent / trainer.cursor.step, "steps": trainer.cursor.step,
        "epochs": trainer.cursor.epoch + 1, "curve": curve, "cutoffs": trainer.config.model.cutoffs, "torch": torch.__version__,
        "commit": os.environ.get("RECURLM_COMMIT", ""), "notes": trainer.notes[1:],
    }  # fmt: skip


def report(picture: Path, names: list[str]) -> None:
    import math

    import matplotlib
    from matplotlib.figure import Figure

    lines = [json.loads(line) for name in names for line in Path(name).read_text().splitlines()]
    groups = sorted({(r["data"], r["device"], r.get("recipe", "")) for r in lines})
    figure = Figure(figsize=(6 * len(groups), 4.5), layout="constrained")
    for axes, group in zip(figure.subplots(1, len(groups), squeeze=False)[0], groups, strict=True):
        runs = [r for r in lines if (r["data"], r["device"], r.get("recipe", "")) == group]
        seconds = runs[0]["curve"][-1][0]
        print(
            f"\n{group[0]}, {runs[0]['vocab_size']:,} words, {group[2]} {group[1]}, {runs[0]['dtype']}, "
            f"{seconds:.0f} s of training each\n"
        )
        print("| head | parameters | a step | steps | valid perplexity |\n|---|---|---|---|---|")
        for r in runs:
            ppl = [math.exp(loss) for _, loss in r["curve"]]
            print(
                f"| {r['head']} | {r['parameters'] / 1e6:.2f} M | {r['step_ms']:.1f} ms | {r['steps']:,} | {ppl[-1]:.1f} |"
            )
            axes.plot([t for t, _ in r["curve"]], ppl, marker=".", label=r["head"])
        axes.set(
            xlabel="seconds of training",
            ylabel="valid perplexity",
            yscale="log",
            title=f"{group[0]}, {group[2] or group[1]}",
        )
        axes.grid(alpha=0.3, which="both")
        axes.legend(frameon=False, fontsize=8)
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "heads"}):
        figure.savefig(picture, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    one = verbs.add_parser("run")
    one.add_argument("data")
    one.add_argument("out", type=Path)
    one.add_argument("--seconds", type=float, default=120)
    one.add_argument("--recipe", default="")
    one.add_argument("--only", nargs="*", default=[], choices=list(HEADS))
    one.add_argument("--set", nargs="*", default=[])
    two = verbs.add_parser("report")
    two.add_argument("picture", type=Path)
    two.add_argument("files", nargs="+")
    given = parser.parse_args()
    if given.verb == "run":
        run(given.data, given.out, given.seconds, given.recipe, given.only, given.set)
    else:
        report(given.picture, given.files)


if __name__ == "__main__":
    main()
