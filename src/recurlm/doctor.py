"""What this machine and this installation can do, and whether the kernels in use are right here."""

from __future__ import annotations

import functools
import math
import os
import platform
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recurlm import __version__, kernels
from recurlm.config import Config
from recurlm.kernels import reference
from recurlm.model import precision
from recurlm.text import corpora
from recurlm.training import captured, memory

PACKAGES = ("torch", "triton", "numba", "numpy", "tokenizers", "safetensors")
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
LOW_DISK, LOW_MEMORY = 2e9, 2e9

Outcome = Callable[[Callable[..., Any], torch.device, torch.dtype, torch.dtype], list[Tensor]]
"""(function, device, rounded to, computed in) -> every output and gradient of an operation on a small random input."""


def _pool_outcome(
    function: Callable[..., Any], device: torch.device, rounded: torch.dtype, dtype: torch.dtype
) -> list[Tensor]:
    T, B, H, draw = 7, 3, 33, torch.Generator().manual_seed(1)

    def values(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64).to(rounded).to(device, dtype)

    out = []
    for pooling, gates in reference.GATES.items():
        gates_TBG, c_BH = values(T, B, gates * H).requires_grad_(), values(B, H).requires_grad_()
        scale_TBH = (values(T, B, H) > 0).to(dtype) if pooling != "f" else None
        bias_G = values(gates * H).requires_grad_()
        results = function(gates_TBG, c_BH, scale_TBH, pooling, bias_G)
        weights = [values(*result.shape) for result in results]
        out += [*results, *torch.autograd.grad(results, (gates_TBG, c_BH, bias_G), weights)]
    return out


def _linear_cross_entropy_outcome(
    function: Callable[..., Any], device: torch.device, rounded: torch.dtype, dtype: torch.dtype, below: int = 130
) -> list[Tensor]:
    N, H, V, draw = 40, 24, 130, torch.Generator().manual_seed(1)

    def values(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64).to(rounded).to(device, dtype)

    wide = torch.float64 if dtype == torch.float64 else torch.float32  # a model's weights are never narrower
    hidden_NH = values(N, H).requires_grad_()
    weight_VH, bias_V = values(V, H).to(wide).requires_grad_(), values(V).to(wide).requires_grad_()
    targets_N = torch.randint(below, (N,), generator=draw).to(device)
    nll_N = function(hidden_NH, weight_VH, bias_V, targets_N)
    return [nll_N, *torch.autograd.grad(nll_N, (hidden_NH, weight_VH, bias_V), values(N).to(nll_N.dtype))]


