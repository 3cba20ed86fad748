"""All that decides how a run goes on, as tensors and plain values for a checkpoint, and back."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from recurlm.config import Config, from_dict, stage, stage_count, to_dict
from recurlm.errors import CheckpointError, ConfigError, DataError, RunError, lookup
from recurlm.protocol import State, map_state, state_leaves
from recurlm.text.store import Store
from recurlm.training import checkpoint, objective
from recurlm.training.averaging import Averaging
from recurlm.training.cursor import Cursor
from recurlm.training.optimizers import OPTIMIZERS


def pack(
    model: nn.Module, optimizer: torch.optim.Optimizer, averaging: Averaging, state: State, cursor: Cursor,
    best: dict[str, Tensor],
) -> tuple[dict[str, Tensor], dict[str, Any]]:  # fmt: skip
    """(tensors, values): weights, optimiser, averages, carried state, cursor; RunError when any of them is not finite.

    `best` are the best weights where a later stage may start from them.
    """
    named = dict(model.named_parameters())
    mean, mean_values = averaging.state()
    tensors = {f"model.{name}": p.detach() for name, p in named.items()}
    tensors |= {f"optimizer.{name}": t for name, t in checkpoint.flatten_optimizer(optimizer).items()}
    tensors |= {f"averaging.{name}": t for name, t in mean.items()}
    tensors |= {f"best.{name}": t for name, t in best.items()}
    # Leaves may be one tensor seen twice (zeros at an epoch's start) or parts of a larger one.
    tensors |= {f"state.{i}": t.clone() for i, t in enumerate(state_leaves(state))}
    if bad := objective.first_nonfinite(tensors):
        what = f"weight {bad.removeprefix('model.')}" if bad.startswith("model.") else f"tensor {bad}"
        raise RunError(f"Step {cursor.step}: the {what} is not finite, so nothing was saved; resume from before.")
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
) -> tuple[State, dict[str, Tensor]]:
    """(state, best weights or none) of the checkpoint; puts its weights, optimiser and averages in place.

    `config` is that of the checkpoint's stage. An optimiser or averaging that was not the one in use starts fresh.
    """

    def part(prefix: str) -> dict[str, Tensor]:
        return {k.removeprefix(prefix): t.to(device) for k, t in saved.tensors.items() if k.startswith(prefix)}

    parameters = list(model.parameters())
    try:
        before = stage(from_dict(saved.values["config"]), cursor(saved).stage)
        model.load_state_dict(part("model."))
        if before.optimizer.name == config.optimizer.name:
            checkpoint.restore_optimizer(optimizer, _fitting(part("optimizer."), state_shapes(config, parameters)))
        if before.averaging.name == config.averaging.name:
            averaging.restore(part("averaging."), saved.values["averaging"])
            mean = averaging.weights()
            if mean is not None and [m.shape for m in mean] != [p.shape for p in parameters]:
                raise ValueError("the averaged weights have other shapes than the weights")
        leaves, order = part("state."), iter(range(len(saved.tensors)))
        ragged = config.data.batching != "stream"  # the last of the sequences are fewer
        state = map_state(lambda old: _same_shape(leaves[str(next(order))], old, ragged), state)
        best = part("best.")
        if best and {k: t.shape for k, t in best.items()} != {k: p.shape for k, p in model.named_parameters()}:
            raise ValueError("the best weights have other names or shapes than the weights")
    except (LookupError, RuntimeError, ValueError, TypeError, AttributeError, ConfigError) as error:
        raise CheckpointError(f"step {saved.step}: the checkpoint does not fit this configuration ({error}).") from None
    return state, best


def state_shapes(config: Config, parameters: list[nn.Parameter]) -> list[dict[str, torch.Size]]:
    """For each parameter the tensors that the optimiser keeps of it, and their shapes, as seen after one step of a small one."""
    probe = nn.Parameter(torch.zeros(2, 3))
    optimizer = lookup(OPTIMIZERS, config.optimizer.name, "optimizer.name")([probe], config.optimizer)
    probe.grad = torch.zeros_like(probe)
    optimizer.step()
    kept = {name: t.shape for name, t in optimizer.state[probe].items() if isinstance(t, Tensor)}
    return [{name: p.shape if size == probe.shape else size for name, size in kept.items()} for p in parameters]


def _fitting(tensors: dict[str, Tensor], shapes: list[dict[str, torch.Size]]) -> dict[str, Tensor]:
    """The optimiser's tensors, all with the shape that they must have; ValueError otherwise.

    A fused optimiser trusts the sizes of its state, so a wrong one would be read past its end. What the optimiser
    does not keep with its present settings (a momentum that is now 0) is left out.
    """
    names: dict[int, set[str]] = {}
    for key in tensors:
        index, _, name = key.partition(".")
        if not index.isdecimal() or int(index) >= len(shapes):
            raise ValueError(f"there is no parameter for optimizer.{key}")
        names.setdefault(int(index), set()).add(name)
    fitting = {}
    for index, found in names.items():
        for name, shape in shapes[index].items():
            value = tensors.get(f"{index}.{name}") if name in found else None
            if value is None and found & shapes[index].keys():
                raise ValueError(f"optimizer.{index}.{name} is missing")
            if value is not None and (value.shape != shape or value.dtype != torch.float32):
                raise ValueError(f"optimizer.{index}.{name} is {tuple(value.shape)}, expected {tuple(shape)}")
            if value is not None:
                fitting[f"{index}.{name}"] = value
    return fitting


def _same_shape(saved: Tensor, old: Tensor, ragged: bool) -> Tensor:
    rows = saved.shape[0] if saved.dim() else 0
    if saved.shape[1:] != old.shape[1:] or not ((1 <= rows < len(old) and ragged) or rows == len(old)):
        raise ValueError(f"a carried state is {tuple(saved.shape)}, expected {tuple(old.shape)}")
    return saved.to(old.dtype)


def cursor(saved: checkpoint.Checkpoint) -> Cursor:
    """The checkpoint's cursor, its values possible ones; CheckpointError otherwise."""
    try:
        values: dict[str, Any] = saved.values["cursor"]
        best: Any = math.inf if values["best"] is None else values["best"]
        found = Cursor(**values | {"best": best})
        stages = 1 + len(saved.values["config"].get("stages", []))
        whole = (found.step, found.epoch, found.position, found.epoch_targets, found.stage, found.stage_step,
                 found.stage_epoch)  # fmt: skip
        real = [found.epoch_nats, found.best, found.seconds, *found.losses]
        if any(type(n) is not int or not 0 <= n < 2**62 for n in whole) or found.step != saved.step:
            raise ValueError("its position is none that a run could have")
        if found.stage >= stages or found.stage_step > found.step or found.stage_epoch > found.epoch:
            raise ValueError("its stage is none that the run could be in")
        if any(type(x) not in (int, float) or math.isnan(x) for x in real):
            raise ValueError("its losses are not numbers")
    except (LookupError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"step {saved.step}: the checkpoint has no sound position ({error}).") from None
    return found


