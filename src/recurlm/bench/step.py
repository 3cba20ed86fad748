"""The training step of published models as CUDA graphs, beside the same step launched operation by operation.

    python -m recurlm.bench.step

The text is random words with the frequencies of Zipf's law and the vocabulary of the named data set: a step's time does not
depend on what the words are. The limit adds what the arithmetic needs (6 operations a weight of a matrix and token, at
the rate of a large product in the compute type) and what the update must move (16 bytes a weight, at the bandwidth
of a copy).
"""

from __future__ import annotations

import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

from recurlm.bench.timing import Row, copy_bandwidth, duration, gemm_rate
from recurlm.config import Config, apply_assignments, load_recipe
from recurlm.model import precision
from recurlm.text.store import Store, prepare
from recurlm.training.trainer import Trainer

CASES = (  # recipe, words, types, target
    ("awd-qrnn-ptb", 300_000, 10_000, "bf16", "<= 0.9 ms"),
    ("awd-qrnn-ptb", 300_000, 10_000, "tf32", ""),
    ("awd-lstm-ptb", 300_000, 10_000, "bf16", "<= 3.1 ms"),
    ("awd-lstm-ptb", 300_000, 10_000, "tf32", ""),
    ("awd-lstm-wt2", 900_000, 33_278, "bf16", "<= 7 ms"),
)
STEPS, WARM = 60, 12
SPECIAL = 2  # types that a word tokenizer adds: the line's end and the unknown word


def text(folder: Path, words: int, types: int) -> Store:
    """A store of random words, every type at least once, in lines of 20; with the special tokens, `types` in all."""
    draw = np.random.default_rng(1)
    types -= SPECIAL
    shares = 1 / np.arange(1, types + 1)
    ids = np.concatenate((np.arange(types), draw.choice(types, words - types, p=shares / shares.sum())))
    source = folder / "words.txt"
    source.write_text("\n".join(" ".join(f"w{i}" for i in line) for line in np.array_split(ids, len(ids) // 20)) + "\n")
    return prepare(source, apply_assignments(Config(), ["tokenizer.kind=word"]).tokenizer, folder / "store")


def microseconds(recipe: str, store: Store, *settings: str) -> tuple[float, Trainer]:
    """(microseconds of a training step of full windows, its Trainer)."""
    whole = ("data.bptt_spread=0", "data.bptt_full_share=1", "train.tensorboard=false", *settings)
    with tempfile.TemporaryDirectory() as scratch:
        trainer = Trainer(apply_assignments(load_recipe(recipe), list(whole)), store, Path(scratch), quiet=True)
        with precision.applied(trainer.precision):
            spent = []
            for steps in (WARM, STEPS, STEPS, STEPS):
                torch.cuda.synchronize()
                start = time.perf_counter()
                for _ in range(steps):
                    trainer.advance()
                    if len(trainer.waiting) >= trainer.stepper.lag:
                        trainer.read()
                trainer.read()
                torch.cuda.synchronize()
                spent.append(1e6 * (time.perf_counter() - start) / steps)
    return sorted(spent[1:])[1], trainer


def limit(trainer: Trainer) -> float:
    """Microseconds that the hardware needs for a step, as the module's first lines say."""
    data, how = trainer.config.data, trainer.precision
    matrices = sum(p.numel() for p in trainer.parameters if p.dim() == 2)
    with precision.applied(how):
        rate = gemm_rate(how.dtype)
    everything = sum(p.numel() for p in trainer.parameters)
    return 1e6 * (6 * data.batch_size * data.bptt * matrices / rate + 16 * everything / copy_bandwidth())


def rows() -> list[dict[str, Any]]:
    """A training step all in, captured, beside the same step not captured."""
    found, stores = [], {}
    with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for recipe, words, types, dtype, target in CASES:
            if types not in stores:
                folder = Path(scratch) / str(types)
                folder.mkdir()
                stores[types] = text(folder, words, types)
            ours, trainer = microseconds(recipe, stores[types], f"train.dtype={dtype}")
            plain, _ = microseconds(recipe, stores[types], f"train.dtype={dtype}", "train.capture=false")
            data = trainer.config.data
            found.append(
                Row(measure=f"training step, {recipe}", shape=f"{data.batch_size} x {data.bptt}, {dtype}", ours_us=ours,
                    peer_us=plain, peer="not captured", limit_us=limit(trainer), target=target).as_dict()
            )  # fmt: skip
    return found


if __name__ == "__main__":
    for row in rows():
        print(row["measure"], row["shape"], duration(row["ours_us"]), duration(row["peer_us"]), f"{row['share']:.0%}")
