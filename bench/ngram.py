"""What n-gram models cost and how good they are: from ids to a model that answers, and what the model answers.

Usage: python bench/ngram.py speed PTB_FOLDER        estimation; scoring beside kenlm where that is installed
       python bench/ngram.py large WT2_FOLDER [COPIES [memory|disk [LIMIT]]]
       python bench/ngram.py quality PTB_FOLDER      first guesses, keystrokes, the cache, smoothings, orders
       python bench/ngram.py predictions STORE RUN.. first guesses and keystrokes of any models of words on all of test

`large` makes a text of COPIES (13) shuffled copies of the train text in which a tenth of the words is drawn anew from their
frequencies (seed 0): 13 have 27 million tokens. LIMIT is what the database may take.
"""

import math
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numba
import numpy as np
import torch

from recurlm import api
from recurlm.config import TokenizerConfig
from recurlm.inference.mixture import Mixture, UnigramCache, fit_weights, losses
from recurlm.ngram import arpa, directory, run
from recurlm.ngram.counts import IN_MEMORY, count, in_files
from recurlm.ngram.model import NgramModel
from recurlm.ngram.smoothing import SMOOTHINGS, Settings, estimate
from recurlm.text.batches import measured_batches
from recurlm.text.store import open_store, prepare

COPIED = Settings(fallback=(0.5, 1, 1.5))  # no word of a text of copies is rare enough for discounts of its own


def store_of(folder: str, scratch: Path):
    """The word store of a data set's folder."""
    return prepare(folder, TokenizerConfig(kind="word"), scratch / "store")


def speed(folder: str) -> None:
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        store = store_of(folder, scratch)
        tokenizer, ids, test = store.tokenizer(), np.asarray(store.ids("train")), store.ids("test").astype(np.int64)
        boundary = tokenizer.boundary_id
        for order in (3, 5):
            times = []
            for _ in range(6):
                start = time.perf_counter()
                table, _ = estimate(count(ids, tokenizer.vocab_size, boundary, order), ids, None, Settings())
                model = NgramModel(table)
                times.append(time.perf_counter() - start)
            print(f"order {order}: ids to model {statistics.median(times[1:]):.3f} s (the first time {times[0]:.3f} s)")
        print(f"test perplexity {math.exp(run.mean_loss(model, test, boundary)):.3f}")
        start = time.perf_counter()
        directory.write(scratch, table, tokenizer.to_json(), {}, {})
        written = time.perf_counter()
        model, _ = directory.read(scratch)
        size = (scratch / directory.WEIGHTS).stat().st_size
        print(f"written {written - start:.3f} s, opened {time.perf_counter() - written:.3f} s, {size / 1e6:.1f} MB")
        lines = (Path(folder) / "test.txt").read_text().splitlines()
        encoded = [tokenizer.encode(line) for line in lines]
        train = ids.astype(np.int64)
        ours = {
            "test, in a batch": (len(test), lambda: run.mean_loss(model, test, boundary)),
            "train, in a batch": (len(train), lambda: run.mean_loss(model, train, boundary)),
            "test, line by line": (len(test), lambda: [model.trace(line, boundary) for line in encoded]),
        }
        for what, (tokens, function) in ours.items():
            print(f"{what}: {1e9 * best(function) / tokens:.0f} ns a token")
        try:
            import kenlm  # type: ignore[import-not-found]
        except ImportError:
            print("kenlm is not installed: nothing to compare with")
            return
        arpa.write(scratch / "model.arpa", table, tokenizer)
        theirs = kenlm.Model(str(scratch / "model.arpa"))
        written_lines = {
            "test": [line.strip().replace("<unk>", arpa.PLACEHOLDER) for line in lines],
            "train": [
                line.strip().replace("<unk>", arpa.PLACEHOLDER)
                for line in (Path(folder) / "train.txt").read_text().splitlines()
            ],
        }
        for what, tokens in (("test", len(test)), ("train", len(train))):
            seconds = best(lambda what=what: [theirs.score(line) for line in written_lines[what]])
            print(f"kenlm.Model.score, {what}: {1e9 * seconds / tokens:.0f} ns a token")
        far = max(
            abs(theirs.score(a) - model.trace(b, boundary)[0])
            for a, b in zip(written_lines["test"], encoded, strict=True)
        )
        print(f"largest difference of a sentence's log10 p: {far:.1e}")


