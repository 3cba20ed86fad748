"""What is special to characters."""

from __future__ import annotations

from recurlm.config import TokenizerConfig
from recurlm.text.tokenizers import train_tokenizer


def test_rows():
    config = TokenizerConfig(kind="char", min_count=2, vocab_size=259)
    char = train_tokenizer(["ba", "abcaddee"], config)
    assert [char.token(i) for i in (0, 1, 2, 3, 258)] == ["a", "b", "\\n", "<0x00>", "<0xFF>"]
    assert char.encode("aé").tolist() == [0, 3 + 0xC3, 3 + 0xA9]
    unknown = train_tokenizer(["ba"], TokenizerConfig(kind="char", byte_fallback=False))
    assert unknown.encode("aéb").tolist() == [0, unknown.unk_id, 1]
    assert unknown.decode(unknown.encode("aéb")) == "a<unk>b"
