"""An n-gram model as a folder of the same files as a neural one, but memory-mapped."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Any

import numpy as np

from recurlm import files, tensors
from recurlm.errors import CheckpointError, RequestError, RunError
from recurlm.ngram.counts import MOST_ORDER
from recurlm.ngram.model import NgramModel
from recurlm.ngram.trie import MOST_NODES, Table, Trie, compiled, word_dtype

FORMAT = 1
MANIFEST, CONFIG, WEIGHTS, TOKENIZER, CARD = (
    "manifest.json",
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "README.md",
)


def exists(folder: Path) -> bool:
    """Whether the folder holds a published model."""
    return (folder / MANIFEST).is_file()


def write(folder: Path, table: Table, tokenizer_json: str, settings: dict[str, Any], facts: dict[str, Any]) -> None:
    """Publishes the model in a folder that holds none; it is there once its manifest is. RunError when the disk refuses."""
    trie = table.trie
    arrays = {
        "words": trie.words_K, "first": trie.first_I, "links": trie.links_K,
        "log10": table.log10_K, "backoff": table.backoff_I, "known": table.known_V.astype(np.uint8),
    }  # fmt: skip
    sizes = {"levels": list(trie.levels), "unk_log10": table.unk_log10}
    config = {"model_type": "recurlm", "kind": "ngram", "vocab_size": trie.vocab_size, "model": sizes | settings}
    texts = {CONFIG: files.to_json(config), TOKENIZER: tokenizer_json, CARD: card(table, settings, facts)}
    needed = sum(a.nbytes for a in arrays.values()) + sum(map(len, texts.values())) + (1 << 16)
    temporary = folder / f"{WEIGHTS}.tmp-{os.getpid()}"
    try:
        files.check_space(folder, needed)
        temporary.mkdir()
        tensors.write_arrays(temporary / WEIGHTS, arrays)
        for name, text in texts.items():
            (temporary / name).write_text(text, encoding="utf-8")
        described = {name: files.describe(temporary / name) for name in (CONFIG, TOKENIZER, WEIGHTS)}
        for name in (*described, CARD):
            files.publish(temporary / name, folder / name)
        manifest = {"format": FORMAT, "kind": "ngram", "facts": facts, "files": described}
        files.write_manifest(folder / MANIFEST, manifest)
    except OSError as error:
        raise RunError(f"{folder}: the model could not be saved ({files.reason(error, folder, needed)}).") from error
    finally:
        files.remove(temporary)


def read(folder: Path) -> tuple[NgramModel, dict[str, Any]]:
    """(model, manifest) of the folder, every listed file verified; CheckpointError naming the file otherwise."""
    manifest = files.read_manifest(folder / MANIFEST, FORMAT)
    listed = manifest["files"]
    if manifest.get("kind") == "neural":
        raise RequestError(f"{folder}: a neural model; expected the run directory of an n-gram model.")
    if manifest.get("kind") != "ngram" or not isinstance(manifest.get("facts"), dict):
        raise CheckpointError(f"{folder / MANIFEST}: not the manifest of an n-gram model.")
    for name in (CONFIG, TOKENIZER):
        if reason := files.fault(folder / name, listed.get(name)):
            raise CheckpointError(f"{folder / name}: {reason}.")
    try:
        config = files.parse_json(files.read_regular(folder / CONFIG, 1 << 20))
        levels, unk_log10 = tuple(config["model"]["levels"]), float(config["model"]["unk_log10"])
        if not (
            2 <= len(levels) <= MOST_ORDER + 1
            and all(type(n) is int for n in levels)
            and levels[0] == 0 < levels[1] == config["vocab_size"]
            and list(levels) == sorted(levels)
            and levels[-1] <= MOST_NODES
            and unk_log10 <= 0
        ):
            raise ValueError("its sizes are impossible")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / CONFIG}: not an n-gram model's configuration ({error}).") from None
    nodes, inner = levels[-1], levels[-2]
    expected = {
        "words": (np.dtype(word_dtype(levels[1])).name, (nodes,)), "first": ("int32", (inner + 1,)), "links": ("int32", (nodes,)),
        "log10": ("float32", (nodes,)), "backoff": ("float32", (inner,)), "known": ("uint8", (levels[1],)),
    }  # fmt: skip
    arrays = tensors.map_arrays(folder / WEIGHTS, listed.get(WEIGHTS), expected)
    if not _sound(np.array(levels), *(arrays[name] for name in ("words", "first", "links", "log10", "backoff"))):
        raise CheckpointError(f"{folder / WEIGHTS}: its n-grams are not in order, or a number is not possible.")
    trie = Trie(levels, arrays["words"], arrays["first"], arrays["links"])
    table = Table(trie, arrays["log10"], arrays["backoff"], arrays["known"].astype(np.bool_), unk_log10)
    return NgramModel(table), manifest


@compiled
def _sound(levels, words_K, first_I, links_K, log10_K, backoff_I):
    """Whether every index leads to where walking expects it, and every number is one: after that nothing is checked again."""
    vocab, inner = levels[1], first_I.size - 1
    for w in range(vocab):
        if words_K[w] != w or links_K[w] != -1:
            return False
    if first_I[inner] != levels[-1]:
        return False
    for order in range(1, levels.size - 1):
        if first_I[levels[order - 1]] != levels[order]:
            return False
        for context in range(levels[order - 1], levels[order]):
            begin, end = first_I[context], first_I[context + 1]
            if begin > end or end > levels[order + 1] or not np.isfinite(backoff_I[context]):
                return False
            for child in range(begin, end):
                if child > begin and words_K[child] <= words_K[child - 1]:
                    return False
                if words_K[child] >= vocab or not 0 <= links_K[child] < levels[order]:
                    return False
    for node in range(levels[-1]):  # noqa: SIM110
        if not -1000 <= log10_K[node] <= 0:
            return False
    return True


def card(table: Table, settings: dict[str, Any], facts: dict[str, Any]) -> str:
    """The README.md: what the model is."""
    levels = table.trie.levels
    sizes = ", ".join(f"{b - a:,}" for a, b in itertools.pairwise(levels))
    measured = "" if facts.get("ppl") is None else f"| measured | perplexity {facts['ppl']:.2f} on the valid split |\n"
    described = ", ".join(f"{name} {value}" for name, value in settings.items() if value)
    return f"""---
library_name: recurlm
tags: [language-model, n-gram]
---
# An n-gram language model

| | |
|---|---|
| order | {table.trie.order} |
| n-grams of each order | {sizes} |
| made by | {described} |
{measured}
```python
import recurlm

model = recurlm.load("this folder")
model.score("some text")
model.generate("some text", tokens=50, seed=1)
```
"""
