"""`recurlm demo`: a minute of Shakespeare on the CPU, no network."""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from recurlm.cli.common import Json, note, print_json, program
from recurlm.errors import UserError

FAMOUS = "To be, or not to be: that is the question:"
SCRAMBLED = "question: be, the that is not to or be: To"
MARK = "demo.json"
TRAINING_SECONDS = 63.0
LEGS = (0.2, 0.3)  # of that time, before the last leg
HARD_LIMIT_SECONDS = 71.0


def _config() -> Any:
    """A character model that learns fast: one wide layer, many small steps, a learning rate that falls to zero."""
    from recurlm.config import Config, from_dict
    from recurlm.model.precision import cpu_multiplies_bf16

    bf16 = cpu_multiplies_bf16()
    return from_dict(
        {
            "data": {"path": "shakespeare", "batch_size": 32, "bptt": 32, "rescale_lr": False, "eval_batch_size": 64},
            "tokenizer": {"kind": "char", "byte_fallback": False},  # 256 rows fewer to learn; the plays need none
            "model": {
                "layer": "lstm", "head": "softmax", "embedding_size": 64, "num_layers": 1,
                "hidden_size": 512 if bf16 else 384,
            },
            "dropout": {"input": 0, "hidden": 0, "output": 0, "weight": 0},
            "optimizer": {"lr": 5e-3, "clip": 1.0},
            "schedule": {"name": "linear", "warmup_steps": 50},
            "train": {
                "epochs": 1000, "max_steps": 4000, "eval_every": 10**9, "device": "cpu", "dtype": "bf16" if bf16 else "fp32",
                "tensorboard": False, "log_every": 100, "checkpoint_seconds": 1e6,
            },
        },
        Config(),
    )  # fmt: skip


def _train_in(config: Any, out: Path, seconds: float) -> Any:
    """The Result of training for about that long: in legs, each of which sets the last step by the pace of the one before.

    A first leg alone would be misled by whatever else the machine does in its first seconds.
    """
    from recurlm import api
    from recurlm.config import apply_assignments

    steps, spent = 0, 0.0
    for share in LEGS:
        leg = share * seconds
        result = api.train(config, out, resume=steps > 0, max_seconds=leg)
        if result.signal or result.finished:
            return result
        pace, steps, spent = (result.step - steps) / leg, result.step, spent + leg
        config = apply_assignments(config, [f"train.max_steps={steps + max(1, int((seconds - spent) * pace))}"])
    return api.train(config, out, resume=True, max_seconds=HARD_LIMIT_SECONDS - spent)


def _baselines(store: Any) -> dict[str, float]:
    """Bits per character of bzip2 -9 over the whole corpus, and the entropy of the test text's characters."""
    import bz2

    import numpy as np

    from recurlm.text.plays import splits

    text = "".join(splits().values()).encode()
    counts = np.bincount(store.ids("test"))
    shares = counts[counts > 0] / counts.sum()
    return {
        "bpc_bzip2": 8 * len(bz2.compress(text, 9)) / len(text.decode()),
        "bpc_unigram": float(-(shares * np.log2(shares)).sum()),
    }


def _word_bars(model: Any, line: str) -> list[str]:
    """One row a word: its surprisal in bits (the sum of its characters'), and a bar."""
    scored = model.score(line, end=False)
    rows, at = [], 0
    for word in line.split(" "):
        bits = sum(scored.surprisals[at : at + len(word)])
        at += len(word) + 1  # and the space
        rows.append(f"  {word:<10} {bits:5.1f}  {'█' * round(bits)}")
    rows.append(f"  {'in all':<10} {scored.total:5.1f} bits, {scored.total / len(line):.2f} a character")
    return rows


def demo(
    out: Annotated[Path, typer.Option("-o", "--out", help="Run directory; an earlier demo there is replaced.")] = Path(
        "runs/demo"
    ),
    as_json: Json = False,
) -> None:
    """Train a small character model on Shakespeare, on the CPU, and show what it can do (about two minutes)."""
    started = time.perf_counter()
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: a file; choose a folder with -o.")
    if out.exists() and any(out.iterdir()) and not (out / MARK).is_file():
        raise UserError(f"{out} holds something else than a demo; choose another folder with -o.")
    note("Reading Shakespeare's 38 plays; four of them are kept for the test, two to watch.")
    from recurlm import api, files
    from recurlm.config import apply_assignments
    from recurlm.text.store import prepare

    config = _config()
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    files.write_atomic(out / MARK, "{}\n")
    store = prepare("shakespeare", config.tokenizer, out / "store")
    config = apply_assignments(config, [f'data.path="{(out / "store").resolve()}"'])
    note(f"Training for about {TRAINING_SECONDS:.0f} s on {store.info['train'].characters:,} characters.")
    result = _train_in(config, out, TRAINING_SECONDS)
    if result.signal:
        raise typer.Exit(128 + result.signal)
    model = api.load(out, device="cpu", dtype=config.train.dtype)
    measured = api.evaluate(model, data=str(out / "store"), split="test", batch_size=64, with_ranks=False)
    baselines = _baselines(store)
    facts = {
        "bpc": measured["bpc"], **baselines, "seconds": time.perf_counter() - started, "steps": result.step,
        "parameters": model.parameters, "dtype": config.train.dtype, "run": str(out),
    }  # fmt: skip
    files.write_atomic(out / MARK, files.to_json(facts))
    if as_json:
        print_json(facts)
        return
    rows = [
        ("this model", facts["bpc"]),
        ("bzip2 -9, whole corpus", facts["bpc_bzip2"]),
        ("single characters", facts["bpc_unigram"]),
    ]
    print("\nBits per character on four unseen plays (lower is better)")
    for name, value in rows:
        print(f"  {name:<24}{value:6.3f}  {'█' * round(8 * value)}")
    print("\nA sample, temperature 0.7")
    sample = model.generate("HAMLET:\n", tokens=350, temperature=0.7, seed=1)
    print("\n".join(f"  {line}" for line in sample.splitlines()))
    print("\nSurprisal in bits of a line that it never read, and of the same words scrambled")
    print("\n".join([*_word_bars(model, FAMOUS), "", *_word_bars(model, SCRAMBLED)]))
    print(
        f"\n{facts['parameters']:,} parameters, {result.step:,} steps, {time.perf_counter() - started:.0f} s in all. Try next:"
    )
    name = program()
    print(f"  {name} generate {out} --prompt 'ROMEO:' --temperature 0.7")
    print(f"  echo 'the quality of mercy is not strained' | {name} score {out}")
    print(f"  {name} train --data YOUR_TEXT.txt -o runs/mine")
    sys.stdout.flush()
