"""Tokenizers: one file each, one line in TOKENIZERS."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from recurlm.config import TokenizerConfig
from recurlm.errors import DataError, UserError, lookup
from recurlm.text.tokenizers.base import Tokenizer
from recurlm.text.tokenizers.bpe import BpeTokenizer
from recurlm.text.tokenizers.byte import ByteTokenizer
from recurlm.text.tokenizers.char import CharTokenizer
from recurlm.text.tokenizers.unigram import UnigramTokenizer
from recurlm.text.tokenizers.word import WordTokenizer

__all__ = ["TOKENIZERS", "Tokenizer", "load_tokenizer", "train_tokenizer"]

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
        text = Path(path).read_text(encoding="utf-8")
        content = json.loads(text)
        model = content["model"]
    except OSError as error:
        raise UserError(f"{path}: cannot read this tokenizer: {error.strerror}.") from None
    except (ValueError, TypeError, KeyError, RecursionError):
        raise DataError(f"{path}: not a tokenizer.json (expected JSON with a `model` table).") from None
    for cls in TOKENIZERS.values():
        try:
            tokenizer = cls.from_model(model)
        except Exception:  # the file is a stranger's: whatever fails, it is not of this kind
            continue
        if tokenizer.to_dict() == content:
            return tokenizer
    raise DataError(
        f"{path}: this tokenizer.json is damaged or not one that recurlm writes ({', '.join(TOKENIZERS)}); "
        "train a tokenizer with `recurlm data prepare`."
    )
