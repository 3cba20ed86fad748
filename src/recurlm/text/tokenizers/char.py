"""One id a character; characters outside the vocabulary are spelled as their UTF-8 bytes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Self, final

import numpy as np

from recurlm.config import TokenizerConfig
from recurlm.text.tokenizers.base import Tokenizer, check_size, display, hugging_face, to_bytes, tokens_by_id

UNK = "<unk>"
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
_DECODER = {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]}
_CODE_POINTS = 0x110000


@final
class CharTokenizer(Tokenizer):
    """One id a Unicode scalar by frequency (ties: by code point), then 256 byte rows or one `<unk>` row.

    The newline is always in the vocabulary. With the byte rows every text comes back exactly.
    """

    kind = "char"

    def __init__(self, characters: str, byte_fallback: bool):
        self._characters, self._byte_fallback = characters, byte_fallback
        self.exact = byte_fallback
        self.boundary_id = characters.index("\n")
        self.unk_id = None if byte_fallback else len(characters)
        rows = [bytes([byte]) for byte in range(256)] if byte_fallback else [UNK.encode()]
        self.pieces = [c.encode() for c in characters] + rows
        self._lookup = np.full(_CODE_POINTS, -1 if byte_fallback else len(characters), np.int32)
        self._lookup[_code_points(characters)] = np.arange(len(characters))

    @classmethod
    def train(cls, texts: Iterable[str], config: TokenizerConfig) -> Self:
        rows = 256 if config.byte_fallback else 1
        check_size(config, rows + 1, f"the newline and {rows} rows for unknown characters")
        counts = np.zeros(_CODE_POINTS, np.int64)
        for text in texts:
            points = _code_points(text)
            if points.size:
                found = np.bincount(points)
                counts[: found.size] += found
        kept = np.flatnonzero(counts >= max(1, config.min_count))
        newline = ord("\n")
        ranked = [p for p in kept[np.argsort(-counts[kept], kind="stable")].tolist() if p != newline]
        if config.vocab_size:
            ranked = ranked[: config.vocab_size - rows - 1]
        ranked.append(newline)
        return cls("".join(map(chr, sorted(ranked, key=lambda p: (-counts[p], p)))), config.byte_fallback)

    @classmethod
    def from_model(cls, model: dict[str, Any]) -> Self:
        tokens = tokens_by_id(model["vocab"])
        rows = 256 if model["byte_fallback"] else 1
        characters = tokens[:-rows]
        if any(len(c) != 1 for c in characters) or tokens[-rows:] != (BYTES if rows == 256 else [UNK]):
            raise ValueError("its vocabulary is not characters and then the rows for unknown ones")
        return cls("".join(characters), rows == 256)

    def to_dict(self) -> dict[str, Any]:
        tokens = [*self._characters, *(BYTES if self._byte_fallback else [UNK])]
        model = {
            "type": "BPE",
            "unk_token": None if self._byte_fallback else UNK,
            "fuse_unk": False,
            "byte_fallback": self._byte_fallback,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": [],
        }
        return hugging_face(model, {"decoder": _DECODER})

    def encode_prefix(self, text: str) -> np.ndarray:
        points = _code_points(text)
        ids = self._lookup.take(points)
        unknown = ids < 0
        if not unknown.any():
            return ids.astype(np.int64)
        strange = points[unknown]
        lengths = np.ones(ids.size, np.int64)
        lengths[unknown] += (strange > 0x7F).astype(np.int64) + (strange > 0x7FF) + (strange > 0xFFFF)
        spelled = strange.astype("<u4").tobytes().decode("utf-32-le").encode()
        out = np.repeat(ids.astype(np.int64), lengths)
        out[out < 0] = np.frombuffer(spelled, np.uint8).astype(np.int64) + len(self._characters)
        return out

    @classmethod
    def cut(cls, text: str) -> int:
        return len(text)

    def token(self, id: int) -> str:
        return BYTES[id - len(self._characters)] if self.is_byte(id) else display(self.pieces[id])

    def is_byte(self, id: int) -> bool:
        return self._checked([id])[0] >= len(self._characters) and self._byte_fallback


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(to_bytes(text, "utf-32-le"), np.int32)
