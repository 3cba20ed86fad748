"""What a run shows of its model while it trains: the best weights as a model's folder, and a sample of text."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from recurlm import files
from recurlm.config import Config
from recurlm.errors import RunError
from recurlm.inference.generate import Sampling, sample_ids
from recurlm.model import directory
from recurlm.model.neural import NeuralModel
from recurlm.text.store import Store
from recurlm.text.tokenizers import Tokenizer
from recurlm.training import objective
from recurlm.training.card import model_card


class Best(NamedTuple):
    """The best weights so far, and where they were measured."""

    loss: float
    step: int
    weights: dict[str, Tensor]
    stage: int


def publish(
    folder: Path, best: Best, model: NeuralModel, store: Store, tokenizer: Tokenizer, config: Config, stages: int,
    made: dict[str, Any],
) -> None:  # fmt: skip
    """Writes the weights as the run directory's model, with its card; RunError when one of them is not finite."""
    if bad := objective.first_nonfinite(best.weights):
        raise RunError(f"Step {best.step}: the weight {bad} is not finite, so no model was saved; resume from before.")
    facts = {
        "parameters": sum(p.numel() for p in best.weights.values()), "step": best.step,
        "loss_nats": best.loss if math.isfinite(best.loss) else None,
        "loss_split": "valid" if "valid" in store.splits else "train", "batching": config.data.batching,
    }  # fmt: skip
    if stages > 1:
        facts |= {"stage": best.stage + 1, "stages": stages}
    directory.write(folder, model, best.weights, tokenizer.to_json(), facts)
    with contextlib.suppress(OSError):  # for people, and written anew with the next model
        files.write_atomic(folder / "README.md", model_card(config, store, facts, made))


def sample(model: NeuralModel, tokenizer: Tokenizer, prompt: str, seed: int, count: int = 60) -> str:
    """A short text from the weights as they are."""
    order = -1 if model.backward else 1
    ids = tokenizer.encode_prefix(prompt).tolist()[::order]
    generator = torch.Generator().manual_seed(seed)
    forbidden = [] if tokenizer.unk_id is None else [tokenizer.unk_id]
    start = [tokenizer.boundary_id, *ids]
    drawn = list(sample_ids(model, start, count, Sampling(temperature=0.8), generator, forbidden))
    return tokenizer.decode((ids + drawn)[::order])
