"""What of a configuration can be found wrong before any text is read."""

from __future__ import annotations

import torch
from torch import nn

from recurlm.config import Config, stage
from recurlm.errors import ConfigError, lookup
from recurlm.model import precision
from recurlm.model.layers import LAYERS
from recurlm.model.neural import NeuralModel
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
        NeuralModel(config.model, 1, torch.Generator("cpu"))
