"""Token stores: exact counts, exact ids, whole or absent, damage found."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recurlm.config import TokenizerConfig
from recurlm.errors import ConfigError, DataError, UserError
from recurlm.text.corpora import BLOCK, Corpus, open_corpus, open_whole
from recurlm.text.store import build_tokenizer, has_carriage_returns, is_store, open_store, prepare, write_store
from recurlm.text.tokenizers import TOKENIZERS

every = pytest.mark.parametrize("kind", TOKENIZERS)


def corpus_of(*blocks: bytes) -> Corpus:
    return Corpus("text", {"train": lambda: iter(blocks)}, {"train": "text"})


@every
def test_round_trip(kind: str, folder: Path, tmp_path: Path):
    store = prepare(folder, TokenizerConfig(kind=kind), tmp_path / "store")
    assert is_store(store.path) and store == open_store(store.path) and not is_store(folder)
    store.verify()
    tokenizer = store.tokenizer()
    assert (tokenizer.kind, tokenizer.hash, tokenizer.vocab_size) == (
        kind,
        store.tokenizer_hash,
        store.vocab_size,
    )
    assert store.splits == ("train", "valid", "test")
    for split in store.splits:
        text = (folder / f"{split}.txt").read_text(encoding="utf-8")
        ids, info = store.ids(split), store.info[split]
        assert ids.dtype == np.uint16 and not ids.flags.writeable
        assert ids.tolist() == tokenizer.encode(text).tolist()
        lines = text.count("\n") + (not text.endswith("\n"))
        assert (info.tokens, info.lines, info.words) == (ids.size, lines, len(text.split()) + lines)
        assert (info.characters, info.bytes) == (len(text), len(text.encode()))
    with pytest.raises(DataError, match="has no dev text"):
        store.ids("dev")


@every
def test_carriage_returns_are_text_and_told_of(kind: str, tmp_path: Path):
    lines = ["to the cat", "", "to the dog"] * 40
    for end, told in (("\r\n", kind != "word"), ("\n", False), ("\n" * 9 + "\r\n", False)):
        (tmp_path / "train.txt").write_bytes(end.join([*lines, ""]).encode())
        store = prepare(tmp_path, TokenizerConfig(kind=kind), tmp_path / "store", overwrite=True)
        assert has_carriage_returns(store) == told
        whole = write_store(open_whole(tmp_path / "train.txt"), store.tokenizer(), tmp_path / "whole", overwrite=True)
        assert has_carriage_returns(whole, "all") == told
        assert kind == "word" or store.tokenizer().decode(store.ids("train")) == end.join([*lines, ""])


@every
def test_same_text_same_hash(kind: str, folder: Path, tmp_path: Path):
    config = TokenizerConfig(kind=kind)
    first, second = (prepare(folder, config, tmp_path / name) for name in "ab")
    assert first.hash == second.hash
    (folder / "test.txt").write_text("a cat")
    assert prepare(folder, config, tmp_path / "c").hash != first.hash


def test_penn_treebank_counts(ptb: Path, tmp_path: Path):
    tokens = {"train": 929_589, "valid": 73_760, "test": 82_430}
    for vocab_splits in ("train", "all"):
        words = prepare(ptb, TokenizerConfig(kind="word", vocab_splits=vocab_splits), tmp_path / vocab_splits)
        assert words.vocab_size == 10_000
        assert {split: info.tokens for split, info in words.info.items()} == tokens
    for kind in ("char", "byte"):
        store = prepare(ptb, TokenizerConfig(kind=kind), tmp_path / kind)
        assert {split: info.words for split, info in store.info.items()} == tokens
        assert store.info["train"].tokens == store.info["train"].characters == 5_101_618


def test_wikitext_counts(wikitext: Path, tmp_path: Path):
    store = prepare(wikitext, TokenizerConfig(kind="word", vocab_splits="all"), tmp_path / "store")
    assert store.vocab_size == 33_278
    assert {s: i.tokens for s, i in store.info.items()} == {
        "train": 2_088_628,
        "valid": 217_646,
        "test": 245_569,
    }
    assert {s: i.words for s, i in store.info.items()} == {
        "train": 2_088_628,
        "valid": 217_646,
        "test": 245_569,
    }


def test_vocabulary_is_of_the_train_split_unless_asked(folder: Path):
    train, both = (
        build_tokenizer(open_corpus(folder), TokenizerConfig(kind="word", vocab_splits=s)) for s in ("train", "all")
    )
    assert train.encode("zebra")[0] == train.unk_id
    assert both.encode("zebra")[0] != both.unk_id


def test_large_vocabularies_take_four_bytes(tmp_path: Path):
    text = " ".join(f"w{i}" for i in range(70_000)).encode()
    corpus = corpus_of(text)
    store = write_store(corpus, build_tokenizer(corpus, TokenizerConfig(kind="word")), tmp_path / "store")
    assert store.ids("train").dtype == np.uint32
    assert store.ids("train").tolist() == list(range(70_001))


@every
@pytest.mark.parametrize("unit", ["a", "ab é ", " ", "戦", "it's 戦! ", "\u0301"], ids=ascii)
def test_one_line_longer_than_a_block(kind: str, unit: str, folder: Path, tmp_path: Path):
    text = "the cat\n" + unit * (BLOCK // len(unit.encode())) + "x the cat"
    (folder / "test.txt").write_text(text, encoding="utf-8")
    store = prepare(folder, TokenizerConfig(kind=kind), tmp_path / "store")
    assert np.array_equal(store.ids("test"), store.tokenizer().encode(text))
    assert store.info["test"].words == len(text.split()) + 2


def test_endless_words_are_refused(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("recurlm.text.store.MAX_WORD", BLOCK)
    (folder / "test.txt").write_bytes(b"x" * 4 * BLOCK)
    with pytest.raises(DataError, match=r"test.txt: a word of more than 1 MB before byte \d+; use another tokenizer"):
        prepare(folder, TokenizerConfig(kind="word"), tmp_path / "store")
    assert [p.name for p in tmp_path.iterdir()] == ["corpus"]


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_counts_do_not_depend_on_blocks(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory):
    pieces = st.sampled_from(["a", "é", "戦", "🎈", " ", "\n", "\r\n", "\xa0", "\u2003", "\u3000", "\x1c", "\u1680"])
    text = "".join(data.draw(st.lists(pieces, min_size=1, max_size=20)))
    places = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=3)))
    blocks = [text[i:j].encode() for i, j in zip([0, *places], [*places, len(text)], strict=True) if j > i]
    byte = TOKENIZERS["byte"].train((), TokenizerConfig(kind="byte"))
    info = write_store(corpus_of(*blocks), byte, tmp_path_factory.mktemp("s") / "store").info["train"]
    lines = text.count("\n") + (not text.endswith("\n"))
    assert (info.words, info.lines) == (len(text.split()) + lines, lines)
    assert (info.characters, info.bytes) == (len(text), len(text.encode()))


def test_bytes_that_are_not_utf8(folder: Path, tmp_path: Path):
    data = b"fine\n" * 300_000 + b"bad \xff\xfe\x00\n"
    (folder / "test.txt").write_bytes(data)
    for kind in set(TOKENIZERS) - {"byte"}:
        with pytest.raises(DataError, match=r"test.txt: not UTF-8 text at byte 1500004"):
            prepare(folder, TokenizerConfig(kind=kind), tmp_path / "store")
        assert not (tmp_path / "store").exists()
    store = prepare(folder, TokenizerConfig(kind="byte"), tmp_path / "store")
    assert store.ids("test").astype(np.uint8).tobytes() == data


def test_empty_split(folder: Path, tmp_path: Path):
    (folder / "valid.txt").write_text("")
    with pytest.raises(DataError, match=r"valid.txt: the valid text is empty"):
        prepare(folder, TokenizerConfig(kind="char"), tmp_path / "store")
    assert [p.name for p in tmp_path.iterdir()] == ["corpus"]


def test_existing_targets(folder: Path, tmp_path: Path):
    config = TokenizerConfig(kind="char")
    store = prepare(folder, config, tmp_path / "store")
    with pytest.raises(UserError, match="a store exists already; use --force"):
        prepare(folder, config, store.path)
    (folder / "test.txt").write_text("other")
    assert prepare(folder, config, store.path, overwrite=True).hash != store.hash
    with pytest.raises(UserError, match="something that is not a store exists already"):
        prepare(folder, config, folder, overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["corpus", "store"]
    with pytest.raises(ConfigError, match="is not known"):
        prepare(folder, TokenizerConfig(kind="sentences"), tmp_path / "other")


def test_a_killed_writer_leaves_nothing_that_opens(folder: Path, tmp_path: Path):
    pid = os.fork()
    if pid == 0:  # the writer dies in the middle of the second block

        def blocks() -> Iterator[bytes]:
            yield b"first\n"
            os._exit(9)

        corpus = Corpus("text", {"train": blocks}, {"train": "text"})
        write_store(corpus, TOKENIZERS["byte"].train((), TokenizerConfig(kind="byte")), tmp_path / "store")
    os.waitpid(pid, 0)
    litter = tmp_path / f".store.tmp-{pid}"
    assert litter.exists() and not (tmp_path / "store").exists() and not is_store(litter)
    with pytest.raises(UserError, match="no store here"):
        open_store(tmp_path / "store")
    running = tmp_path / f".store.tmp-{os.getppid()}"
    running.mkdir()
    prepare(folder, TokenizerConfig(kind="byte"), tmp_path / "store").verify()
    assert not litter.exists() and running.exists()


@every
def test_damage_is_found(kind: str, folder: Path, tmp_path: Path):
    store = prepare(folder, TokenizerConfig(kind=kind), tmp_path / "store")
    ids, description, saved = (store.path / name for name in ("valid.bin", "store.json", "tokenizer.json"))
    good = {path: path.read_bytes() for path in (ids, description, saved)}
    flipped = bytearray(good[ids])
    flipped[3] ^= 1
    ids.write_bytes(flipped)
    with pytest.raises(DataError, match=r"valid.bin: its content has changed"):
        open_store(store.path).verify()
    broken = [
        (ids, good[ids][:-1], r"valid.bin: found \d+ bytes, expected"),
        (ids, None, r"valid.bin: found no file, expected"),
        (saved, good[saved].replace(b"1.0", b"1.1"), "not the tokenizer that this store was made with"),
        (saved, None, "tokenizer.json: it is missing"),
        (
            description,
            good[description].replace(b'"tokens": ', b'"tokens": 1'),
            "store.json: changed since it was written",
        ),
        (description, good[description].replace(b'"format": 1', b'"format": 2'), "found format 2"),
        (description, good[description][:-9], "cannot be read as a store's description"),
        (description, b"[]", "cannot be read"),
        (description, json.dumps({"hash": "", "format": 1, "tokenizer": {}}).encode(), "cannot be read"),
    ]
    for path, content, message in broken:
        ids.write_bytes(good[ids])
        path.unlink() if content is None else path.write_bytes(content)
        with pytest.raises(DataError, match=message):
            open_store(store.path)
        path.write_bytes(good[path])
    assert open_store(store.path).hash == store.hash


def test_a_strangers_description_reaches_no_other_file(folder: Path, tmp_path: Path):
    """The hash can be made to fit, so names and types are checked as well."""
    store = prepare(folder, TokenizerConfig(kind="byte"), tmp_path / "store")
    content = json.loads((store.path / "store.json").read_text())
    del content["hash"]
    for change in ({"splits": {"../../secret": content["splits"]["train"]}}, {"dtype": "|O"}):
        changed = content | change
        changed["hash"] = hashlib.sha256(json.dumps(changed, sort_keys=True).encode()).hexdigest()
        (store.path / "store.json").write_text(json.dumps(changed))
        with pytest.raises(DataError, match="changed since it was written"):
            open_store(store.path)
