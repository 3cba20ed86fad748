"""What is special to the unigram tokenizer."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from recurlm.config import TokenizerConfig
from recurlm.errors import ConfigError, DataError
from recurlm.text.tokenizers import byte_level, load_tokenizer, train_tokenizer
from recurlm.text.tokenizers.unigram import UnigramTokenizer

SAMPLE = "".join(f"the walking cat walked to the talking cats number {i}\n" for i in range(300))


def trained(text: str, size: int = 0) -> UnigramTokenizer:
    tokenizer = train_tokenizer([text], TokenizerConfig(kind="unigram", vocab_size=size))
    assert isinstance(tokenizer, UnigramTokenizer)
    return tokenizer


def test_ids_are_by_frequency():
    for tokenizer in (trained(SAMPLE), trained(SAMPLE, 270)):
        counts = np.bincount(tokenizer.encode(SAMPLE), minlength=tokenizer.vocab_size)
        assert (np.diff(counts) <= 0).all()
        assert {bytes([b]) for b in range(256)} <= set(tokenizer.pieces)


def test_sizes():
    assert trained(SAMPLE, 256).vocab_size == 256
    assert trained(SAMPLE, 257).vocab_size == 257
    assert 256 < trained(SAMPLE).vocab_size < 300
    assert trained("once\n").vocab_size == 256
    with pytest.raises(ConfigError, match=r"expected at most 1,048,576 for unigram"):
        trained(SAMPLE, byte_level.LARGEST + 1)


def test_segmentation_is_the_most_probable_one():
    """The oracle tries every segmentation of a word (Kudo 2018, eq. 5)."""
    tokenizer = trained(SAMPLE)
    model = tokenizer.to_dict()["model"]["vocab"]
    score = {piece: s for piece, (_, s) in zip(tokenizer.pieces, model, strict=True)}

    def best(word: bytes) -> float:
        splits = (
            score[word[:i]] + (best(word[i:]) if word[i:] else 0) for i in range(1, len(word) + 1) if word[:i] in score
        )
        return max(splits, default=-math.inf)

    for word in ("walkers", " talked", "cattle", "zebra", " numbers", "ing"):
        found = sum(score[tokenizer.pieces[i]] for i in tokenizer.encode(word))
        assert found == pytest.approx(best(word.encode()), abs=1e-9)


def test_training_is_deterministic_on_texts_full_of_ties():
    draw = random.Random(3)
    for _ in range(60):
        letters = "abcdefgh"[: draw.randint(1, 8)]
        words = ["".join(draw.choice(letters) for _ in range(draw.randint(1, 8))) for _ in range(draw.randint(1, 200))]
        text = " ".join(words * draw.choice([1, 2, 10])) + "\n"
        size = draw.choice([0, 256, 260, 300])
        assert trained(text, size).to_json() == trained(text, size).to_json()


@pytest.mark.parametrize(
    "change",
    [
        lambda vocab: vocab[1:],
        lambda vocab: [*vocab, vocab[0]],
        lambda vocab: [[vocab[0][0], math.nan], *vocab[1:]],
        lambda vocab: [[vocab[0][0], -math.inf], *vocab[1:]],
        lambda vocab: [[vocab[0][0], 0.5], *vocab[1:]],
        lambda vocab: [*vocab, ["", -9.0]],
        lambda vocab: [*vocab, ["a b", -9.0]],
        lambda vocab: [*vocab, [1, -9.0]],
        lambda vocab: [],
        lambda vocab: "vocab",
    ],
)
def test_changed_vocabularies_are_refused(change: Any, tmp_path: Path):
    content = trained(SAMPLE, 256).to_dict()
    content["model"]["vocab"] = change(content["model"]["vocab"])
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(DataError, match=r"damaged or not one that recurlm writes|not a tokenizer"):
        load_tokenizer(tmp_path / "tokenizer.json")


def test_a_panic_of_the_library_is_one_sentence(monkeypatch: pytest.MonkeyPatch):
    class PanicException(BaseException):
        """As pyo3 defines it: no Exception."""

    def panic(*_: object) -> None:
        raise PanicException("index out of bounds")

    monkeypatch.setattr(byte_level.json, "loads", panic)
    monkeypatch.setattr(byte_level.tokenizers.Tokenizer, "from_str", panic)
    with pytest.raises(DataError, match=r"cannot work with this text \(index out of bounds\); use another"):
        byte_level.load("{}")
