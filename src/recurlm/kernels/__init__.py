"""The fast operations, one visible table: (operation, device type, dtype) -> function.

Each function has a slow twin of the same signature in `reference.py`, which serves every pair that the table
does not name. Only torch, triton, numba and numpy are imported here, the latter three at first use.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib.util
import os
import warnings
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Any, NamedTuple

import torch
from torch import Tensor

from recurlm.kernels import reference
from recurlm.kernels.reference import GATES as GATES


def has_triton() -> bool:
    """Whether triton is installed; it is not imported."""
    return importlib.util.find_spec("triton") is not None


def _numba_pool() -> Callable[..., tuple[Tensor, Tensor]]:
    from recurlm.kernels.pool_numba import pool

    return pool


def _triton_pool() -> Callable[..., tuple[Tensor, Tensor]]:
    if not has_triton():
        _warn("triton is not installed: QRNN layers run step by step on the GPU, which is many times slower.")
        return reference.pool
    from recurlm.kernels.pool_triton import pool

    return pool


def _torch_linear_cross_entropy() -> Callable[..., Tensor]:
    from recurlm.kernels.cross_entropy import linear_cross_entropy

    return linear_cross_entropy


def _triton_linear_cross_entropy() -> Callable[..., Tensor]:
    slower = "the softmax over the vocabulary takes several times the time and memory."
    if not has_triton():
        _warn(f"triton is not installed: {slower}")
        return _torch_linear_cross_entropy()
    if torch.cuda.get_device_capability() < (8, 0):
        _warn(f"this GPU ({torch.cuda.get_device_name()}) has no bfloat16 matrix products: {slower}")
        return _torch_linear_cross_entropy()
    from recurlm.kernels.cross_entropy_triton import linear_cross_entropy

    return linear_cross_entropy


def _torch_mixture_cross_entropy() -> Callable[..., Tensor]:
    from recurlm.kernels.cross_entropy import mixture_cross_entropy

    return mixture_cross_entropy


def _triton_mixture_cross_entropy() -> Callable[..., Tensor]:
    slower = "a mixture of softmaxes takes several times the time and memory."
    if not has_triton():
        _warn(f"triton is not installed: {slower}")
        return _torch_mixture_cross_entropy()
    if torch.cuda.get_device_capability() < (8, 0):
        _warn(f"this GPU ({torch.cuda.get_device_name()}) has no bfloat16 matrix products: {slower}")
        return _torch_mixture_cross_entropy()
    from recurlm.kernels.mixture_triton import mixture_cross_entropy

    return mixture_cross_entropy


def _torch_cluster_cross_entropies() -> Callable[..., Tensor]:
    from recurlm.kernels.cross_entropy import cluster_cross_entropies

    return cluster_cross_entropies


def _triton_cluster_cross_entropies() -> Callable[..., Tensor]:
    slower = "an adaptive head computes every cluster for all rows, as a full softmax would."
    if not has_triton():
        _warn(f"triton is not installed: {slower}")
        return reference.cluster_cross_entropies
    if torch.cuda.get_device_capability() < (8, 0):
        _warn(f"this GPU ({torch.cuda.get_device_name()}) has no bfloat16 and TF32 matrix products: {slower}")
        return reference.cluster_cross_entropies
    from recurlm.kernels.cluster_triton import cluster_cross_entropies

    return cluster_cross_entropies


def _triton_penalties() -> Callable[..., tuple[Tensor, Tensor]]:
    if not has_triton():
        _warn("triton is not installed: the activation penalties take several times as long.")
        return reference.penalties
    from recurlm.kernels.penalties_triton import penalties

    return penalties


def _cuda_lstm() -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    from recurlm.kernels import nvrtc

    if why := nvrtc.missing():
        _warn(f"{why}: LSTM layers run by cuDNN, which takes twice the time.")
        return reference.lstm
    from recurlm.kernels.lstm_cuda import lstm

    return lstm


def _triton_dynamic_update() -> Callable[..., None]:
    if not has_triton():
        _warn("triton is not installed: the update of dynamic evaluation takes several times as long.")
        return reference.dynamic_update
    from recurlm.kernels.dynamic_triton import dynamic_update

    return dynamic_update


def _warn(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=4)


TABLE: dict[tuple[str, str, torch.dtype], Callable[[], Callable[..., Any]]] = {
    ("pool", "cpu", torch.float32): _numba_pool,
    ("pool", "cpu", torch.float64): _numba_pool,
    ("pool", "cpu", torch.bfloat16): _numba_pool,
    ("pool", "cpu", torch.float16): _numba_pool,
    ("pool", "cuda", torch.float32): _triton_pool,
    ("pool", "cuda", torch.bfloat16): _triton_pool,
    ("pool", "cuda", torch.float16): _triton_pool,
    ("linear_cross_entropy", "cpu", torch.float32): _torch_linear_cross_entropy,
    ("linear_cross_entropy", "cpu", torch.float64): _torch_linear_cross_entropy,
    ("linear_cross_entropy", "cpu", torch.bfloat16): _torch_linear_cross_entropy,
    ("linear_cross_entropy", "cuda", torch.float32): _torch_linear_cross_entropy,
    ("linear_cross_entropy", "cuda", torch.bfloat16): _triton_linear_cross_entropy,
    ("mixture_cross_entropy", "cpu", torch.float32): _torch_mixture_cross_entropy,
    ("mixture_cross_entropy", "cpu", torch.float64): _torch_mixture_cross_entropy,
    ("mixture_cross_entropy", "cpu", torch.bfloat16): _torch_mixture_cross_entropy,
    ("mixture_cross_entropy", "cuda", torch.float32): _torch_mixture_cross_entropy,
    ("mixture_cross_entropy", "cuda", torch.bfloat16): _triton_mixture_cross_entropy,
    ("cluster_cross_entropies", "cpu", torch.float32): _torch_cluster_cross_entropies,
    ("cluster_cross_entropies", "cpu", torch.float64): _torch_cluster_cross_entropies,
    ("cluster_cross_entropies", "cpu", torch.bfloat16): _torch_cluster_cross_entropies,
    ("cluster_cross_entropies", "cuda", torch.float32): _triton_cluster_cross_entropies,
    ("cluster_cross_entropies", "cuda", torch.bfloat16): _triton_cluster_cross_entropies,
    ("penalties", "cuda", torch.float32): _triton_penalties,
    ("penalties", "cuda", torch.bfloat16): _triton_penalties,
    ("penalties", "cuda", torch.float16): _triton_penalties,
    ("lstm", "cuda", torch.bfloat16): _cuda_lstm,
    ("lstm", "cuda", torch.float16): _cuda_lstm,
    ("dynamic_update", "cuda", torch.float32): _triton_dynamic_update,
}


TWINS: dict[str, Callable[..., Any]] = {
    "pool": reference.pool,
    "linear_cross_entropy": reference.linear_cross_entropy,
    "mixture_cross_entropy": reference.mixture_cross_entropy,
    "cluster_cross_entropies": reference.cluster_cross_entropies,
    "penalties": reference.penalties,
    "lstm": reference.lstm,
    "dynamic_update": reference.dynamic_update,
}


@functools.cache
def _load(operation: str, device: str, dtype: torch.dtype) -> Callable[..., Any]:
    return TABLE[operation, device, dtype]() if (operation, device, dtype) in TABLE else TWINS[operation]


def pool(
    gates_TBG: Tensor, c_BH: Tensor, scale: Tensor | float | None, pooling: str, bias_G: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(h_TBH, last c_BH) of QRNN pooling (f, fo or ifo); see `reference.pool` for the formula."""
    return _load("pool", gates_TBG.device.type, gates_TBG.dtype)(gates_TBG, c_BH, scale, pooling, bias_G)


