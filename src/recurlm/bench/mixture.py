"""The loss of a mixture of softmaxes on a GPU, forward and backward, beside torch's formula, eager and compiled; bfloat16.

The limit is three products of tokens x experts x depth x vocabulary at the rate of a large square one; memory is what the
peak takes beyond the inputs and their gradients. `python -m recurlm.bench.mixture` prints the rows alone, with --sweep the
times of other ways, chunks and tiles (with --sweep and a number, nothing: it compiles one of them), with --profile those of
every kernel.
"""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from recurlm import kernels
from recurlm.bench.timing import Row, gemm_rate, gpu_memory, gpu_time
from recurlm.errors import RunError
from recurlm.kernels import reference
from recurlm.kernels.cross_entropy import mean

# tokens, experts, depth, vocabulary; the target
SHAPES = {
    "PTB": ((840, 15, 280, 10_000), "0.75 ms, 100 MB"),
    "WT2": ((1050, 15, 300, 33_278), "3.2 ms"),
}
TOLERANCE = 0.03  # of the norm of the result in float64, on a part of the tokens
Inputs = tuple[list[Tensor], Tensor]


def inputs(shape: tuple[int, int, int, int], device: str = "cuda", dtype: torch.dtype = torch.bfloat16) -> Inputs:
    """([latents_NKE, log_prior_NK, weight_VE, bias_V], targets_N)."""
    N, K, E, V = shape
    draw = torch.Generator(device).manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=draw, device=device)

    latents, weight, bias = normal(N, K, E).tanh().to(dtype), (normal(V, E) * (2 / math.sqrt(E))).to(dtype), normal(V)
    leaves = [latents, normal(N, K).log_softmax(-1), weight, bias.to(dtype)]
    return [x.requires_grad_() for x in leaves], torch.randint(V, (N,), generator=draw, device=device)


def ours(leaves: list[Tensor], targets_N: Tensor, function: Callable[..., Tensor] | None = None) -> Tensor:
    """nll_N without the experts' distributions."""
    latents_NKE, log_prior_NK, weight_VE, bias_V = leaves
    function = function or kernels.mixture_cross_entropy
    return function(latents_NKE.flatten(0, 1), weight_VE, bias_V, targets_N, log_prior_NK)


def formula(leaves: list[Tensor], targets_N: Tensor) -> Tensor:
    """nll_N by way of every expert's probabilities, as the published code has it, without its 1e-8."""
    latents_NKE, log_prior_NK, weight_VE, bias_V = leaves
    probs_NKV = torch.nn.functional.linear(latents_NKE, weight_VE, bias_V).float().softmax(-1)
    probs_NV = (log_prior_NK.exp()[:, :, None] * probs_NKV).sum(1)
    return -probs_NV.gather(1, targets_N[:, None]).squeeze(1).log()


def both(function: Callable[..., Tensor], given: Inputs) -> list[Tensor]:
    """Loss and gradients of its mean."""
    nll_N = function(*given)
    return [nll_N.detach(), *torch.autograd.grad(mean(nll_N), given[0])]


def check(given: Inputs, tokens: int = 200) -> None:
    """None; RunError when loss or gradients are not those of the formula in float64, for the first tokens."""
    (latents, prior, *rest), targets = given
    few = [x.detach()[:tokens].requires_grad_() for x in (latents, prior)] + rest
    wide = [x.detach().double().requires_grad_() for x in few]
    expected = both(lambda x, y: ours(x, y, reference.mixture_cross_entropy), (wide, targets[:tokens]))
    for name, found, truth in zip(
        ("loss", "latents", "prior", "weight", "bias"), both(ours, (few, targets[:tokens])), expected, strict=True
    ):
        if not (found.double() - truth).norm() <= TOLERANCE * truth.norm():
            raise RunError(f"mixture: the {name}'s values are not those of the formula.")


