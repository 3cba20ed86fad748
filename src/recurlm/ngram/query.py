"""What a model knows of a text: for each word the n-gram that gave its probability."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from recurlm.ngram.model import NgramModel
from recurlm.text.tokenizers import Tokenizer


@dataclass(frozen=True)
class Found:
    """A token, log10 p of it given the line before it, and how many words of the line, itself the last, were found as one
    n-gram: 0 for a word that the model does not know."""

    token: str
    log10: float
    length: int


def explain(model: NgramModel, tokenizer: Tokenizer, line: str) -> list[Found]:
    """A Found for each token of a line, its end the last."""
    ids = tokenizer.encode(line)
    if not len(ids) or ids[-1] != tokenizer.boundary_id:
        ids = np.append(ids, tokenizer.boundary_id)
    _, log10_T, nodes_T = model.trace(ids, tokenizer.boundary_id)
    rows = zip(ids.tolist(), log10_T.tolist(), model.matched(nodes_T).tolist(), strict=True)
    return [Found(tokenizer.token(id), log10, length) for id, log10, length in rows]


def by_length(lines: Iterable[list[Found]]) -> list[dict[str, float | int]]:
    """For each length of n-gram that was found: length, tokens, their share, their perplexity; last of all tokens, as length -1."""
    found = [one for line in lines for one in line]
    groups = {length: [f.log10 for f in found if f.length == length] for length in sorted({f.length for f in found})}
    groups[-1] = [f.log10 for f in found]
    return [
        {
            "length": length,
            "tokens": len(logs),
            "share": len(logs) / len(found),
            "ppl": 10 ** min(-math.fsum(logs) / len(logs), 300),
        }
        for length, logs in groups.items()
    ]
