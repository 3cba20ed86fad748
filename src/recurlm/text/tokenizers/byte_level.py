"""Byte-level subwords: what bpe and unigram share.

Text is split into parts, and each part's bytes, spelled as printable characters, into tokens. All 256 bytes are
tokens, so every text has ids and comes back exactly.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from recurlm.config import TokenizerConfig
from recurlm.errors import ConfigError, DataError
from recurlm.text.tokenizers.base import Tokenizer, check_size, to_bytes
from recurlm.text.tokenizers.byte import BYTE_LEVEL, SPELLING

DEFAULT_SIZE = 8000
DEFAULT_COUNT = 10  # a rarer piece stays several tokens, so that a small text gets a small vocabulary
LARGEST = 1 << 20  # the library asks for memory in proportion
SAMPLE = 16 << 20  # characters of training text whose tokens are counted to order the ids
# Left to right, nothing looks back: a newline; a short ending ('s, 'll); letters, digits or signs with one
# space before them at most; white space, less the one space that goes to what follows. No part is longer than
# 65 characters, so that time is linear in any text, and none crosses a newline.
_PARTS = (
    r"\n|'(?:[sdmt]|ll|ve|re)(?![\p{L}\p{M}])| ?[\p{L}\p{M}]{1,64}| ?\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{M}\p{N}]{1,64}|[^\S\n]{1,64}(?!\S)|[^\S\n]{1,64}"
)
_LOOK = 8  # more characters than any part looks at beyond its end
_SPLIT = {"type": "Split", "pattern": {"Regex": _PARTS}, "behavior": "Isolated", "invert": False}
SPLITTING = {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [_SPLIT, BYTE_LEVEL]}, "decoder": BYTE_LEVEL}
_CHUNK = 1 << 15  # characters that one call of the library's thread pool gets as one item
_VALUE = {token: byte for byte, token in enumerate(SPELLING)}


def check(config: TokenizerConfig) -> None:
    """None; ConfigError when the vocabulary asked for lacks room for the bytes, or is too large."""
    check_size(config, 256, "one for each byte")
    if config.vocab_size > LARGEST:
        raise ConfigError(
            f"tokenizer.vocab_size = {config.vocab_size}: expected at most {LARGEST:,} for {config.kind}."
        )


def pieces(tokens: Iterable[str]) -> list[bytes]:
    """The bytes that each token spells. ValueError unless all differ, none is empty and each byte has its own."""
    spelled = [bytes(_VALUE.get(c, -1) for c in token) for token in tokens]
    found = set(spelled)
    if len(found) < len(spelled) or b"" in found or not {bytes([byte]) for byte in range(256)} <= found:
        raise ValueError("its vocabulary has a piece twice, an empty one, or lacks some of the 256 bytes")
    return spelled


def train(model: models.Model, trainer: trainers.Trainer, texts: Iterable[str]) -> dict[str, Any]:
    """The `model` table of the tokenizer.json that the library's trainer makes of the texts.

    RequestError for a lone surrogate; DataError when the library fails.
    """
    library = tokenizers.Tokenizer(model)
    library.pre_tokenizer = _splitter()
    library.decoder = decoders.ByteLevel()
    with no_panic():
        library.train_from_iterator((chunk for text in texts for chunk in _chunks(text)), trainer)
    return json.loads(library.to_str())["model"]


def counts(tokenizer: Tokenizer, sample: Iterable[str]) -> np.ndarray:
    """How often each id occurs in the sample: int64, 1-D."""
    found = np.zeros(tokenizer.vocab_size, np.int64)
    for text in sample:
        found += np.bincount(tokenizer.encode_prefix(text), minlength=tokenizer.vocab_size)
    return found


def load(tokenizer_json: str) -> tokenizers.Tokenizer:
    """The library's tokenizer of a tokenizer.json. Some Exception when there is none."""
    with no_panic():
        return tokenizers.Tokenizer.from_str(tokenizer_json)


def encode(library: tokenizers.Tokenizer, text: str) -> np.ndarray:
    """Ids (int64, 1-D). RequestError for a lone surrogate."""
    parts = library.encode_batch_fast(list(_chunks(text)), add_special_tokens=False)
    return np.concatenate([np.empty(0, np.int64), *(np.array(part.ids, np.int64) for part in parts)])


def cut(text: str) -> int:
    """A place between two parts, whatever follows the text; 0 = none."""
    space = text.rfind(" ", 1)
    while space > 0 and text[space - 1].isspace():
        space = text.rfind(" ", 1, space)
    if space > 0:
        return space  # a part never goes on with a space
    ends = [end for _, (_, end) in _splitter().pre_tokenize_str(text) if end <= len(text) - _LOOK]
    return ends[-1] if ends else 0


@contextmanager
def no_panic() -> Iterator[None]:
    """A panic of the library's Rust, which is no Exception and would end the program, becomes a DataError."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise DataError(
            f"The tokenizers library cannot work with this text ({str(error)[:200]}); use another tokenizer.kind."
        ) from None


def _splitter() -> pre_tokenizers.PreTokenizer:
    split = pre_tokenizers.Split(tokenizers.Regex(_PARTS), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _chunks(text: str) -> Iterator[str]:
    """The text in chunks that end with a line, or where a long line can be cut."""
    to_bytes(text)
    start = 0
    while len(text) - start > 2 * _CHUNK:
        end = text.find("\n", start + _CHUNK, start + 2 * _CHUNK) + 1
        end = end or start + cut(text[start : start + _CHUNK])
        yield text[start:end]
        start = end
    if start < len(text):
        yield text[start:]