def linear_cross_entropy(hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor, targets_N: Tensor) -> Tensor:
    """nll_N = -log softmax(W h_n + b) at the target, in nats, at least fp32; the logits' memory is bounded.

    The product runs in the type of `hidden_NH`. Give rows that do not count an upstream gradient of 0.
    """
    arguments = hidden_NH, weight_VH, bias_V, targets_N
    return _load("linear_cross_entropy", hidden_NH.device.type, hidden_NH.dtype)(*arguments)


def mixture_cross_entropy(
    rows_RD: Tensor, weight_VD: Tensor, bias_V: Tensor, targets_N: Tensor, log_prior_NK: Tensor
) -> Tensor:
    """nll_N of a mixture of softmaxes over one matrix; see `reference.mixture_cross_entropy` for rows and formula.

    On a GPU fastest where the gradient of the losses is one number for all, an expanded tensor.
    """
    arguments = rows_RD, weight_VD, bias_V, targets_N, log_prior_NK
    return _load("mixture_cross_entropy", rows_RD.device.type, rows_RD.dtype)(*arguments)


def cluster_cross_entropies(
    features: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    targets_N: Tensor,
    firsts: Sequence[int],
) -> Tensor:
    """nll_N = -log softmax(W_k h_k + b_k), k the cluster of the target, ids from firsts[k] on; 0, without a gradient, outside.

    Rows cost next to nothing in clusters that are not theirs. On a GPU the host does not wait to know them, and no shape
    depends on them.
    """
    arguments = features, weights, biases, targets_N, firsts
    return _load("cluster_cross_entropies", features[0].device.type, features[0].dtype)(*arguments)


