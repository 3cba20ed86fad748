"""All that decides how a run goes on, as tensors and plain values for a checkpoint, and back."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from recurlm.config import Config, to_dict
from recurlm.errors import CheckpointError, ConfigError, DataError, RunError
from recurlm.protocol import State, map_state, state_leaves
from recurlm.text.store import Store
from recurlm.training import checkpoint, objective
from recurlm.training.averaging import Averaging
from recurlm.training.cursor import Cursor


def pack(
    model: nn.Module, optimizer: torch.optim.Optimizer, averaging: Averaging, state: State, cursor: Cursor
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, values): weights, optimiser, averages, carried state, cursor. RunError for a weight that is not finite."""
    named = dict(model.named_parameters())
    if bad := objective.first_nonfinite(dict(named)):
        raise RunError(f"Step {cursor.step}: the weight {bad} is not finite, so nothing was saved; resume from before.")
    mean, mean_values = averaging.state()
    tensors = {f"model.{name}": p.detach() for name, p in named.items()}
    tensors |= {f"optimizer.{name}": t for name, t in checkpoint.flatten_optimizer(optimizer).items()}
    tensors |= {f"averaging.{name}": t for name, t in mean.items()}
    # Leaves may be one tensor seen twice (zeros at an epoch's start) or parts of a larger one.
    tensors |= {f"state.{i}": t.clone() for i, t in enumerate(state_leaves(state))}
    values = asdict(cursor) | {"best": cursor.best if math.isfinite(cursor.best) else None}
    return tensors, {"cursor": values, "averaging": mean_values}


def unpack(
    saved: checkpoint.Checkpoint,
    config: Config,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    averaging: Averaging,
    state: State,
    device: torch.device,
) -> tuple[State, Cursor]:
    """(state, cursor) of the checkpoint; puts its weights, optimiser and averages in place.

    An optimiser or averaging that was not the one in use starts fresh.
    """
    before = saved.values["config"]

    def part(prefix: str) -> dict[str, Tensor]:
        return {k.removeprefix(prefix): t.to(device) for k, t in saved.tensors.items() if k.startswith(prefix)}

    try:
        model.load_state_dict(part("model."))
        if before["optimizer"]["name"] == config.optimizer.name:
            checkpoint.restore_optimizer(optimizer, part("optimizer."))
        if before["averaging"]["name"] == config.averaging.name:
            averaging.restore(part("averaging."), saved.values["averaging"])
        leaves, order = part("state."), iter(range(len(saved.tensors)))
        state = map_state(lambda old: leaves[str(next(order))].to(old.dtype), state)
        values: dict[str, Any] = saved.values["cursor"]
        best: Any = math.inf if values["best"] is None else values["best"]
        cursor = Cursor(**values | {"best": best})
    except (KeyError, RuntimeError, ValueError, TypeError) as error:
        raise CheckpointError(f"step {saved.step}: the checkpoint does not fit this configuration ({error}).") from None
    return state, cursor


def check(saved: checkpoint.Checkpoint, config: Config, store: Store) -> None:
    """None when the run may go on with these settings and this text; ConfigError or DataError naming what changed."""
    before, now = saved.values["config"], to_dict(config)
    prepared = store.path.resolve() == Path(config.data.path).resolve()
    if saved.values["store"] != store.hash:
        raise DataError(
            f"{store.path}: the text or tokenizer changed since step {saved.step}; resume with the data "
            "that the run was started with, or start a new run with another -o."
        )
    for section in ("data", "tokenizer", "model"):
        for key, value in {**to_dict(Config())[section], **before[section]}.items():  # a newer setting had its default
            moved = prepared and (section, key) == ("data", "path")  # a prepared store may move: its hash was compared
            if now[section].get(key) != value and not moved:
                raise ConfigError(
                    f"{section}.{key} is {now[section].get(key)!r}, but the run was started with {value!r}; "
                    "use that, or start a new run with another -o."
                )