def _mixture_outcome(
    function: Callable[..., Any], device: torch.device, rounded: torch.dtype, dtype: torch.dtype
) -> list[Tensor]:
    def of_three(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
        prior_NK = torch.linspace(-2, -0.1, 39, device=device, dtype=bias.dtype).view(13, 3)
        return function(hidden[:39], weight, bias, targets[:13], prior_NK)

    def padded(*given: Tensor) -> Tensor:
        return torch.nn.functional.pad(of_three(*given), (0, 27))

    return _linear_cross_entropy_outcome(padded, device, rounded, dtype)


def _penalties_outcome(
    function: Callable[..., Any], device: torch.device, rounded: torch.dtype, dtype: torch.dtype
) -> list[Tensor]:
    draw = torch.Generator().manual_seed(1)
    raw_TBH, dropped_TBH = (
        torch.randn(7, 3, 33, generator=draw, dtype=torch.float64).to(rounded).to(device, dtype).requires_grad_()
        for _ in range(2)
    )
    terms = function(raw_TBH, dropped_TBH, 300.0, 200.0)
    return [*terms, *torch.autograd.grad(terms[0] + terms[1], (raw_TBH, dropped_TBH))]


def _lstm_outcome(
    function: Callable[..., Any], device: torch.device, rounded: torch.dtype, dtype: torch.dtype
) -> list[Tensor]:
    T, B, E, H, draw = 6, 3, 8, 32, torch.Generator().manual_seed(1)

    def values(*shape: int) -> Tensor:
        return (
            torch.randn(*shape, generator=draw, dtype=torch.float64)
            .mul(0.5)
            .to(rounded)
            .to(device, dtype)
            .requires_grad_()
        )

    x_TBI, state = values(T, B, E), [values(B, H), values(B, H)]
    weights = [values(4 * H, E), values(4 * H, H), values(4 * H), values(4 * H)]
    results = function(x_TBI, *state, weights)
    upstream = [values(*result.shape).detach() for result in results]
    return [*results, *torch.autograd.grad(results, (x_TBI, *state, *weights), upstream)]


def _dynamic_update_outcome(
    function: Callable[..., Any], device: torch.device, rounded: torch.dtype, dtype: torch.dtype
) -> list[Tensor]:
    draw, out = torch.Generator().manual_seed(1), []
    for with_rms in (True, False):
        weights, gradients, trained, rms = (
            [
                torch.randn(*shape, generator=draw, dtype=torch.float64).to(device, dtype)
                for shape in ((70, 33), (2049,))
            ]
            for _ in range(4)
        )
        function(weights, gradients, trained, [r.abs() for r in rms] if with_rms else None, 0.1, 0.3, 0.5)
        out += weights
    return out


def _of_one_cluster(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda hidden, weight, bias, targets: function([hidden], [weight], [bias], targets, [0])


# operation -> (the function that everything calls, its slow twin, what to compare of them)
CHECKS: dict[str, tuple[Callable[..., Any], Callable[..., Any], Outcome]] = {
    "pool": (kernels.pool, reference.pool, _pool_outcome),
    "linear_cross_entropy": (
        kernels.linear_cross_entropy,
        reference.linear_cross_entropy,
        _linear_cross_entropy_outcome,
    ),
    "mixture_cross_entropy": (kernels.mixture_cross_entropy, reference.mixture_cross_entropy, _mixture_outcome),
    "cluster_cross_entropies": (
        _of_one_cluster(kernels.cluster_cross_entropies),
        _of_one_cluster(reference.cluster_cross_entropies),
        functools.partial(_linear_cross_entropy_outcome, below=300),  # half of the rows are outside of the cluster
    ),
    "penalties": (kernels.penalties, reference.penalties, _penalties_outcome),
    "lstm": (kernels.lstm, reference.lstm, _lstm_outcome),
    "dynamic_update": (kernels.dynamic_update, reference.dynamic_update, _dynamic_update_outcome),
}


def examine() -> dict[str, Any]:
    """Everything that `recurlm doctor` prints: versions, cpu, gpus, gpu_error, precision, kernels, training_step,
    numba_cache, data, warnings, ok.

    `ok` is false when a GPU does not answer, or a kernel in use fails or differs from its slow twin. Nothing is
    written but numba's cache.
    """
    with warnings.catch_warnings(record=True) as said:  # such as torch's, of a driver that is too old
        warnings.simplefilter("always")
        facts = {"versions": versions(), "cpu": cpu(), "gpus": [], "gpu_error": ""}
        try:
            facts["gpus"] = gpus()
        except RuntimeError as error:  # torch sees a GPU that does not answer
            facts["gpu_error"] = _sentence(error)
    devices = [torch.device("cpu"), *(torch.device("cuda", gpu["index"]) for gpu in facts["gpus"])]
    chosen = [(str(device), precision.resolve_dtype("auto", device)) for device in devices]
    rows = [row for device in devices for row in kernel_checks(device)]
    folder, cache = corpora.data_folder(), numba_cache()
    return {
        **facts,
        "precision": [{"device": device, "dtype": how.name, "reason": how.reason} for device, how in chosen],
        "kernels": rows,
        "training_step": [training_step(device) for device in devices],
        "numba_cache": cache,
        "data": {"folder": str(folder), "present": [name for name in corpora.NAMED_SETS if corpora.is_present(name)]},
        "warnings": [*(_sentence(w.message) for w in said), *_warnings(facts["cpu"], facts["gpus"], rows, cache)],
        "ok": not facts["gpu_error"] and all(row["check"] == "ok" for row in rows),
    }


def versions() -> dict[str, str]:
    """Version by name: recurlm, python and the packages it computes with; "" for what is not installed."""

    sold_as = metadata.packages_distributions()  # torch's own builds of triton have other names

    def version(name: str) -> str:
        try:
            return metadata.version(sold_as.get(name, [name])[0])
        except metadata.PackageNotFoundError:
            return ""

    return {"recurlm": __version__, "python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


def cpu() -> dict[str, Any]:
    """The CPU: name, logical cores that this process may use, torch's threads, bf16 instructions, free memory."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    free = memory.available(torch.device("cpu"))
    return {
        "name": names[0] if names else platform.processor() or platform.machine(),
        "cores": _usable_cores(),
        "threads": torch.get_num_threads(),
        "avx512_bf16": torch.cpu._is_avx512_bf16_supported(),
        "amx": torch.cpu._is_amx_tile_supported(),
        "multiplies_bf16": precision.cpu_multiplies_bf16(),
        "memory_free": int(free) if math.isfinite(free) else None,
    }


def _usable_cores() -> int:
    """Logical cores that the process may run on, and no more than its control group's share of time is worth."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        return cores if quota == "max" else max(1, min(cores, int(quota) // int(period)))
    except (OSError, ValueError, ZeroDivisionError):
        return cores


def gpus() -> list[dict[str, Any]]:
    """Each GPU that torch sees: index, name, capability, memory in bytes, driver, CUDA and cuDNN version."""
    if not torch.cuda.is_available():
        return []
    cudnn = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
    found = []
    for index in range(torch.cuda.device_count()):
        known = torch.cuda.get_device_properties(index)
        found.append(
            {
                "index": index,
                "name": known.name,
                "capability": f"{known.major}.{known.minor}",
                "memory": known.total_memory,
                "memory_free": torch.cuda.mem_get_info(index)[0],
                "driver": _driver(),
                "cuda": torch.version.cuda,
                "cudnn": cudnn,
            }
        )
    return found


def _driver() -> str:
    """The version of the NVIDIA driver of this machine, "" when it has none or does not say."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
    found = re.search(r"Module\s.*?(\d+(?:\.\d+)+)", text)
    return found[1] if found else "unknown"


def kernel_checks(device: torch.device) -> list[dict[str, Any]]:
    """A row for each operation and type: operation, device, dtype, function, reason, slower, check, difference, said.

    `check` is ok, differs or failed, of a real run against the slow twin in float64; `difference` is the largest, relative
    to the largest value where that is above 1; `said` holds an error or what the kernel warned of.
    """
    dtypes = {
        name: {key[2] for key in kernels.TABLE if key[0] == name} for name in dict.fromkeys(k[0] for k in kernels.TABLE)
    }
    return [_row(name, device, dtype) for name in dtypes for dtype in TOLERANCE if dtype in dtypes[name]]


def _row(operation: str, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    row: dict[str, Any] = {
        "operation": operation, "device": str(device), "dtype": str(dtype).removeprefix("torch."),
        "function": "", "reason": "", "slower": False, "check": "failed", "difference": None, "said": "",
    }  # fmt: skip
    try:
        row |= kernels.in_use(operation, device.type, dtype)._asdict()
        function, twin, outcome = CHECKS[operation]
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            found = outcome(function, device, dtype, dtype)
        expected = outcome(twin, device, dtype, torch.float64)
        difference = max(_difference(a, b) for a, b in zip(found, expected, strict=True))
    except Exception as error:  # whatever it is: to report it is the purpose
        return row | {"said": _sentence(error)}
    row["said"] = "; ".join(dict.fromkeys(_sentence(w.message) for w in said if str(w.message) != row["reason"]))
    if not math.isfinite(difference):
        return row | {"check": "differs", "said": "its values are not finite"}
    return row | {"check": "ok" if difference <= TOLERANCE[dtype] else "differs", "difference": difference}


def _difference(a: Tensor, b: Tensor) -> float:
    if not a.numel():
        return 0.0
    gap = (a.detach().double() - b.detach()).abs().max() / b.detach().abs().max().clamp(min=1)
    return float(gap)


def _sentence(error: object) -> str:
    """An error or warning as one line of at most 300 characters."""
    text = " ".join(str(error).split())
    name = f"{type(error).__name__}: " if isinstance(error, Exception) and not isinstance(error, Warning) else ""
    return (name + text if len(text) <= 300 else f"{name}{text[:200]} ... {text[-80:]}").rstrip(": ")


def training_step(device: torch.device) -> dict[str, Any]:
    """How a step is taken on the device with the default settings: device, captured (in CUDA graphs), reason."""
    obstacle = captured.obstacle(Config(), device)
    return {"device": str(device), "captured": not obstacle, "reason": obstacle or "GPU with triton"}


def numba_cache() -> str | None:
    """The folder in which numba keeps compiled kernels; None when it can write none, or cannot be imported."""
    try:
        from recurlm.kernels import pool_numba
    except Exception:  # said in the kernels' rows
        return None
    return next((path for value in pool_numba.__dict__.values() if (path := _cache_path(value))), None)


def _cache_path(value: object) -> str | None:
    """Where numba caches the value, if it is a function that numba compiles."""
    return getattr(getattr(value, "stats", None), "cache_path", None)


def _warnings(cpu: dict, gpus: list[dict], rows: Iterable[dict], cache: str | None) -> list[str]:
    """What is slower or nearer to a failure than it need be, a sentence each."""
    out, environment = [], os.environ
    for row in rows:
        if row["slower"]:
            out.append(f"{row['operation']} on {row['device'].partition(':')[0]} is slow: {row['reason']}")
    if cpu["threads"] > cpu["cores"]:
        out.append(
            f"torch uses {cpu['threads']} threads on {cpu['cores']} usable cores; set OMP_NUM_THREADS={cpu['cores']} "
            f"or give --threads {cpu['cores']}."
        )
    if environment.get("OMP_NUM_THREADS") == "1" and cpu["cores"] > 1:
        out.append(f"OMP_NUM_THREADS=1 leaves {cpu['cores'] - 1} of {cpu['cores']} usable cores idle.")
    if environment.get("OMP_WAIT_POLICY", "").lower() == "active":
        out.append("OMP_WAIT_POLICY=active: beside another busy process small steps become many times slower.")
    if environment.get("CUDA_LAUNCH_BLOCKING", "0") not in ("", "0"):
        out.append("CUDA_LAUNCH_BLOCKING is set: every GPU kernel waits for the one before; for debugging only.")
    if not gpus and _driver():
        built = f"is built for CUDA {torch.version.cuda}" if torch.version.cuda else "is a build without CUDA"
        out.append(f"An NVIDIA driver ({_driver()}) is here, but torch sees no GPU; it {built}.")
    if cache is None:
        out.append(
            "numba keeps no compiled code here: it compiles anew at each start; set NUMBA_CACHE_DIR to a folder."
        )
    for name, folder in {"the current folder": Path.cwd(), "the temporary folder": Path(tempfile.gettempdir())}.items():
        free = shutil.disk_usage(folder).free
        if free < LOW_DISK:
            out.append(
                f"Only {free / 1e9:.1f} GB are free in {name} ({folder}); a run keeps several copies of its model."
            )
    if cpu["memory_free"] is not None and cpu["memory_free"] < LOW_MEMORY:
        out.append(f"Only {cpu['memory_free'] / 1e9:.1f} GB of memory are free.")
    return list(dict.fromkeys(out))
