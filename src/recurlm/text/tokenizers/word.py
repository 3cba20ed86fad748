"""Words between white space, and `<eos>` at the end of each line: the tokens of PTB and WikiText."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from itertools import repeat
from typing import Any, Self, final

import numpy as np

from recurlm.config import TokenizerConfig
from recurlm.text.tokenizers.base import Tokenizer, check_size, hugging_face, to_bytes, tokens_by_id

EOS, UNK = "<eos>", "<unk>"
# White space is Python's: Unicode's, and the four separators U+001C to U+001F.
_LINE = "\n"  # counts lines while training: no word is a newline
_TYPED_EOS = re.compile(rf"(?<!\S){EOS}(?!\S)")
_NORMALIZERS = [
    {"type": "Replace", "pattern": {"Regex": rf"(?<![^\s\x1c-\x1f]){EOS}(?![^\s\x1c-\x1f])"}, "content": UNK},
    {"type": "Replace", "pattern": {"Regex": r"(?<=[^\n])\z"}, "content": "\n"},
    {"type": "Replace", "pattern": {"String": "\n"}, "content": f" {EOS} "},
]
_SPLIT = {"type": "Split", "pattern": {"Regex": r"[\s\x1c-\x1f]+"}, "behavior": "Removed", "invert": False}


@final
class WordTokenizer(Tokenizer):
    """One id a word, in order of frequency; `<eos>` a line; no lower-casing.

    Lines end at "\\n" only; an empty line is a lone `<eos>`. A word outside the vocabulary, a literal `<unk>`
    and a typed `<eos>` are the unknown id. Decoding gives one space between words: white space is not kept.
    """

    kind = "word"
    exact = False
    line_end = "\n"

    def __init__(self, words: list[str]):
        self.pieces = [to_bytes(word) for word in words]
        self._words = words
        self._ids = {word: i for i, word in enumerate(words)}
        self.unk_id, self.boundary_id = self._ids[UNK], self._ids[EOS]

    @classmethod
    def train(cls, texts: Iterable[str], config: TokenizerConfig) -> Self:
        check_size(config, 3, f"{EOS}, {UNK} and a word")
        counts: Counter[str] = Counter()
        for text in texts:
            counts.update(text.split())
            counts[_LINE] += text.count("\n")
        special = {EOS: counts.pop(_LINE, 0), UNK: counts.pop(UNK, 0) + counts.pop(EOS, 0)}
        ranked = [word for word, count in counts.most_common() if count >= config.min_count]
        if config.vocab_size:
            ranked = ranked[: config.vocab_size - 2]
        special[UNK] += counts.total() - sum(counts[word] for word in ranked)
        counts.update(special)
        return cls(sorted([*ranked, EOS, UNK], key=lambda word: -counts[word]))

    @classmethod
    def from_model(cls, model: dict[str, Any]) -> Self:
        words = tokens_by_id(model["vocab"])
        if any(word.split() != [word] for word in words):
            raise ValueError("a word of its vocabulary is empty or holds white space")
        return cls(words)

    def to_dict(self) -> dict[str, Any]:
        model = {"type": "WordLevel", "vocab": self._ids, "unk_token": UNK}
        return hugging_face(
            model, {"normalizer": {"type": "Sequence", "normalizers": _NORMALIZERS}, "pre_tokenizer": _SPLIT}
        )

    def encode_prefix(self, text: str) -> np.ndarray:
        to_bytes(text)
        if EOS in text:
            text = _TYPED_EOS.sub(UNK, text)
        words = text.replace("\n", f" {EOS} ").split()
        return np.fromiter(map(self._ids.get, words, repeat(self.unk_id)), np.int64, len(words))

    @classmethod
    def cut(cls, text: str) -> int:
        return len(text) if not text or text[-1].isspace() else len(text) - len(text.rsplit(None, 1)[-1])

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        words = [self._words[i] if i != self.boundary_id else "\n" for i in self._checked(ids)]
        return " ".join(words).replace(" \n", "\n").replace("\n ", "\n")
