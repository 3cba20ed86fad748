"""One update of all weights on the GPU beside torch's fused optimisers, and locked dropout.

    python -m recurlm.bench.update [--sweep]    the rows as a table, or layouts side by side

Limits are bytes that must move at the bandwidth of a copy; the peer is the norm, clipping, torch's fused step, the mask
of weight drop and the cast, launch by launch in one CUDA graph. It draws the mask in 32 bits and does not pad.
"""

from __future__ import annotations

import sys
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from recurlm.bench.timing import Row, copy_bandwidth, gpu_time, table

MODELS = {  # of Penn Treebank words: shape, padded shape, blocks, weight drop
    "AWD-QRNN": (
        ((10000, 400), (10000, 400), (1, 1), 0.0),
        ((4650, 800), (4656, 800), (3, 2), 0.1), ((4650,), (4656,), (3,), 0.0),
        ((4650, 1550), (4656, 1552), (3, 1), 0.1), ((4650,), (4656,), (3,), 0.0),
        ((4650, 1550), (4656, 1552), (3, 1), 0.1), ((4650,), (4656,), (3,), 0.0),
        ((1200, 1550), (1200, 1552), (3, 1), 0.1), ((1200,), (1200,), (3,), 0.0),
        ((10000,), (10000,), (1,), 0.0),
    ),
    "AWD-LSTM": (
        ((10000, 400), (10000, 400), (1, 1), 0.0),
        ((4600, 400), (4608, 400), (4, 1), 0.0), ((4600, 1150), (4608, 1152), (4, 1), 0.5),
        ((4600,), (4608,), (4,), 0.0), ((4600,), (4608,), (4,), 0.0),
        ((4600, 1150), (4608, 1152), (4, 1), 0.0), ((4600, 1150), (4608, 1152), (4, 1), 0.5),
        ((4600,), (4608,), (4,), 0.0), ((4600,), (4608,), (4,), 0.0),
        ((1600, 1150), (1600, 1152), (4, 1), 0.0), ((1600, 400), (1600, 400), (4, 1), 0.5),
        ((1600,), (1600,), (4,), 0.0), ((1600,), (1600,), (4,), 0.0),
        ((10000,), (10000,), (1,), 0.0),
    ),
}  # fmt: skip
LOCKED = (70, 20, 1552)


class Case(NamedTuple):
    """What an update of one model touches."""

    weights: list[Any]
    gradients: list[Tensor]
    mean: list[Tensor]
    controls: Tensor
    status: Tensor
    ring: Tensor
    terms: Tensor
    rule: Any


def case(model: str, method: str, mean: bool) -> Case:
    """Random weights, gradients and working copies in bf16 of the model."""
    from recurlm.kernels import update_triton as U

    weights, gradients, device = [], [], torch.device("cuda")
    for n, (raw, padded, parts, drop) in enumerate(MODELS[model]):
        shape = U.shape_of(raw, padded, parts)
        moments = tuple(torch.rand(raw, device=device) for _ in range(2 * (method == "adam")))
        bits = U.empty_bits(shape, device) if drop else None
        working = torch.zeros(padded, dtype=torch.bfloat16, device=device)
        weights.append(U.Weight(n, shape, drop, torch.randn(raw, device=device), working, bits, moments))
        gradients.append(torch.randn_like(working))
    controls = torch.tensor([1e-3, 0.5, 0.1, 0.01, 1, 2, 0, 0], dtype=torch.float64, device=device)
    status, ring, terms = torch.ones(2, device=device), torch.zeros(2, 5, device=device), torch.ones(3, device=device)
    means = [w.raw.clone() for w in weights] if mean else []
    return Case(weights, gradients, means, controls, status, ring, terms, U.Rule(method, 0.2, 1e-6, 0.9, 0.99, 1e-8))


def judge(it: Case) -> None:
    """The pass over the gradients."""
    from recurlm.kernels import update_triton as U

    U.judge(it.weights, it.gradients, it.terms, it.controls, it.status, it.ring, it.rule.clip)


def update(it: Case) -> None:
    """The pass over everything."""
    from recurlm.kernels import update_triton as U

    U.update(it.weights, it.gradients, it.mean, it.controls, it.status, it.rule)


def bytes_moved(it: Case) -> tuple[int, int]:
    """What judge and update must at least read and write."""
    numbers = sum(w.raw.numel() for w in it.weights)
    grads = sum(w.raw.numel() * g.element_size() for w, g in zip(it.weights, it.gradients, strict=True))
    masks = sum(w.bits.numel() for w in it.weights if w.bits is not None)
    own = 8 * (1 + len(it.weights[0].moments) + bool(it.mean))
    return grads + masks, grads + masks * 2 + numbers * (own + it.gradients[0].element_size())


def peer(it: Case) -> Any:
    """The same work by torch, without padding."""
    parameters = [w.raw.clone().requires_grad_() for w in it.weights]
    adam = it.rule.method == "adam"
    make = torch.optim.Adam if adam else torch.optim.SGD
    options: dict[str, Any] = {"capturable": True} if adam else {}
    optimizer = make(parameters, lr=1e-3, weight_decay=1e-6, fused=True, **options)
    copies = [torch.empty_like(p, dtype=torch.bfloat16) for p in parameters]
    grads = [torch.randn_like(c) for c in copies]
    for p in parameters:
        p.grad = torch.zeros_like(p)
    held = [p.grad for p in parameters]

    def work() -> None:
        with torch.no_grad():
            torch._foreach_copy_(held, grads)
            torch.nn.utils.clip_grad_norm_(parameters, 0.2, foreach=True)
            optimizer.step()
            if it.mean:
                torch._foreach_lerp_(it.mean, parameters, 0.5)
            torch._foreach_copy_(copies, parameters)
            for w, copy in zip(it.weights, copies, strict=True):
                if w.drop:
                    copy.mul_(torch.empty_like(copy).bernoulli_(1 - w.drop).div_(1 - w.drop))

    return work


