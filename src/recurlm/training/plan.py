"""What a run would be, without making it."""

from __future__ import annotations

import math
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from recurlm.config import Config
from recurlm.model import precision
from recurlm.text.store import Store
from recurlm.training.trainer import Trainer


def plan(config: Config, store: Store) -> dict[str, Any]:
    """Parameters, tokens, steps, and memory and time measured over a few real steps in a temporary folder."""
    with tempfile.TemporaryDirectory() as scratch:
        trainer = Trainer(config, store, Path(scratch), quiet=True)
        seconds, tokens = [0.0], [0]
        with precision.applied(trainer.precision):
            trainer.step()  # the first compiles, allocates and warms up
            if not trainer.obstacle:  # a window length is slow the first time and when it is captured
                began = time.perf_counter()
                while time.perf_counter() - began < 5 and trainer.cursor.step < 300:
                    trainer.step()
            while len(seconds) < 2 or (len(seconds) < 20 and sum(seconds) < 3):
                start = time.perf_counter()
                tokens.append(trainer.step()["tokens"])
                seconds.append(time.perf_counter() - start)
        data, cuda = config.data, trainer.device.type == "cuda"
        steps = trainer.batches.steps_per_epoch(data)
        totals = []
        for number in range(trainer.stages):
            trainer.enter(number)
            train, each = trainer.config.train, trainer.batches.steps_per_epoch(trainer.config.data)
            totals.append(int(min(each * train.epochs, train.max_steps or math.inf)))
        total = sum(totals)
        step_seconds = sum(seconds) / sum(tokens) * store.info["train"].tokens / steps
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return {
            "parameters": sum(p.numel() for p in trainer.parameters),
            "vocab_size": store.vocab_size,
            "tokens": {name: info.tokens for name, info in store.info.items()},
            "steps_per_epoch": steps,
            "steps": total,
            **({"steps_of_stages": totals} if len(totals) > 1 else {}),
            "seconds_per_step": step_seconds,
            "seconds_estimated": total * step_seconds,
            "memory_bytes": torch.cuda.max_memory_reserved(trainer.device) if cuda else peak,
            "memory_rule": f"peak over {len(seconds)} real steps, {'GPU' if cuda else 'resident'} memory of this process",
            "device": str(trainer.device),
            "dtype": trainer.precision.name,
            "dtype_reason": trainer.precision.reason,
        }
