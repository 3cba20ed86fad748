"""One id a byte: its value. The only tokenizer that takes bytes which are not UTF-8."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Self, final

import numpy as np

from recurlm.config import TokenizerConfig
from recurlm.text.tokenizers.base import Tokenizer, check_size, hugging_face, to_bytes, tokens_by_id

# The `tokenizers` library spells each byte as one printable character: printable Latin-1 as itself, the
# others in order from U+0100 on (the byte alphabet of GPT-2).
_PRINTABLE = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
SPELLING = [chr(byte if byte in _PRINTABLE else 0x100 + _OTHERS.index(byte)) for byte in range(256)]
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


@final
class ByteTokenizer(Tokenizer):
    """256 ids, the values of bytes; exact for any bytes."""

    kind = "byte"
    reads_bytes = True
    boundary_id = ord("\n")
    pieces = tuple(bytes([byte]) for byte in range(256))

    @classmethod
    def train(cls, texts: Iterable[str], config: TokenizerConfig) -> Self:
        check_size(config, 256, "one for each byte")
        return cls()

    @classmethod
    def from_model(cls, model: dict[str, Any]) -> Self:
        if tokens_by_id(model["vocab"]) != SPELLING:
            raise ValueError("its vocabulary is not the 256 bytes")
        return cls()

    def to_dict(self) -> dict[str, Any]:
        vocab = {token: byte for byte, token in enumerate(SPELLING)}
        return hugging_face(
            {"type": "BPE", "vocab": vocab, "merges": []}, {"pre_tokenizer": BYTE_LEVEL, "decoder": BYTE_LEVEL}
        )

    def encode_prefix(self, text: str | bytes) -> np.ndarray:
        data = text if isinstance(text, bytes) else to_bytes(text)
        return np.frombuffer(data, np.uint8).astype(np.int64)

    def is_byte(self, id: int) -> bool:
        return False  # nothing is outside its vocabulary

    @classmethod
    def cut(cls, text: str) -> int:
        return len(text)
