"""What every tokenizer answers, and the helpers they share."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np

from recurlm.config import TokenizerConfig
from recurlm.errors import ConfigError, RequestError


class Tokenizer(ABC):
    """Text to ids and back; immutable.

    Ids of a text are the ids of its lines, one after another, so a text can be read in blocks of whole lines.
    Inside a line it can be cut where `cut` says. Nothing a user types is ever a control token.
    """

    kind: ClassVar[str]
    reads_bytes: ClassVar[bool] = False
    """True when `encode_prefix` takes raw bytes as well, valid UTF-8 or not."""
    exact: bool = True
    """Whether any text comes back from its ids as it was."""
    line_end: ClassVar[str] = ""
    """What `encode` adds to a last line without a newline."""
    unk_id: int | None = None
    boundary_id: int
    """The id that ends a line, and that a model is started with."""
    pieces: Sequence[bytes]
    """What each id spells, as bytes of UTF-8."""

    @classmethod
    @abstractmethod
    def train(cls, texts: Iterable[str], config: TokenizerConfig) -> Self:
        """A tokenizer whose vocabulary is that of the texts (blocks of whole lines, read once)."""

    @classmethod
    @abstractmethod
    def from_model(cls, model: dict[str, Any]) -> Self:
        """The tokenizer of the `model` table of a tokenizer.json. Any exception means: not of this kind."""

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """The content of the tokenizer.json, as the `tokenizers` library defines it."""

    @abstractmethod
    def encode_prefix(self, text: str) -> np.ndarray:
        """Ids (int64, 1-D) of a text that goes on: its last line is not ended. For prompts and blocks."""

    @classmethod
    @abstractmethod
    def cut(cls, text: str) -> int:
        """A place p where ids of text[:p] and then of all that follows are those of the whole; 0 = none."""

    def encode(self, text: str) -> np.ndarray:
        """Ids (int64, 1-D) of a whole text. RequestError for a lone surrogate, which UTF-8 cannot spell."""
        return self.encode_prefix(text if not text or text.endswith("\n") else text + self.line_end)

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        """The text that the ids spell; bytes that are not UTF-8 become U+FFFD. RequestError for a bad id."""
        pieces = self.pieces
        return b"".join([pieces[i] for i in self._checked(ids)]).decode("utf-8", "replace")

    def token(self, id: int) -> str:
        """One id in printable characters: "\\n" for a newline, <0xE2> for a byte that is no character."""
        return display(self.pieces[self._checked([id])[0]])

    def is_byte(self, id: int) -> bool:
        """Whether an id is one of the bytes that spell characters outside the vocabulary."""
        try:
            self.pieces[self._checked([id])[0]].decode()
        except UnicodeDecodeError:
            return True
        return False

    def to_json(self) -> str:
        """The tokenizer.json: `tokenizers.Tokenizer.from_str` loads it and gives the same ids."""
        return json.dumps(self.to_dict(), ensure_ascii=False, separators=(",", ":")) + "\n"

    def save(self, path: str | Path) -> None:
        """None; writes the tokenizer.json at `path`."""
        Path(path).write_text(self.to_json(), encoding="utf-8", newline="\n")

    @property
    def vocab_size(self) -> int:
        return len(self.pieces)

    @property
    def hash(self) -> str:
        """sha256 of the tokenizer.json, in hexadecimal."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def _checked(self, ids: Iterable[int] | np.ndarray) -> list[int]:
        values = ids.tolist() if isinstance(ids, np.ndarray) else [int(i) for i in ids]
        if values and not (min(values) >= 0 and max(values) < self.vocab_size):
            bad = min(values) if min(values) < 0 else max(values)
            raise RequestError(f"Token id {bad} is outside this {self.kind} vocabulary, 0 to {self.vocab_size - 1}.")
        return values


def display(piece: bytes) -> str:
    """The bytes as printable text, with Python's escapes; <0xXX> for each when they are not UTF-8."""
    try:
        text = piece.decode()
    except UnicodeDecodeError:
        return "".join(f"<0x{byte:02X}>" for byte in piece)
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def to_bytes(text: str, encoding: str = "utf-8") -> bytes:
    """The text in that encoding; RequestError for a lone surrogate."""
    try:
        return text.encode(encoding)
    except UnicodeEncodeError as error:
        raise RequestError(
            f"The text holds a lone surrogate at character {error.start}, which is no character; remove it."
        ) from None


def check_size(config: TokenizerConfig, least: int, why: str) -> None:
    """None; ConfigError when the vocabulary asked for is smaller than `least` ids."""
    if 0 < config.vocab_size < least:
        raise ConfigError(
            f"tokenizer.vocab_size = {config.vocab_size} is too small for {config.kind}: "
            f"expected at least {least} ({why}), or 0 for the default."
        )


def hugging_face(model: dict[str, Any], parts: dict[str, Any]) -> dict[str, Any]:
    """A tokenizer.json around `model`; parts: normalizer, pre_tokenizer, decoder."""
    empty = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
    head: dict[str, Any] = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": []}
    return head | dict.fromkeys(empty) | parts | {"model": model}


def tokens_by_id(vocab: dict[str, int]) -> list[str]:
    """The tokens in the order of their ids; ValueError unless the ids are 0, 1, 2 and so on."""
    tokens = sorted(vocab, key=vocab.__getitem__)
    if [vocab[token] for token in tokens] != list(range(len(tokens))):
        raise ValueError("its ids are not 0, 1, 2 and so on")
    return tokens
