"""What the hardware gives: the bandwidths and rates that the limits of the other measurements are made of.

On a GPU they are limits in practice. On a CPU they are not: data in the caches moves faster than a large copy, and
oneDNN's LSTM was seen to multiply twice as fast as torch's product in fp32.
"""

from __future__ import annotations

from typing import Any

import torch

from recurlm.bench.timing import Row, copy_bandwidth, gemm_rate
from recurlm.model.precision import applied, resolve_dtype


def rows() -> list[dict[str, Any]]:
    """Bandwidth of a copy and rate of matrix products, on the CPU and on a GPU if there is one."""
    out = []
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        bandwidth = copy_bandwidth(device)
        out.append(
            _row(f"copy on {device}", "1 MB read, 1 MB written", 2e12 / bandwidth, f"{bandwidth / 1e9:,.1f} GB/s")
        )
        for name in ("fp32", "tf32", "bf16"):
            how = resolve_dtype(name, torch.device(device))
            if how.name == name:
                with applied(how):
                    rate = gemm_rate(how.dtype, device)
                shape, spent = "1,024 x 1,024 x 1,024", 2e6 * 1024**3 / rate
                out.append(_row(f"{name} product on {device}", shape, spent, f"{rate / 1e12:,.2f} TFLOP/s"))
    return out


def _row(measure: str, shape: str, microseconds: float, rate: str) -> dict[str, Any]:
    return Row(measure=measure, shape=shape, ours_us=microseconds, rate=rate).as_dict()
