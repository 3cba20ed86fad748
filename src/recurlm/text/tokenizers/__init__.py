"""Tokenizers: one file each, one line in TOKENIZERS."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from recurlm import files
from recurlm.config import TokenizerConfig
from recurlm.errors import DataError, UserError, lookup
from recurlm.text.tokenizers.base import Tokenizer
from recurlm.text.tokenizers.bpe import BpeTokenizer
from recurlm.text.tokenizers.byte import ByteTokenizer
from recurlm.text.tokenizers.char import CharTokenizer
from recurlm.text.tokenizers.unigram import UnigramTokenizer
from recurlm.text.tokenizers.word import WordTokenizer

__all__ = ["TOKENIZERS", "Tokenizer", "load_tokenizer", "train_tokenizer"]

MAX_FILE = 1 << 30

TOKENIZERS: dict[str, type[Tokenizer]] = {
    "word": WordTokenizer,
    "char": CharTokenizer,
    "byte": ByteTokenizer,
    "bpe": BpeTokenizer,
    "unigram": UnigramTokenizer,
}


def train_tokenizer(texts: Iterable[str], config: TokenizerConfig) -> Tokenizer:
    """The tokenizer of `config`, with its vocabulary from the texts (blocks of whole lines, read once)."""
    return lookup(TOKENIZERS, config.kind, "tokenizer.kind").train(texts, config)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer saved at `path`. UserError for a missing file, DataError for one not written by recurlm.

    The kind is that whose tokenizer.json, made anew from the file's model, has the content of the file.
    """
    try:
        content = files.parse_json(files.read_regular(Path(path), MAX_FILE))
        model = content["model"]
    except OSError as error:
        raise UserError(f"{path}: cannot read this tokenizer: {error.strerror}.") from None
    except (ValueError, TypeError, KeyError):
        raise DataError(f"{path}: not a tokenizer.json (expected JSON with a `model` table).") from None
    for cls in TOKENIZERS.values():
        if (tokenizer := _of_kind(cls, model)) is not None and tokenizer.to_dict() == content:
            return tokenizer
    raise DataError(
        f"{path}: this tokenizer.json is damaged or not one that recurlm writes ({', '.join(TOKENIZERS)}); "
        "train a tokenizer with `recurlm data prepare`."
    )


def _of_kind(cls: type[Tokenizer], model: Any) -> Tokenizer | None:
    """The tokenizer of that kind with the model; None when the model is of another kind or cannot work."""
    try:
        return cls.from_model(model)
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except (
        BaseException
    ):  # the file is a stranger's: whatever fails, a panic of the library too, it is not of this kind
        return None