def rows() -> list[dict[str, Any]]:
    """Norm and update of both models beside torch; locked dropout beside a product with a mask."""
    from recurlm.kernels import dropout_triton

    bandwidth, out = copy_bandwidth() / 1e6, []
    for model, (method, mean) in product(MODELS, (("sgd", False), ("sgd", True), ("adam", False))):
        it = case(model, method, mean)
        first, second = bytes_moved(it)
        name = f"{model}, {method}{', mean' * mean}"
        if method == "sgd" and not mean:
            out.append(
                Row(measure="norm", shape=model, ours_us=gpu_time(lambda it=it: judge(it)), limit_us=first / bandwidth)
            )
        out.append(
            Row(measure="update", shape=name, ours_us=gpu_time(lambda it=it: update(it)), limit_us=second / bandwidth,
                target="80 %")
        )  # fmt: skip
        both = gpu_time(lambda it=it: (judge(it), update(it)))
        out.append(
            Row(measure="norm and update", shape=name, ours_us=both, peer_us=gpu_time(peer(it)), peer="torch fused",
                limit_us=(first + second) / bandwidth)
        )  # fmt: skip
    x = torch.randn(LOCKED, device="cuda").bfloat16()
    seed, mask = torch.ones(1, dtype=torch.float64, device="cuda"), torch.empty_like(x[0])
    shape = " x ".join(map(str, LOCKED)) + ", bf16, warm"
    ours = gpu_time(lambda: dropout_triton.locked(x, 0.3, seed, 0))
    theirs = gpu_time(lambda: x * mask.bernoulli_(0.7).div_(0.7))
    row = Row(measure="locked dropout", shape=shape, ours_us=ours, peer_us=theirs, peer="torch", target="2.5 us")
    out.append(row)
    return [row.as_dict() for row in out]


def sweep() -> None:
    """Prints the time of each layout; a layout that fails is named and passed over."""
    from recurlm.kernels import dropout_triton, update_triton

    def timed(what: str, name: object, work: Any, limit: float) -> None:
        try:
            spent = gpu_time(work, repeats=11)
            print(f"{what:18} {name!s:95} {spent:8.1f} us {limit / spent:6.1%}", flush=True)
        except Exception as error:
            print(f"{what:18} {name!s:95} {type(error).__name__}: {str(error)[:100]}", flush=True)

    bandwidth = copy_bandwidth() / 1e6
    it, adam = case("AWD-QRNN", "sgd", False), case("AWD-QRNN", "adam", False)
    first, second = (n / bandwidth for n in bytes_moved(it))
    kept = update_triton.SQUARES, update_triton.UPDATE, dropout_triton.BLOCK, dropout_triton.STEPS, dropout_triton.WARPS
    for unit, block, loops, warps in (
        (2, 256, 1, 4), (2, 512, 1, 4), (2, 512, 2, 4), (2, 256, 4, 4), (2, 512, 4, 4), (2, 512, 4, 8), (2, 1024, 2, 4),
        (4, 512, 2, 4), (4, 1024, 2, 4),
    ):  # fmt: skip
        update_triton.SQUARES = update_triton.Tiles(unit, block, loops, warps, False)
        timed("norm", update_triton.SQUARES, lambda: judge(it), first)
    update_triton.SQUARES = kept[0]
    for unit, block, loops, warps in (
        (2, 256, 1, 4), (2, 256, 2, 4), (2, 256, 4, 4), (2, 256, 8, 4), (2, 512, 1, 8), (2, 512, 4, 8), (2, 128, 4, 2),
        (2, 512, 2, 4), (4, 512, 1, 4), (4, 512, 4, 4), (4, 256, 2, 2),
    ):  # fmt: skip
        update_triton.UPDATE = update_triton.Tiles(unit, block, loops, warps, True)
        timed("update", update_triton.UPDATE, lambda: update(it), second)
        if unit == 2 and block < 512:
            timed("update, adam", update_triton.UPDATE, lambda: update(adam), bytes_moved(adam)[1] / bandwidth)
    for backwards in (False, True):
        update_triton.UPDATE = kept[1]._replace(backwards=backwards)
        timed("norm and update", update_triton.UPDATE, lambda: (judge(it), update(it)), first + second)
    update_triton.UPDATE = kept[1]
    x, seed = torch.randn(LOCKED, device="cuda").bfloat16(), torch.ones(1, dtype=torch.float64, device="cuda")
    for layout in ((1024, 8, 4), (1024, 4, 4), (512, 8, 2), (512, 8, 4), (512, 16, 4), (1024, 14, 4), (2048, 4, 8)):
        dropout_triton.BLOCK, dropout_triton.STEPS, dropout_triton.WARPS = layout
        spent = gpu_time(lambda: dropout_triton.locked(x, 0.3, seed, 0))
        print(f"locked, block, steps, warps {layout}: {spent:.2f} us", flush=True)
    dropout_triton.BLOCK, dropout_triton.STEPS, dropout_triton.WARPS = kept[2:]


if __name__ == "__main__":
    if "--sweep" in sys.argv:
        sweep()
    else:
        from rich.console import Console

        Console(width=120).print(table("update", rows(), 120))
