"""Where and in which arithmetic a model computes; weights are fp32 throughout."""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Iterator
from typing import NamedTuple

import torch

from recurlm.errors import ConfigError


class Precision(NamedTuple):
    """The compute type by name, as torch's dtype, and why it was chosen."""

    name: str
    dtype: torch.dtype
    reason: str


FP32 = Precision("fp32", torch.float32, "default")


def resolve_device(name: str) -> torch.device:
    """The device for 'auto', 'cpu', 'cuda' or 'cuda:N'; ConfigError when this machine lacks it."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device {name!r} is not known; expected auto, cpu, cuda or cuda:N.") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device {name!r}: torch sees no CUDA GPU here; use --device cpu.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device {name!r}: this machine has {torch.cuda.device_count()} GPU(s).")
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device {name!r} is not supported; expected cpu or cuda.")
    return device


def device_name(device: torch.device) -> str:
    """The card's name, or the kind of processor."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({platform.machine()})"


def resolve_dtype(name: str, device: torch.device) -> Precision:
    """The compute type; 'auto' is tf32 on GPUs that have it and fp32 elsewhere."""
    if name not in ("auto", "fp32", "tf32", "bf16"):
        raise ConfigError(f"dtype {name!r} is not known; expected auto, fp32, tf32 or bf16.")
    modern = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    if name == "auto":
        if modern:
            return Precision("tf32", torch.float32, "auto: this GPU multiplies in TF32, weights and sums in fp32")
        return Precision("fp32", torch.float32, "auto: no TF32 on this device")
    if name == "tf32" and not modern:
        return Precision("fp32", torch.float32, "tf32 was asked for, but this device has none")
    return Precision(name, torch.bfloat16 if name == "bf16" else torch.float32, "as configured")


@contextlib.contextmanager
def applied(precision: Precision) -> Iterator[None]:
    """Sets torch's matrix-product precision for a block of code and restores it afterwards."""
    tf32 = precision.name == "tf32"
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def cpu_multiplies_bf16() -> bool:
    """Whether this CPU has bf16 matrix instructions (AVX-512 BF16 or AMX), which double the speed of training here."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
