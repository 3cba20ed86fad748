"""Unigram language model over byte-level pieces (Kudo 2018), trained and run by the `tokenizers` library."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Self, final

import numpy as np
from tokenizers import models, trainers

from recurlm.config import TokenizerConfig
from recurlm.text.tokenizers import byte_level
from recurlm.text.tokenizers.base import Tokenizer, hugging_face
from recurlm.text.tokenizers.byte import SPELLING

# The library adds floats in an order that changes from run to run: scores differ in the 14th digit, and the
# bytes that the text lacks get the lowest score plus a multiple of 1e-4 that is drawn anew each time.
_DIGITS = 4
_UNSEEN = 256.5e-4
# Of the pieces left, this part survives each round. The library's 0.75 gives 0.3 % fewer tokens on WikiText-2 and
# takes up to 8 times as long on a text of many words.
_SHRINKING = 0.5


@final
class UnigramTokenizer(Tokenizer):
    """The most probable pieces of each part of the text, 8000 ids unless configured otherwise; exact for any text.

    A segmentation's probability is the product of its pieces' (Kudo 2018, eq. 2 and 5); the pieces come from the
    first 16 million characters of the training text, and ids are in order of frequency there.
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
        room = byte_level.SAMPLE
        for text in texts:  # what the library needs grows with the words it has seen
            sample.append(text[:room])
            room -= len(text)
            if room <= 0:
                break
        size = config.vocab_size or byte_level.DEFAULT_SIZE
        trainer = trainers.UnigramTrainer(
            vocab_size=size,
            initial_alphabet=SPELLING,
            special_tokens=[],
            show_progress=False,
            shrinking_factor=_SHRINKING,
        )
        scores = dict(byte_level.train(models.Unigram(), trainer, sample)["vocab"])
        lowest = min(scores.values())
        for byte in SPELLING:
            if scores[byte] < lowest + _UNSEEN:
                scores[byte] = lowest
        rounded = [[token, round(score, _DIGITS)] for token, score in scores.items()]
        rounded.sort(key=lambda entry: (len(entry[0]) > 1, -entry[1], entry[0]))
        first = cls(rounded[:size])
        found = byte_level.counts(first, sample)
        kept = [len(p) == 1 or n >= byte_level.DEFAULT_COUNT for p, n in zip(first.pieces, found, strict=True)]
        if not config.vocab_size and not all(kept):
            first = cls([entry for entry, keep in zip(first._vocab, kept, strict=True) if keep])
            found = byte_level.counts(first, sample)
        order = np.argsort(-found, kind="stable")
        return cls([first._vocab[i] for i in order])

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
