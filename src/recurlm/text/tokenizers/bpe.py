"""Byte-level BPE, trained and run by the `tokenizers` library."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any, Self, final

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from recurlm.config import TokenizerConfig
from recurlm.errors import ConfigError
from recurlm.text.tokenizers.base import Tokenizer, check_size, hugging_face, to_bytes, tokens_by_id
from recurlm.text.tokenizers.byte import BYTE_LEVEL, SPELLING

DEFAULT_COUNT = 10  # a rarer pair stays two tokens, so that a small text gets a small vocabulary
LARGEST = 1 << 20  # the library asks for memory in proportion
DEFAULT_SIZE = 8000
# Left to right, nothing looks back: a newline; a short ending ('s, 'll); letters, digits or signs with one
# space before them at most; white space, less the one space that goes to what follows. No part is longer than
# 65 characters, so that time is linear in any text, and none crosses a newline.
_PARTS = (
    r"\n|'(?:[sdmt]|ll|ve|re)(?![\p{L}\p{M}])| ?[\p{L}\p{M}]{1,64}| ?\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{M}\p{N}]{1,64}|[^\S\n]{1,64}(?!\S)|[^\S\n]{1,64}"
)
_LOOK = 8  # more characters than any part looks at beyond its end
_SPLIT = {"type": "Split", "pattern": {"Regex": _PARTS}, "behavior": "Isolated", "invert": False}
_RANKING = 16 << 20  # characters of training text whose tokens are counted to order the ids
_CHUNK = 1 << 15  # characters that one call of the library's thread pool gets as one item
_VALUE = {token: byte for byte, token in enumerate(SPELLING)}


def _splitter() -> pre_tokenizers.PreTokenizer:
    split = pre_tokenizers.Split(tokenizers.Regex(_PARTS), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


@final
class BpeTokenizer(Tokenizer):
    """Byte-level BPE over the 256 bytes, 8000 ids unless configured otherwise; exact for any text.

    Ids are in order of frequency in the first 16 million characters of the training text.
    """

    kind = "bpe"

    def __init__(self, tokens: list[str], merges: list[list[str]]):
        self._tokens, self._merges = tokens, merges
        self.pieces = [bytes(_VALUE[c] for c in token) for token in tokens]
        self.boundary_id = self.pieces.index(b"\n")
        self._library = tokenizers.Tokenizer.from_str(self.to_json())

    @classmethod
    def train(cls, texts: Iterable[str], config: TokenizerConfig) -> Self:
        check_size(config, 256, "one for each byte")
        sample: list[str] = []

        def watched() -> Iterator[str]:
            room = _RANKING
            for text in texts:
                to_bytes(text)
                if room > 0:
                    sample.append(text)
                    room -= len(text)
                yield from _chunks(text)

        if config.vocab_size > LARGEST:
            raise ConfigError(f"tokenizer.vocab_size = {config.vocab_size}: expected at most {LARGEST:,} for bpe.")
        library = tokenizers.Tokenizer(models.BPE())
        library.pre_tokenizer = _splitter()
        library.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=config.vocab_size or DEFAULT_SIZE,
            min_frequency=0 if config.vocab_size else DEFAULT_COUNT,
            initial_alphabet=SPELLING,
            show_progress=False,
        )
        library.train_from_iterator(watched(), trainer)
        model = json.loads(library.to_str())["model"]
        first = cls(tokens_by_id(model["vocab"]), [list(pair) for pair in model["merges"]])
        counts = np.zeros(first.vocab_size, np.int64)
        for text in sample:
            counts += np.bincount(first.encode_prefix(text), minlength=first.vocab_size)
        order = np.argsort(-counts, kind="stable")
        return cls([first._tokens[i] for i in order], first._merges)

    @classmethod
    def from_model(cls, model: dict[str, Any]) -> Self:
        tokens = tokens_by_id(model["vocab"])
        if not set(SPELLING) <= set(tokens):
            raise ValueError("its vocabulary lacks some of the 256 bytes")
        return cls(tokens, model["merges"])

    def to_dict(self) -> dict[str, Any]:
        vocab = {token: i for i, token in enumerate(self._tokens)}
        return hugging_face(
            {"type": "BPE", "vocab": vocab, "merges": self._merges},
            {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [_SPLIT, BYTE_LEVEL]}, "decoder": BYTE_LEVEL},
        )

    def encode_prefix(self, text: str) -> np.ndarray:
        to_bytes(text)
        parts = self._library.encode_batch_fast(list(_chunks(text)), add_special_tokens=False)
        return np.concatenate([np.empty(0, np.int64), *(np.array(part.ids, np.int64) for part in parts)])

    @classmethod
    def cut(cls, text: str) -> int:
        space = text.rfind(" ", 1)
        while space > 0 and text[space - 1].isspace():
            space = text.rfind(" ", 1, space)
        if space > 0:
            return space  # a part never goes on with a space
        ends = [end for _, (_, end) in _splitter().pre_tokenize_str(text) if end <= len(text) - _LOOK]
        return ends[-1] if ends else 0


def _chunks(text: str) -> Iterator[str]:
    """The text in chunks that end with a line, the last one excepted."""
    start = 0
    while start < len(text):
        end = text.find("\n", start + _CHUNK) + 1 or len(text)
        yield text[start:end]
        start = end
