"""What is special to words."""

from __future__ import annotations

import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from recurlm.config import TokenizerConfig
from recurlm.text.tokenizers import train_tokenizer

pieces = st.sampled_from(
    [*"\n \t\x00\u2028\x85\xa0\x1c", "\r\n", "'s", "<eos>", "<unk>", "the", " cat", "é", "戦", "🎈"]
)
plain_text = st.lists(
    st.one_of(pieces, st.text(st.characters(exclude_categories=["Cs"]), max_size=6)), max_size=12
).map("".join)


@settings(max_examples=300, deadline=None)
@given(text=plain_text)
def test_the_round_trip_normalises_white_space_only(text: str):
    tokenizer = train_tokenizer([text, "x\n"], TokenizerConfig(kind="word"))
    lines = text.removesuffix("\n").split("\n") if text else []
    words = ["<unk>" if word == "<eos>" else word for line in lines for word in [*line.split(), "\n"]]
    assert tokenizer.decode(tokenizer.encode(text)).split(" ") == " ".join(words).replace(" \n", "\n").replace(
        "\n ", "\n"
    ).split(" ")
    assert tokenizer.encode(text).size == len(words)


def test_vocabulary_is_by_frequency():
    text = "b a b <unk> c <eos>\nb d a\n"
    words = train_tokenizer([text], TokenizerConfig(kind="word"))
    # b 3 times; a, <eos> (two lines), <unk> (and the typed <eos>) twice; c, d once; ties as they appear
    assert [words.token(i) for i in range(words.vocab_size)] == ["b", "a", "<eos>", "<unk>", "c", "d"]
    small = train_tokenizer([text], TokenizerConfig(kind="word", vocab_size=4))
    assert [small.token(i) for i in range(small.vocab_size)] == ["<unk>", "b", "a", "<eos>"]
    rare = train_tokenizer([text], TokenizerConfig(kind="word", min_count=3))
    assert sorted(rare.token(i) for i in range(rare.vocab_size)) == ["<eos>", "<unk>", "b"]
    assert train_tokenizer(["a\n"], TokenizerConfig(kind="word")).unk_id == 2


def test_splits_as_python_does():
    words = train_tokenizer(["the cat sat on the mat .\n" * 3], TokenizerConfig(kind="word"))
    library = tokenizers.Tokenizer.from_str(words.to_json())
    for point in range(0x110000):
        if chr(point).isspace() and point != ord("\n"):
            text = f"the{chr(point)}cat\n"
            assert words.encode(text).tolist() == words.encode("the cat\n").tolist() == library.encode(text).ids
    assert words.encode("the\x85\x0b\u2028cat").size == 3


def test_a_typed_eos_is_an_unknown_word():
    words = train_tokenizer(["the cat sat\n"], TokenizerConfig(kind="word"))
    for text in ("<eos>", "a <eos> b", "the <eos>", "x<eos>"):
        ids = words.encode_prefix(text).tolist()
        assert ids == words.encode_prefix(text.replace("<eos>", "<unk>")).tolist()
        assert words.boundary_id not in ids
