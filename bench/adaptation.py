"""Seconds and perplexity of the neural cache and of dynamic evaluation on a text, each beside the model alone.

Usage: python bench/adaptation.py RUN STORE [SPLIT [TOKENS]]     the store's split (test), its first TOKENS (0: all)

Dynamic evaluation runs captured in CUDA graphs and not, in the same process, with the published settings for the Penn
Treebank; without a GPU only the latter. A few tokens of each come first, so that nothing compiles in what is timed.
"""

import copy
import dataclasses
import math
import sys
import time
import warnings
from collections.abc import Callable

import numpy as np
import torch

from recurlm import load
from recurlm.config import CacheConfig, DynamicConfig
from recurlm.evaluation.perplexity import mean_loss
from recurlm.inference.dynamic import DynamicEvaluation, gradient_rms
from recurlm.inference.neural_cache import NeuralCache
from recurlm.kernels import dynamic_update
from recurlm.protocol import StatefulModel
from recurlm.text.store import open_store

DYNAMIC = DynamicConfig(lr=4.6e-5, decay=1.43e-3, eps=2.3e-5, segment=5)  # Krause et al.'s for AWD-LSTM, converted


def row(name: str, work: Callable[[], object], ids: np.ndarray | None = None) -> object:
    """What `work` returns, its time printed; a failure is printed and does not stop the others."""
    try:
        start = time.perf_counter()
        found = work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    except Exception as error:
        print(f"{name:<44} failed: {type(error).__name__}: {' '.join(str(error).split())[:160]}", flush=True)
        return None
    rate = f"{len(ids) / seconds:12,.0f} tokens/s   ppl {math.exp(found):10.5f}" if ids is not None else ""
    print(f"{name:<44} {seconds:9.3f} s {rate}", flush=True)
    return found


def update_bandwidth(model: StatefulModel) -> None:
    """GB/s of the update alone, which reads four tensors a parameter and writes one."""
    sets = [[p.detach().clone() for p in model.parameters()] for _ in range(4)]  # type: ignore[attr-defined]
    weights, gradients, trained, rms = sets
    times = []
    for _ in range(30):
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        events[0].record()
        dynamic_update(weights, gradients, trained, [r.abs_() for r in rms] if not times else rms, 1e-9, 1e-9, 1.0)
        events[1].record()
        torch.cuda.synchronize()
        times.append(events[0].elapsed_time(events[1]))
    best = sorted(times)[len(times) // 2]
    size = 5 * sum(p.numel() * p.element_size() for p in weights)
    print(f"{'update of all parameters':<44} {1000 * best:9.1f} us {size / best / 1e6:12,.0f} GB/s", flush=True)


def main(run: str, place: str, split: str = "test", tokens: str = "0") -> None:
    warnings.simplefilter("always")
    language_model, store = load(run), open_store(place)
    model, boundary = language_model.model, language_model.tokenizer.boundary_id
    ids, train = np.asarray(store.ids(split))[: int(tokens) or None], np.asarray(store.ids("train"))
    few = ids[:600]
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    print(f"{gpu}, torch {torch.__version__}, {model.precision.name}; {len(ids):,} tokens of {split}")  # type: ignore[attr-defined]

    def loss(measured: StatefulModel, text: np.ndarray = ids) -> float:
        return mean_loss(measured, text, boundary, 1, "exact")

    def dynamic(capture: bool, text: np.ndarray = ids, cache: CacheConfig | None = None) -> float:
        moved = DynamicEvaluation(model, DYNAMIC, rms[capture] or rms[not capture], capture)
        return loss(moved if cache is None else NeuralCache(moved, cache), text)

    def exact() -> float:
        """The same on the CPU in float64."""
        wide = copy.deepcopy(model).cpu().double()  # type: ignore[attr-defined]
        return loss(
            DynamicEvaluation(wide, DYNAMIC, [r.cpu().double() for r in rms[next(iter(ways))]], False), few[:100]
        )

    for name, measured in (("the model alone", model), ("neural cache, window 500", NeuralCache(model, CacheConfig()))):
        loss(measured, few)
        row(name, lambda m=measured: loss(m), ids)
    ways = {True: "captured", False: "not captured"} if torch.cuda.is_available() else {False: "not captured"}
    rms: dict[bool, list] = {}
    few_batches, cache = dataclasses.replace(DYNAMIC, batches=3), CacheConfig(lambda_=0.05)
    for capture, name in ways.items():
        row(f"statistics of 3 batches, {name}", lambda c=capture: gradient_rms(model, train, boundary, few_batches, c))
        rms[capture] = row(f"statistics, {name}", lambda c=capture: gradient_rms(model, train, boundary, DYNAMIC, c))
    if torch.cuda.is_available():
        row("update, 30 times", lambda: update_bandwidth(model))
    if len(ways) == 2 and all(rms.values()):
        first, second = ([float(r.double().norm()) for r in rms[c]] for c in ways)
        apart = max(abs(a / b - 1) for a, b in zip(first, second, strict=True))
        print(f"norms of RMS, captured and not, differ by at most {apart:.2e}")
    row("dynamic evaluation, 100 tokens, CPU, float64", exact, few[:100])
    for capture, name in ways.items():
        row(f"dynamic evaluation, 100 tokens, {name}", lambda c=capture: dynamic(c, few[:100]), few[:100])
    for capture, name in ways.items():
        row(f"dynamic evaluation, {name}", lambda c=capture: dynamic(c), ids)
        row(f"dynamic evaluation with cache, {name}", lambda c=capture: dynamic(c, ids, cache), ids)


if __name__ == "__main__":
    main(*sys.argv[1:])
