"""Whether a model can be trained in the memory there is, asked before any of it is taken."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from recurlm.config import Config, stage, stage_count
from recurlm.errors import RunError
from recurlm.model import precision
from recurlm.model.neural import NeuralModel
from recurlm.training.snapshot import state_shapes


def check(config: Config, vocab_size: int) -> None:
    """None; RunError when weights, gradients and optimiser state alone are more than this machine has free.

    That is the least that a step holds: activations come on top, so what passes here may still be too large.
    """
    with torch.device("meta"):
        parameters = list(NeuralModel(config.model, vocab_size, torch.Generator("cpu")).parameters())
    count = sum(p.numel() for p in parameters)
    states = [state_shapes(stage(config, number), parameters) for number in range(stage_count(config))]
    state = max(sum(math.prod(size) for shapes in one for size in shapes.values()) for one in states)
    needed, free = 4 * (2 * count + state), available(precision.resolve_device(config.train.device))
    if needed > free:
        raise RunError(
            f"The model has {count:,} parameters: with their gradients and {config.optimizer.name}'s state they need "
            f"{needed / 1e9:,.1f} GB, but {free / 1e9:,.1f} GB are free; lower the sizes in [model] or the vocabulary."
        )


def available(device: torch.device) -> float:
    """Bytes that a process could still get on the device; infinity when the system does not say.

    On the CPU: the kernel's MemAvailable and free swap, and at most what the process's control group allows.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = [line.split() for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines()]
        sizes = {words[0]: 1024 * int(words[1]) for words in lines}
        free: float = sizes["MemAvailable:"] + sizes["SwapFree:"]
    except (OSError, LookupError, ValueError):
        return math.inf
    for name in ("memory.max", "memory/memory.limit_in_bytes"):  # version 2, version 1
        try:
            free = min(free, int(Path("/sys/fs/cgroup", name).read_text(encoding="ascii")))
        except (OSError, ValueError):
            continue
    return free