def check(saved: checkpoint.Checkpoint, config: Config, store: Store) -> None:
    """None when the run may go on with these settings and this text; ConfigError or DataError naming what changed."""
    try:
        before = from_dict(saved.values["config"])  # a newer setting had its default
    except (KeyError, ConfigError) as error:
        raise CheckpointError(f"step {saved.step}: the checkpoint's settings cannot be read ({error}).") from None
    prepared = store.path.resolve() == Path(config.data.path).resolve()
    if saved.values.get("store") != store.hash:
        raise DataError(
            f"{store.path}: the text or tokenizer changed since step {saved.step}; resume with the data "
            "that the run was started with, or start a new run with another -o."
        )
    at = cursor(saved).stage
    if at >= stage_count(config):
        raise ConfigError(f"The run is in stage {at + 1}, but these settings have {stage_count(config)}.")
    for number in range(at + 1):
        then, now = to_dict(stage(before, number)), to_dict(stage(config, number))
        for section in ("data", "tokenizer", "model"):
            for key, value in then[section].items():
                moved = prepared and (section, key) == (
                    "data",
                    "path",
                )  # a prepared store may move: its hash was compared
                if now[section].get(key) != value and not moved:
                    place = f"stages.{number + 1}." if number else ""
                    raise ConfigError(
                        f"{place}{section}.{key} is {now[section].get(key)!r}, but the run was started with {value!r}; "
                        "use that, or start a new run with another -o."
                    )


def changed(saved: checkpoint.Checkpoint, config: Config) -> list[str]:
    """What the settings of this run change of the checkpoint's, as 'section.key: before -> now'."""
    before, now = to_dict(from_dict(saved.values["config"])), to_dict(config)  # a newer setting had its default
    stages = before.pop("stages"), now.pop("stages")
    return [
        f"{section}.{key}: {value} -> {now[section][key]}"
        for section, table in before.items()
        for key, value in table.items()
        if now[section][key] != value
    ] + ([f"stages: {stages[0]} -> {stages[1]}"] if stages[0] != stages[1] else [])
