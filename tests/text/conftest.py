"""What the tests of text share."""

from __future__ import annotations

from pathlib import Path

import pytest

DATA = Path(__file__).parents[2] / ".." / "shared" / "data"
SAMPLE = (
    "The cat sat on the mat .\nthe dog's ball <unk> rolled , didn't it ?\n\nFüße naïve 戦場 🎈 e\u0301 12345 Ġ <0x41>\n"
) * 20


@pytest.fixture
def ptb() -> Path:
    if not (DATA / "ptb").is_dir():
        pytest.skip("no ../shared/data/ptb beside the repository")
    return DATA / "ptb"


@pytest.fixture
def wikitext() -> Path:
    if not (DATA / "wikitext-2").is_dir():
        pytest.skip("no ../shared/data/wikitext-2 beside the repository")
    return DATA / "wikitext-2"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with train, valid and test."""
    path = tmp_path / "corpus"
    path.mkdir()
    (path / "train.txt").write_text(SAMPLE, encoding="utf-8")
    (path / "valid.txt").write_text("the cat\nthe zebra\n", encoding="utf-8")
    (path / "test.txt").write_text("a mat", encoding="utf-8")
    return path