def penalties(raw_TBH: Tensor, dropped_TBH: Tensor, ar: float, tar: float) -> tuple[Tensor, Tensor]:
    """(ar * mean(dropped^2), tar * mean((raw_t - raw_{t-1})^2)), at least fp32; 0 for a weight of 0 and for T = 1."""
    arguments = raw_TBH, dropped_TBH, ar, tar
    return _load("penalties", raw_TBH.device.type, raw_TBH.dtype)(*arguments)


def lstm(x_TBI: Tensor, h_BH: Tensor, c_BH: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """(y_TBH, last h_BH, last c_BH) of an LSTM layer; see `reference.lstm` for the weights and the formula."""
    return _load("lstm", x_TBI.device.type, x_TBI.dtype)(x_TBI, h_BH, c_BH, weights)


def lstm_is_resident(units: int, batch: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether `lstm` keeps a layer's weights on the chip, which takes the whole GPU: nothing else overlaps with it."""
    if _load("lstm", device.type, dtype) is reference.lstm:
        return False
    from recurlm.kernels import lstm_cuda

    return not lstm_cuda.obstacle(units, batch, device)


def lstm_waited_in_vain(device: torch.device) -> bool:
    """Whether a kernel of `lstm` gave up since the last call: its blocks did not all run at once. Waits for the GPU."""
    if device.type != "cuda":
        return False
    from recurlm.kernels import lstm_cuda

    return lstm_cuda.waited_too_long(device)


def dynamic_update(
    weights: Sequence[Tensor], gradients: Sequence[Tensor], trained: Sequence[Tensor], rms: Sequence[Tensor] | None,
    lr: float, decay: float, eps: float,
) -> None:  # fmt: skip
    """Moves `weights` in place by the update of dynamic evaluation; see `reference.dynamic_update` for the formula."""
    update = _load("dynamic_update", weights[0].device.type, weights[0].dtype)
    update(weights, gradients, trained, rms, lr, decay, eps)


def graph_of(work: Callable[[], None], pool: Any = None) -> torch.cuda.CUDAGraph:
    """The CUDA graph of what `work` launches, which is not run; it was called once before, so that nothing compiles now."""
    graph, current, side = torch.cuda.CUDAGraph(), torch.cuda.current_stream(), torch.cuda.Stream()
    side.wait_stream(current)
    collects = gc.isenabled()
    gc.disable()  # a collection during the capture could free what belongs to another graph
    torch.cuda.empty_cache()  # what is cached cannot be had during the capture
    try:
        with torch.cuda.stream(side):
            graph.capture_begin(pool=pool, capture_error_mode="relaxed")
            try:
                work()
            except BaseException:
                with contextlib.suppress(RuntimeError):  # the first error is the one to read
                    graph.capture_end()
                raise
            graph.capture_end()
    finally:
        if collects:
            gc.enable()
    current.wait_stream(side)
    return graph


class InUse(NamedTuple):
    """What serves an operation here: its full name, why, and whether that is slower than it need be."""

    function: str
    reason: str
    slower: bool


def in_use(operation: str, device: str, dtype: torch.dtype) -> InUse:
    """What serves the operation of the table on this machine; raises what the import of a fast twin raises.

    A loader that falls back says why in a RuntimeWarning: that text is the reason.
    """
    if (operation, device, dtype) not in TABLE:
        return InUse(f"{reference.__name__}.{operation}", "there is no fast twin for this device and type", False)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        module = TABLE[operation, device, dtype]().__module__
    if said:
        return InUse(f"{module}.{operation}", "; ".join(str(warning.message) for warning in said), True)
    compiler = module.rpartition("_")[2]  # the last word of the file's name: pool_triton
    if compiler == "cuda":
        return InUse(
            f"{module}.{operation}", f"CUDA C++ by NVRTC, cuda-bindings {metadata.version('cuda-bindings')}", False
        )
    switches = {"triton": "TRITON_INTERPRET", "numba": "NUMBA_DISABLE_JIT"}
    if compiler not in switches:
        return InUse(f"{module}.{operation}", f"torch {torch.__version__}", False)
    version, switch = "", switches[compiler]
    with contextlib.suppress(metadata.PackageNotFoundError):
        version = f" {metadata.version(compiler)}"
    interpreted = os.environ.get(switch, "0") not in ("", "0")
    why = compiler + version + f", not compiled because {switch} is set" * interpreted
    return InUse(f"{module}.{operation}", why, interpreted)
