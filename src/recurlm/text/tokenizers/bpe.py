"""Byte-level BPE (Sennrich et al. 2016; bytes as in GPT-2), trained and run by the `tokenizers` library."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Self, final

import numpy as np
from tokenizers import models, trainers

from recurlm.config import TokenizerConfig
from recurlm.text.tokenizers import byte_level
from recurlm.text.tokenizers.base import Tokenizer, hugging_face, tokens_by_id
from recurlm.text.tokenizers.byte import SPELLING


@final
class BpeTokenizer(Tokenizer):
    """Byte-level BPE over the 256 bytes, 8000 ids unless configured otherwise; exact for any text.

    Ids are in order of frequency in the first 16 million characters of the training text.
    """

    kind = "bpe"

    def __init__(self, tokens: list[str], merges: list[list[str]]):
        self._tokens, self._merges = tokens, merges
        self.pieces = byte_level.pieces(tokens)
        self.boundary_id = self.pieces.index(b"\n")
        self._library = byte_level.load(self.to_json())

    @classmethod
    def train(cls, texts: Iterable[str], config: TokenizerConfig) -> Self:
        byte_level.check(config)
        sample: list[str] = []

        def watched() -> Iterator[str]:
            room = byte_level.SAMPLE
            for text in texts:
                if room > 0:
                    sample.append(text)
                    room -= len(text)
                yield text

        trainer = trainers.BpeTrainer(
            vocab_size=config.vocab_size or byte_level.DEFAULT_SIZE,
            min_frequency=0 if config.vocab_size else byte_level.DEFAULT_COUNT,
            initial_alphabet=SPELLING,
            show_progress=False,
        )
        model = byte_level.train(models.BPE(), trainer, watched())
        first = cls(tokens_by_id(model["vocab"]), [list(pair) for pair in model["merges"]])
        order = np.argsort(-byte_level.counts(first, sample), kind="stable")
        return cls([first._tokens[i] for i in order], first._merges)

    @classmethod
    def from_model(cls, model: dict[str, Any]) -> Self:
        return cls(tokens_by_id(model["vocab"]), model["merges"])

    def to_dict(self) -> dict[str, Any]:
        vocab = {token: i for i, token in enumerate(self._tokens)}
        return hugging_face({"type": "BPE", "vocab": vocab, "merges": self._merges}, byte_level.SPLITTING)

    def encode_prefix(self, text: str) -> np.ndarray:
        return byte_level.encode(self._library, text)

    @classmethod
    def cut(cls, text: str) -> int:
        return byte_level.cut(text)