def best(function, repeats: int = 5) -> float:
    """Seconds of the fastest call."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def copies(ids: np.ndarray, number: int, boundary: int, file: Path) -> np.memmap:
    """Shuffled copies of a text's lines in a file, a tenth of the words drawn anew from their frequencies."""
    rng = np.random.default_rng(0)
    ends = np.flatnonzero(ids == boundary) + 1
    starts, words = np.concatenate(([0], ends[:-1])), ids[ids != boundary]
    with file.open("wb") as out:
        for _ in range(number):
            order = rng.permutation(len(ends))
            text = np.concatenate([ids[starts[i] : ends[i]] for i in order])
            swap = (rng.random(len(text)) < 0.1) & (text != boundary)
            text[swap] = rng.choice(words, int(swap.sum()))
            text.tofile(out)
    return np.memmap(file, ids.dtype, "r")


def large(folder: str, number: int = 13, where: str = "", limit: str = "1200MB") -> None:
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        store = store_of(folder, scratch)
        tokenizer = store.tokenizer()
        ids = copies(np.asarray(store.ids("train")), number, tokenizer.boundary_id, scratch / "ids")
        on_disk = len(ids) > IN_MEMORY if not where else where == "disk"
        estimate_small(ids, tokenizer)  # compiled functions are loaded before the clock starts
        print(f"{len(ids):,} tokens, {'on the disk' if on_disk else 'in memory'}; so far {peak():,.0f} MB")
        start = time.perf_counter()
        counts = count(
            ids,
            tokenizer.vocab_size,
            tokenizer.boundary_id,
            5,
            out_of_core=on_disk,
            memory_limit=limit,
            scratch=scratch,
        )
        counted = time.perf_counter()
        print(f"counted {counted - start:.1f} s, {peak():,.0f} MB; n-grams {np.diff(counts.trie.levels).tolist()}")
        table, facts = estimate(counts, ids, None, COPIED, in_files(scratch) if on_disk else np.empty)
        estimated = time.perf_counter()
        print(f"estimated {estimated - counted:.1f} s, {peak():,.0f} MB; discounts {facts['discounts'][-1]}")
        del counts
        print(f"ids to a model that answers: {estimated - start:.1f} s")
        directory.write(scratch, table, tokenizer.to_json(), {}, {})
        model, _ = directory.read(scratch)
        print(f"written and opened {time.perf_counter() - estimated:.1f} s, {peak():,.0f} MB")
        loss = run.mean_loss(model, store.ids("test"), tokenizer.boundary_id)
        size = (scratch / directory.WEIGHTS).stat().st_size
        print(f"test perplexity {math.exp(loss):.3f}; {size / 1e6:,.0f} MB on the disk; peak {peak():,.0f} MB")


def estimate_small(ids: np.ndarray, tokenizer) -> None:
    part = np.asarray(ids[:200_000])
    estimate(count(part, tokenizer.vocab_size, tokenizer.boundary_id, 5), part, None, COPIED)


