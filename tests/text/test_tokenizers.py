"""Every tokenizer keeps the contract of base.py: nothing here names one."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from recurlm.config import TokenizerConfig
from recurlm.errors import ConfigError, DataError, RequestError, UserError
from recurlm.text.store import texts
from recurlm.text.tokenizers import TOKENIZERS, Tokenizer, load_tokenizer, train_tokenizer

SAMPLE = (
    Path(__file__).read_text(encoding="utf-8") * 3
    + "The cat sat on the mat .\nthe dog's ball <unk> rolled , didn't it ?\n\nnaïve 戦場 🎈 e\u0301 12345\n" * 20
)
VARIANTS = {kind: TokenizerConfig(kind=kind) for kind in TOKENIZERS} | {
    f"{kind}, small": TokenizerConfig(kind=kind, vocab_size=300, min_count=2, byte_fallback=False)
    for kind in TOKENIZERS
}
TRAINED = {name: train_tokenizer([SAMPLE], config) for name, config in VARIANTS.items()}
LIBRARY = {name: tokenizers.Tokenizer.from_str(t.to_json()) for name, t in TRAINED.items()}
EXACT = {name: t for name, t in TRAINED.items() if t.exact}

every = pytest.mark.parametrize("tokenizer", TRAINED.values(), ids=list(TRAINED))
exact = pytest.mark.parametrize("tokenizer", EXACT.values(), ids=list(EXACT))
scalars = st.characters(exclude_categories=["Cs"])
# Ordinary text, any scalars, and what regular expressions and control tokens trip over.
awkward = st.sampled_from(
    [
        *(
            "\n",
            "\r\n",
            " ",
            "  ",
            "\t",
            "\x00",
            "\ufeff",
            "\u2028",
            "\x85",
            "\xa0",
            "\x1c",
            "\x1f",
            "\u0301",
        ),
        *("'", "'s", "'ll", "<eos>", "<unk>", "<0x41>", "Ġ", "the", " cat", "é", "戦", "🎈", "12345", "!!!"),
        *("a" * 70, " " * 70),
    ]
)
plain_text = st.lists(st.one_of(awkward, st.text(scalars, max_size=6)), max_size=12).map("".join)


@every
def test_vocabulary_and_special_ids(tokenizer: Tokenizer):
    assert tokenizer.vocab_size == len(tokenizer.pieces)
    assert tokenizer.encode("\n").tolist() == [tokenizer.boundary_id]
    assert tokenizer.unk_id is None or 0 <= tokenizer.unk_id < tokenizer.vocab_size
    assert all(tokenizer.token(i).isprintable() and tokenizer.token(i) for i in range(tokenizer.vocab_size))
    assert tokenizer.encode("").size == 0
    assert tokenizer.encode("").dtype == tokenizer.encode("the\n").dtype == np.int64


@every
def test_saved_and_loaded(tokenizer: Tokenizer, tmp_path: Path):
    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = load_tokenizer(tmp_path / "tokenizer.json")
    assert type(loaded) is type(tokenizer)
    assert loaded.hash == tokenizer.hash
    assert loaded.encode(SAMPLE).tolist() == tokenizer.encode(SAMPLE).tolist()
    assert (loaded.boundary_id, loaded.unk_id) == (tokenizer.boundary_id, tokenizer.unk_id)


@pytest.mark.parametrize("name", VARIANTS)
def test_training_is_deterministic(name: str):
    blocks = SAMPLE.splitlines(keepends=True)
    assert train_tokenizer(iter(blocks), VARIANTS[name]).hash == TRAINED[name].hash


@pytest.mark.parametrize("name", TRAINED)
@settings(max_examples=300, deadline=None)
@given(text=plain_text)
def test_library_gives_equal_ids(name: str, text: str):
    ids = TRAINED[name].encode(text)
    assert ids.tolist() == LIBRARY[name].encode(text).ids
    assert ids.size == 0 or (ids.min() >= 0 and ids.max() < TRAINED[name].vocab_size)


@exact
@settings(max_examples=300, deadline=None)
@given(text=plain_text)
def test_round_trip_is_exact(tokenizer: Tokenizer, text: str):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@exact
def test_every_scalar_comes_back(tokenizer: Tokenizer):
    text = "".join(chr(p) for p in range(0x110000) if not 0xD800 <= p < 0xE000)
    assert tokenizer.decode(tokenizer.encode(text)) == text


@every
@settings(max_examples=200, deadline=None)
@given(lines=st.lists(plain_text, max_size=4), rest=plain_text)
def test_ids_of_lines_are_ids_of_the_text(tokenizer: Tokenizer, lines: list[str], rest: str):
    parts = [*(line + "\n" for line in lines), rest]
    together = tokenizer.encode("".join(parts)).tolist()
    assert together == [i for part in parts for i in tokenizer.encode(part).tolist()]


@every
@settings(max_examples=300, deadline=None)
@given(text=plain_text, data=st.data())
def test_ids_do_not_depend_on_blocks(tokenizer: Tokenizer, text: str, data: st.DataObject):
    """Blocks may end inside a line, at any character."""
    places = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=4)))
    blocks = [text[i:j].encode() for i, j in zip([0, *places], [*places, len(text)], strict=True) if j > i]
    ids = [i for part in texts(blocks, type(tokenizer), "here") for i in tokenizer.encode_prefix(part).tolist()]
    assert ids == tokenizer.encode(text).tolist()


@every
def test_typed_control_tokens_are_text(tokenizer: Tokenizer):
    for text in ("<eos>", "a <eos> b", "<unk>", "<0x41>", "<0x0A>", "Ġ", "Ċ", "<|endoftext|>", "[UNK]"):
        ids = tokenizer.encode_prefix(text).tolist()
        assert tokenizer.boundary_id not in ids
        assert not tokenizer.exact or tokenizer.decode(ids) == text


@every
@pytest.mark.parametrize("unit", ["a", "ab", "\u0301", " ", "'", "\n", "1", "\r"], ids=ascii)
def test_time_is_linear(tokenizer: Tokenizer, unit: str):
    text = unit * (300_000 // len(unit))
    start = time.process_time()
    tokenizer.encode(text)
    assert time.process_time() - start < 2


@every
def test_lone_surrogates_and_bad_ids_are_refused(tokenizer: Tokenizer):
    with pytest.raises(RequestError, match="lone surrogate at character 1"):
        tokenizer.encode("a\ud800")
    for bad in (-1, tokenizer.vocab_size):
        with pytest.raises(RequestError, match="outside"):
            tokenizer.decode([0, bad])
        with pytest.raises(RequestError, match="outside"):
            tokenizer.token(bad)


def test_foreign_and_damaged_files(tmp_path: Path):
    path = tmp_path / "tokenizer.json"
    with pytest.raises(UserError, match="cannot read"):
        load_tokenizer(path)
    library = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<unk>": 0, "<eos>": 1}, unk_token="<unk>"))
    for text in (
        "",
        "{}",
        "[]",
        "null",
        "[" * 100_000,
        '{"model": 1}',
        '{"model": {"vocab": {}}}',
        library.to_str(),
    ):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(DataError, match=r"tokenizer\.json"):
            load_tokenizer(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(DataError):
        load_tokenizer(path)


@every
def test_changed_files_are_refused(tokenizer: Tokenizer, tmp_path: Path):
    content = tokenizer.to_dict()
    vocab = content["model"]["vocab"]
    pairs = vocab.items() if isinstance(vocab, dict) else vocab
    (first, value), *rest = pairs
    changes = [
        [(first, 1), *rest],
        [(first, str(value)), *rest],
        [*pairs, ("two words", len(vocab))],
        rest,
    ]
    models = [content["model"] | {"vocab": type(vocab)(map(tuple, change))} for change in changes]
    models.append(content["model"] | {"extra": 1})
    added = [{"id": 0, "content": "a", "special": True}]
    for changed in [content | {"added_tokens": added}, *(content | {"model": model} for model in models)]:
        (tmp_path / "t.json").write_text(json.dumps(changed), encoding="utf-8")
        with pytest.raises(DataError):
            load_tokenizer(tmp_path / "t.json")


def test_unknown_kind_and_sizes_too_small():
    with pytest.raises(ConfigError, match=r"tokenizer.kind = 'words' is not known. Did you mean 'word'"):
        train_tokenizer([], TokenizerConfig(kind="words"))
    for kind in TOKENIZERS:
        with pytest.raises(ConfigError, match="vocab_size = 2 is too small"):
            train_tokenizer(["a\n"], TokenizerConfig(kind=kind, vocab_size=2))
