"""Small texts and configurations for every test."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from recurlm.config import Config, apply_assignments

SHARED = Path(__file__).parents[2] / "shared" / "data"

NOUNS = [
    "tea",
    "coffee",
    "water",
    "bread",
    "river",
    "stone",
    "bird",
    "child",
    "king",
    "road",
    "letter",
    "winter",
    "garden",
    "engine",
    "song",
]
VERBS = ["drinks", "sees", "finds", "loves", "leaves", "follows", "breaks", "carries", "hears", "paints"]


def small_text(lines: int, seed: int = 1) -> str:
    """Sentences with a little grammar to learn, the same for the same seed."""
    x, out = seed, []

    def draw(words: list[str]) -> str:
        nonlocal x
        x = (x * 1103515245 + 12345) % 2**31
        return words[(x >> 8) % len(words)]

    for _ in range(lines):
        out.append(f"the {draw(NOUNS)} {draw(VERBS)} a {draw(NOUNS)} and the {draw(NOUNS)} {draw(VERBS)} it .")
    return "\n".join(out) + "\n"


TINY = (
    "data.batch_size=4", "data.eval_batch_size=3", "data.bptt=12", "data.bptt_spread=2", "data.bptt_step=1",
    "data.bptt_full_share=0.9",
    "tokenizer.kind=word", "model.embedding_size=12", "model.hidden_size=16", "model.num_layers=2", "model.windows=[3,2]",
    "dropout.embedding=0.1", "dropout.input=0.1", "dropout.hidden=0.1", "dropout.output=0.1", "dropout.weight=0.2",
    "objective.ar=2", "objective.tar=1", "optimizer.lr=0.01", "train.tensorboard=false", "train.log_every=1",
    "train.device=cpu",
)  # fmt: skip


def tiny_config(*settings: str) -> Config:
    """A configuration that trains in milliseconds a step, with every dropout and both regularisers on."""
    return apply_assignments(Config(), [*TINY, *settings])


FULL = os.environ.get("RECURLM_CHAOS") == "1"


def counts(ci: int, full: int) -> int:
    """How often a chaos test repeats: `ci` times, or `full` times under `make chaos`."""
    return full if FULL else ci


def record(name: str, **figures: object) -> None:
    """Notes what a chaos test measured: one JSON line in the file that RECURLM_CHAOS_LOG names, if any."""
    if path := os.environ.get("RECURLM_CHAOS_LOG"):
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"test": name, **figures}) + "\n")


# It computes what an assertion against overflow needs and then makes none (`debug` is off): two fifths of its time.
WITHOUT_IDLE_CHECKS = (
    "from triton.runtime import interpreter as i;"
    "i.interpreter_builder.options = i.InterpreterOptions(sanitize_overflow=False)"
)


def in_the_interpreter(module: str, call: str) -> None:
    """Calls `module.call` of a folder of tests in a process of its own, for TRITON_INTERPRET is read at import.

    Without a GPU only: where there is one, the compiled kernel is tested instead.
    """
    pytest.importorskip("triton", reason="triton is not installed")
    if torch.cuda.is_available():
        pytest.skip("a GPU is here: the compiled kernel is tested instead")
    folder, name = module.rsplit("/", 1)
    path = f"import sys; sys.path[:0] = ['tests', 'tests/{folder}']"
    code = f"{WITHOUT_IDLE_CHECKS}; {path}; import {name} as t; t.{call}; print('ok')"
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "ok", done.stderr
