"""What of a configuration can be found wrong before any text is read."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torch import nn

from recurlm.config import Config, stage
from recurlm.errors import ConfigError, lookup
from recurlm.model import precision
from recurlm.model.heads import HEADS
from recurlm.model.heads.base import Use
from recurlm.model.layers import LAYERS
from recurlm.model.neural import NeuralModel, layer_sizes
from recurlm.text.store import Store
from recurlm.text.tokenizers import TOKENIZERS
from recurlm.training.averaging import AVERAGING
from recurlm.training.optimizers import OPTIMIZERS
from recurlm.training.schedules import SCHEDULES


def check_settings(config: Config) -> None:
    """None; ConfigError for names and sizes that cannot work, in any stage, found before any text is read."""
    for number in range(1 + len(config.stages)):
        try:
            _check(stage(config, number))
        except ConfigError as error:
            raise ConfigError(f"Stage {number + 1}: {error}" if number else str(error)) from None


def _check(config: Config) -> None:
    precision.resolve_device(config.train.device)
    lookup(TOKENIZERS, config.tokenizer.kind, "tokenizer.kind")
    lookup(SCHEDULES, config.schedule.name, "schedule.name")
    lookup(AVERAGING, config.averaging.name, "averaging.name")
    lookup(OPTIMIZERS, config.optimizer.name, "optimizer.name")([nn.Parameter(torch.zeros(1))], config.optimizer)
    if config.data.batching != "stream" and config.data.counting != "exact":
        raise ConfigError("data.counting = 'published' is a rule for one stream; it needs data.batching = 'stream'.")
    if config.data.batching != "stream" and (config.data.random_offset or config.data.partial_shuffle):
        raise ConfigError(
            "data.random_offset and data.partial_shuffle move streams; they need data.batching = 'stream'."
        )
    schedule = config.schedule
    if schedule.name == "milestones" and not (schedule.milestones or schedule.milestone_shares):
        raise ConfigError(
            "schedule.name = 'milestones' needs schedule.milestones (epochs) or schedule.milestone_shares, such as "
            "[0.5, 0.75]."
        )
    layer = lookup(LAYERS, config.model.layer, "model.layer")
    if config.dropout.recurrent and not layer.has_recurrent_product:
        raise ConfigError(
            f"dropout.recurrent = {config.dropout.recurrent}: a {config.model.layer} layer has no hidden-to-hidden "
            "product to drop h from; take dropout.weight or model.zoneout."
        )
    with torch.device("meta"):
        NeuralModel(config.model, max(1, min(sum(config.model.code_lengths), 1 << 24)), torch.Generator("cpu"))


COUNTED = 1 << 22  # ids at once


def settle(config: Config, store: Store) -> tuple[Config, str]:
    """(the Config with what its head chooses for this text and device written out, what it chose or '')."""

    def counts_V() -> np.ndarray:
        counts, ids = np.zeros(store.vocab_size, np.int64), store.ids("train")
        for first in range(0, len(ids), COUNTED):
            counts += np.bincount(ids[first : first + COUNTED], minlength=store.vocab_size)
        return counts

    head, data = lookup(HEADS, config.model.head, "model.head"), config.data
    use = Use(counts_V, data.batch_size * data.bptt, precision.resolve_device(config.train.device).type)
    model, note = head.settle(config.model, layer_sizes(config.model)[-1], use)
    return dataclasses.replace(config, model=model), note and f"{config.model.head} head: {note}"