def peak() -> float:
    """The most memory that this process has taken so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


@numba.njit(cache=True)
def ranks_by_prefix(p_V, target, letters, lengths, out):
    """out[k] = the rank of the target among the words that begin with its first k letters."""
    for k in range(lengths[target] + 1):
        out[k] = 1
    for w in range(p_V.size):
        if p_V[w] > p_V[target]:
            k = 0
            out[0] += 1
            while k < lengths[target] and k < lengths[w] and letters[w, k] == letters[target, k]:
                k += 1
                out[k] += 1


def quality(folder: str) -> None:
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        store = store_of(folder, scratch)
        tokenizer, boundary = store.tokenizer(), store.tokenizer().boundary_id
        train, valid, test = (np.asarray(store.ids(split)) for split in ("train", "valid", "test"))
        for order in range(1, 7):
            counts, row = count(train, tokenizer.vocab_size, boundary, order), []
            for smoothing in SMOOTHINGS:
                settings = Settings(smoothing=smoothing, fallback=(0.5, 1, 1.5))
                table, facts = estimate(counts, train, valid, settings)
                scores = "" if facts.get("normalised", True) else " (scores, no probabilities)"
                row.append(f"{smoothing} {math.exp(run.mean_loss(NgramModel(table), test, boundary)):.2f}{scores}")
            print(f"order {order}: " + ", ".join(row))
        table, _ = estimate(count(train, tokenizer.vocab_size, boundary, 5), train, None, Settings())
        model = NgramModel(table)
        held_out = measured_batches(valid, "stream", 1, boundary, "exact", 1024)
        for window in (100, 200, 300, 500, 1000):
            parts = [model, UnigramCache(model.vocab_size, window)]
            weights, loss = fit_weights(losses(parts, held_out, 1024))
            mixed = losses(
                [Mixture(parts, weights)], measured_batches(test, "stream", 1, boundary, "exact", 1024), 1024
            )
            print(
                f"with a cache of {window}: weight {weights[1]:.4f}, valid {math.exp(loss):.3f}, test {math.exp(mixed.mean()):.3f}"
            )
        predictions(model, test, tokenizer)


def predictions_of(folder: str, *runs: str) -> None:
    store = open_store(folder)
    for name in runs:
        start, loaded = time.perf_counter(), api.load(name)
        print(f"{name}, {loaded.parameters:,} parameters, on {loaded.model.device}", flush=True)
        predictions(loaded.model, np.asarray(store.ids("test")), store.tokenizer())
        print(f"{time.perf_counter() - start:.0f} s", flush=True)


@torch.inference_mode()
def predictions(model, test: np.ndarray, tokenizer) -> None:
    """Prints how often a word is among the first guesses, and the share of keys that lists of guesses save.

    A word costs its letters and a space; accepting it from a list is one key. Line ends and <unk> are not typed.
    """
    pieces = tokenizer.pieces
    lengths = np.array([len(piece) for piece in pieces])
    letters = np.zeros((len(pieces), lengths.max()), np.uint8)
    for w, piece in enumerate(pieces):
        letters[w, : len(piece)] = np.frombuffer(piece, np.uint8)
    lengths[[tokenizer.boundary_id, tokenizer.unk_id]] = 0
    hits, keys, typed, sizes = np.zeros(3), 0, np.zeros(3, int), (1, 3, 5)
    inputs, state, out = (
        np.concatenate(([tokenizer.boundary_id], test[:-1])),
        model.initial_state(1),
        np.zeros(lengths.max() + 1, int),
    )
    for start in range(0, len(test), 256):
        part = torch.from_numpy(inputs[start : start + 256].astype(np.int64)).to(model.device)
        log_probs_TBV, state = model.advance(part[:, None], state)
        log_probs_TV = log_probs_TBV[:, 0].float().cpu().numpy()
        for log_probs_V, target in zip(log_probs_TV, test[start : start + 256].tolist(), strict=True):
            ranks_by_prefix(log_probs_V, target, letters, lengths, out)
            hits += [out[0] <= k for k in sizes]
            if size := int(lengths[target]):
                keys += size + 1
                for n, k in enumerate(sizes):
                    first = np.flatnonzero(out[: size + 1] <= k)
                    typed[n] += min(int(first[0]) + 1, size + 1) if first.size else size + 1
    for k, hit, pressed in zip(sizes, hits, typed, strict=True):
        print(
            f"top {k}: {hit / len(test):.4f} of {len(test):,} targets, {1 - pressed / keys:.4f} of {keys:,} keys saved"
        )


if __name__ == "__main__":
    verbs = {"speed": speed, "large": large, "quality": quality, "predictions": predictions_of}
    if len(sys.argv) < 3 or sys.argv[1] not in verbs:
        sys.exit(__doc__)
    if sys.argv[1] == "large":
        large(sys.argv[2], *map(int, sys.argv[3:4]), *sys.argv[4:])
    else:
        verbs[sys.argv[1]](*sys.argv[2:])
