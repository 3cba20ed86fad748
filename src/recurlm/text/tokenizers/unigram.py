"""Unigram language model over byte-level pieces (Kudo 2018), run by the `tokenizers` library."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Self, final

import numpy as np
from tokenizers import models, trainers

from recurlm.config import TokenizerConfig
from recurlm.text.tokenizers import byte_level
from recurlm.text.tokenizers.base import Tokenizer, hugging_face, tokens_by_id
from recurlm.text.tokenizers.byte import SPELLING

# The library's own trainer is not used: its result changes from run to run, and as it starts from how many words
# a substring is in, not from how often it comes, it needs a third more tokens than bpe for the same text.
_SAMPLE = 4 << 20  # characters of training text that the pieces are taken from
_SEEDS = 2  # candidates for each piece wanted
_LONGEST = 16  # bytes of a piece
_STEPS = 2  # of EM before pieces are removed
_KEPT = 0.75  # of the pieces, each time


@final
class UnigramTokenizer(Tokenizer):
    """The most probable pieces of each part of the text, 8000 ids unless configured otherwise; exact for any text.

    A segmentation's probability is the product of its pieces' (Kudo 2018, eq. 2 and 5). Candidates are the tokens
    of a larger bpe; probabilities are their shares in the most probable segmentations (EM, Viterbi's version), and
    those pieces go whose loss costs the text's likelihood least (section 3.2). The pieces come from the first
    4 million characters of the training text; ids are in order of frequency there.
    """

    kind = "unigram"

    def __init__(self, vocab: list[list[Any]]):
        self._vocab = vocab
        self.pieces = byte_level.pieces(token for token, _ in vocab)
        if not all(score <= 0 for _, score in vocab):
            raise ValueError("a score is not the logarithm of a probability")
        self.boundary_id = self.pieces.index(b"\n")
        self._library = byte_level.load(self.to_json())

    @classmethod
    def train(cls, texts: Iterable[str], config: TokenizerConfig) -> Self:
        byte_level.check(config)
        sample: list[str] = []
        room = _SAMPLE
        for text in texts:
            sample.append(text[:room])
            room -= len(text)
            if room <= 0:
                break
        size = config.vocab_size or byte_level.DEFAULT_SIZE
        least = 1 if config.vocab_size else byte_level.DEFAULT_COUNT
        trainer = trainers.BpeTrainer(
            vocab_size=_SEEDS * size,
            min_frequency=2 * least if config.vocab_size else least,
            initial_alphabet=SPELLING,
            max_token_length=_LONGEST,
            show_progress=False,
        )
        tokens = tokens_by_id(byte_level.train(models.BPE(), trainer, sample)["vocab"])
        vocab = [[token, round(-math.log(len(tokens)), 4)] for token in tokens]
        while True:
            for _ in range(_STEPS):
                found = byte_level.counts(cls(vocab), sample)
                vocab = _scored([token for token, _ in vocab], found)
            pairs = zip(vocab, found.tolist(), strict=True)
            kept = [(entry, n) for entry, n in pairs if n >= least or len(entry[0]) == 1]
            if len(kept) > size:
                kept = _pruned(kept, max(size, int(_KEPT * len(kept))))
            done = len(kept) <= size
            vocab = [entry for entry, _ in kept]
            if done:
                break
        order = np.argsort(-byte_level.counts(cls(vocab), sample), kind="stable")
        return cls([vocab[i] for i in order])

    @classmethod
    def from_model(cls, model: dict[str, Any]) -> Self:
        return cls([[str(token), float(score)] for token, score in model["vocab"]])

    def to_dict(self) -> dict[str, Any]:
        model = {"type": "Unigram", "unk_id": None, "vocab": self._vocab, "byte_fallback": False}
        return hugging_face(model, byte_level.SPLITTING)

    def encode_prefix(self, text: str) -> np.ndarray:
        return byte_level.encode(self._library, text)

    @classmethod
    def cut(cls, text: str) -> int:
        return byte_level.cut(text)


def _scored(tokens: list[str], found: np.ndarray) -> list[list[Any]]:
    """[token, log-probability] of each: its share of all that was found; half a find for what was not."""
    scores = np.log(np.maximum(found, 0.5) / max(1, found.sum()))
    return [[token, min(0.0, round(score, 4))] for token, score in zip(tokens, scores.tolist(), strict=True)]


def _pruned(entries: list[tuple[list[Any], int]], size: int) -> list[tuple[list[Any], int]]:
    """The bytes, and of the others those whose removal would cost most: frequency times the loss of log-probability."""
    scores = {token: score for (token, score), _ in entries}

    def cost(entry: tuple[list[Any], int]) -> float:
        (token, score), frequency = entry
        return math.inf if len(token) == 1 else frequency * (score - _without(token, scores))

    return sorted(entries, key=lambda entry: (-cost(entry), entry[0][0]))[:size]


def _without(token: str, scores: dict[str, float]) -> float:
    """The log-probability of the best segmentation of a token into other ones."""
    best = [0.0] + [-math.inf] * len(token)
    for end in range(1, len(token) + 1):
        for start in range(end):
            if end - start < len(token) and (score := scores.get(token[start:end])) is not None:
                best[end] = max(best[end], best[start] + score)
    return best[-1]
