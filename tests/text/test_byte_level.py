"""What is special to bytes and byte pairs."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from recurlm.config import TokenizerConfig
from recurlm.text.tokenizers import train_tokenizer

SAMPLE = Path(__file__).read_text(encoding="utf-8") * 9


def test_byte_takes_any_bytes():
    byte = train_tokenizer((), TokenizerConfig(kind="byte"))
    assert byte.encode_prefix(bytes(range(256))).tolist() == list(range(256))  # type: ignore[arg-type]
    assert byte.token(0xE2) == "<0xE2>"


def test_bpe_ids_are_by_frequency():
    bpe = train_tokenizer([SAMPLE], TokenizerConfig(kind="bpe"))
    counts = np.bincount(bpe.encode(SAMPLE), minlength=bpe.vocab_size)
    assert (np.diff(counts) <= 0).all()
    assert {bytes([b]) for b in range(256)} <= set(bpe.pieces)
    assert train_tokenizer([SAMPLE], TokenizerConfig(kind="bpe", vocab_size=300)).vocab_size == 300