def rows() -> list[dict[str, Any]]:
    """Two rows for each data set, beside torch eager and compiled."""
    out, rate = [], gemm_rate(torch.bfloat16)
    for name, (shape, target) in SHAPES.items():
        given = inputs(shape)
        check(given)
        size = sum(x.nbytes for x in given[0]) / 1e6  # as large as the gradients
        elapsed, memory = _measure(ours, given)
        for peer, function in (("torch", formula), ("torch.compile", torch.compile(formula, dynamic=False))):
            theirs, beside = None, peer
            try:
                theirs, needed = _measure(function, given)
                beside = f"{peer}, {needed - size:,.0f} MB"
            except Exception as error:  # no C compiler, too little memory: ours is worth having alone
                beside = f"{peer} failed: {type(error).__name__}"
            out.append(Row(
                measure="mixture of softmaxes, forward + backward", shape=f"{name}: {' x '.join(f'{n:,}' for n in shape)} bf16",
                ours_us=elapsed, peer_us=theirs, peer=beside,
                limit_us=6e6 * math.prod(shape) / rate, target=target, memory_mb=memory - size,
            ).as_dict())  # fmt: skip
    return out


def _measure(function: Callable[..., Tensor], given: Inputs) -> tuple[float, float]:
    """(microseconds, megabytes)."""

    def work() -> list[Tensor]:
        return both(function, given)

    elapsed, memory = gpu_time(work, repeats=10), gpu_memory(work)
    torch.cuda.empty_cache()
    return elapsed, memory


def variants() -> list[tuple[str, dict[str, Any]]]:
    """(label, what to change of the mixture's kernels)."""
    from recurlm.kernels import mixture_triton as fused
    from recurlm.kernels.cross_entropy_triton import Tiles

    sizes, tiles = (24, 32, 48, 84), ((128, 256, 64, 8, 3, 1), (128, 128, 64, 8, 4, 1))
    return [
        ("logits computed twice", {"ONCE": False}),
        ("every logit once", {}),
        *((f"chunks of {n} MB (2^20)", {"CHUNK_BYTES": n << 20}) for n in sizes),
        *((f"tiles {it}", {"EXPONENTIALS": Tiles(*it, flatten=True)}) for it in tiles),
        ("not flat", {"EXPONENTIALS": fused.EXPONENTIALS._replace(flatten=False)}),
    ]


def sweep(seconds: float = 40, only: int | None = None) -> None:
    """Prints times and memory of other ways, chunks and tiles; stops after about `seconds`. `only` compiles one of them."""
    from recurlm.kernels import mixture_triton as fused

    start = time.perf_counter()
    given = {name: inputs(shape) for name, (shape, _) in SHAPES.items()}
    chosen = variants()
    for label, changes in chosen if only is None else chosen[only : only + 1]:
        cells = []
        with mock.patch.multiple(fused, **changes) if changes else contextlib.nullcontext():
            for name, one in given.items():
                if time.perf_counter() - start > seconds:
                    cells.append("out of time")
                    continue
                try:
                    if only is not None:
                        both(ours, one)
                        continue
                    elapsed, memory = _measure(ours, one)
                    cells.append(f"{name} {elapsed:8.0f} us {memory - sum(x.nbytes for x in one[0]) / 1e6:5.0f} MB")
                except Exception as error:  # such as too little shared memory
                    cells.append(f"{name} {type(error).__name__}: {str(error)[:80]}")
        print(f"  {label:36} {'  '.join(cells)}", flush=True)


def profile() -> None:
    """Prints the GPU time of every kernel of one call."""
    for name, (shape, _) in SHAPES.items():
        given = inputs(shape)
        both(ours, given)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as seen:
            both(ours, given)
            torch.cuda.synchronize()
        print(f"-- {name}")
        for event in sorted(seen.key_averages(), key=lambda e: -e.self_device_time_total)[:25]:
            print(f"{event.self_device_time_total:9.1f} us {event.count:4d} x {event.key[:90]}")


if __name__ == "__main__":
    if "--sweep" in sys.argv:
        sweep(only=int(sys.argv[-1]) if sys.argv[-1].isdigit() else None)
    elif "--profile" in sys.argv:
        profile()
    elif "--once" in sys.argv:  # compiles
        for shape, _ in SHAPES.values():
            check(inputs(shape))
            both(ours, inputs(shape))
            both(torch.compile(formula, dynamic=False), inputs(shape))
    else:
        from recurlm.bench import timing

        for row in rows():
            print(timing.Row(**{key: value for key, value in row.items() if key != "share"}))
