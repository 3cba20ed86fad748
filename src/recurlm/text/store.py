"""Token ids on disk: a folder with store.json, tokenizer.json and SPLIT.bin, read through memory maps.

The folder is written under another name, flushed to the disk and then renamed: it exists whole or not at all.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO, final

import numpy as np

from recurlm import files
from recurlm.config import TokenizerConfig
from recurlm.errors import DataError, RunError, UserError, lookup, shown
from recurlm.files import sync, to_json
from recurlm.text.corpora import SPLITS, WHOLE, Corpus, open_corpus
from recurlm.text.tokenizers import TOKENIZERS, Tokenizer, load_tokenizer, train_tokenizer

FORMAT = 1
MAX_WORD = 64 << 20
_VERIFIED = 4 << 20  # bytes hashed at once
_PREPARE = "prepare the text again with `recurlm data prepare`"
RETURNS = "Lines end with \\r\\n, and every \\r counts as text; to leave them out, use what `tr -d '\\r' < FILE` gives."


@final
@dataclass(frozen=True)
class SplitInfo:
    """Counts of one split. `words` are the stretches without white space, and one for each line's end."""

    tokens: int
    words: int
    lines: int
    characters: int
    bytes: int
    sha256: str


@final
@dataclass(frozen=True)
class Store:
    """A store at `path`. `hash` stands for its content: the tokenizer, every id and every count."""

    path: Path
    info: Mapping[str, SplitInfo]
    hash: str
    tokenizer_kind: str
    tokenizer_hash: str
    vocab_size: int
    dtype: str

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(self.info)

    def ids(self, split: str) -> np.memmap:
        """The split's ids: 1-D, uint16 or uint32, read-only, in the file. DataError for an absent split."""
        if split not in self.info:
            raise DataError(f"{self.path} has no {split} text; it has {', '.join(self.splits)}.")
        return np.memmap(self.path / f"{split}.bin", np.dtype(self.dtype), "r")

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made the ids."""
        return load_tokenizer(self.path / "tokenizer.json")

    def verify(self) -> None:
        """None when every file has its sha256 and every id is one of the tokenizer's; DataError naming the first that has not."""
        tokenizer = self.tokenizer()
        if (tokenizer.kind, tokenizer.vocab_size) != (self.tokenizer_kind, self.vocab_size):
            raise DataError(f"{self.path / 'tokenizer.json'}: not the tokenizer that store.json describes; {_PREPARE}.")
        for split, info in self.info.items():
            file, digest, largest = self.path / f"{split}.bin", hashlib.sha256(), 0
            with _reading(file), files.open_regular(file) as source:
                while block := source.read(_VERIFIED):
                    digest.update(block)
                    largest = max(largest, int(np.frombuffer(block, self.dtype).max()))
            if digest.hexdigest() != info.sha256:
                raise DataError(f"{file}: its content has changed since it was written; {_PREPARE}.")
            if largest >= self.vocab_size:
                raise DataError(f"{file}: holds the id {largest}, but its tokenizer has {self.vocab_size}; {_PREPARE}.")


def has_carriage_returns(store: Store, split: str = "train") -> bool:
    """Whether most lines at the beginning of the split's text end with "\\r\\n", where the "\\r" is in the ids."""
    tokenizer, ids = store.tokenizer(), store.ids(split)[: 1 << 20]
    returns = [id for id, piece in enumerate(tokenizer.pieces) if piece.endswith(b"\r")]
    ends = np.flatnonzero(ids == tokenizer.boundary_id)
    return bool(len(ends)) and float(np.isin(ids[ends - 1], returns).mean()) > 0.5


def is_store(path: str | Path) -> bool:
    """Whether there is a folder with a store.json at `path`."""
    return (Path(path) / "store.json").is_file()


def prepare(
    source: str | Path,
    config: TokenizerConfig,
    path: str | Path,
    tokenizer: Tokenizer | None = None,
    *,
    overwrite: bool = False,
) -> Store:
    """The store at `path` of the text at `source` (see `open_corpus`); its tokenizer is made or given."""
    _check_target(Path(path), overwrite)
    corpus = open_corpus(source)
    return write_store(corpus, tokenizer or build_tokenizer(corpus, config), path, overwrite=overwrite)


def build_tokenizer(corpus: Corpus, config: TokenizerConfig) -> Tokenizer:
    """The tokenizer of `config`, with the vocabulary of train, or of all splits with vocab_splits "all"."""
    cls = lookup(TOKENIZERS, config.kind, "tokenizer.kind")
    splits = corpus.splits if config.vocab_splits == "all" else ("train",)
    if cls.reads_bytes:
        return train_tokenizer((), config)
    return train_tokenizer((text for s in splits for text in texts(corpus.blocks(s), cls, corpus.places[s])), config)


def write_store(
    corpus: Corpus,
    tokenizer: Tokenizer,
    path: str | Path,
    splits: Iterable[str] | None = None,
    *,
    overwrite: bool = False,
) -> Store:
    """The store written at `path`, block by block: memory does not grow with the text.

    UserError when `path` exists (with `overwrite` a store there is replaced); DataError for an empty split or
    text that is not UTF-8.
    """
    path = Path(path)
    _check_target(path, overwrite)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be made: {error.strerror}.") from None
    _remove_litter(path)
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    dtype = "<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4"
    try:
        temporary.mkdir()
        info = {}
        for split in corpus.splits if splits is None else splits:
            with (temporary / f"{split}.bin").open("wb") as file:
                info[split] = _write_split(corpus, split, tokenizer, np.dtype(dtype), file)
        tokenizer.save(temporary / "tokenizer.json")
        content = {
            "format": FORMAT,
            "tokenizer": {"kind": tokenizer.kind, "hash": tokenizer.hash, "vocab_size": tokenizer.vocab_size},
            "dtype": dtype,
            "splits": {split: asdict(counts) for split, counts in info.items()},
        }
        (temporary / "store.json").write_text(to_json(content | {"hash": _hash(content)}), encoding="utf-8")
        for written in (*temporary.iterdir(), temporary):
            sync(written)
        if path.exists():
            _exchange(temporary, path)
        else:
            temporary.rename(path)
        sync(path.parent)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        free = files.size(shutil.disk_usage(path.parent).free)
        raise RunError(f"{path}: the store could not be written: the disk is full, {free} are free.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return open_store(path)


def open_store(path: str | Path) -> Store:
    """The store at `path`. UserError when there is none; DataError when its files do not fit together.

    Sizes are checked here, the ids themselves by `Store.verify`.
    """
    path = Path(path)
    file = path / "store.json"
    if not file.is_file():
        raise UserError(
            f"{path}: no store here (no store.json); make one with `recurlm data prepare SOURCE -o {path}`."
        )
    with _reading(file):
        description = files.read_regular(file, 1 << 20)
    try:
        content = files.parse_json(description)
        hash, version, tokenizer = content.pop("hash"), content["format"], content["tokenizer"]
        store = Store(
            path,
            {split: SplitInfo(**counts) for split, counts in content["splits"].items()},
            hash,
            tokenizer["kind"],
            tokenizer["hash"],
            tokenizer["vocab_size"],
            content["dtype"],
        )
    except (ValueError, TypeError, KeyError, AttributeError):
        raise DataError(f"{file}: cannot be read as a store's description; {_PREPARE}.") from None
    if type(version) is not int or version != FORMAT:
        raise DataError(f"{file}: found format {shown(version)}, this recurlm reads format {FORMAT}; {_PREPARE}.")
    if hash != _hash(content) or not _possible(store):
        raise DataError(f"{file}: changed since it was written; {_PREPARE}.")
    for split, info in store.info.items():
        ids = path / f"{split}.bin"
        expected = info.tokens * np.dtype(store.dtype).itemsize
        found = ids.stat().st_size if ids.is_file() else None
        if found != expected:
            seen = "no file" if found is None else f"{found} bytes"
            raise DataError(f"{ids}: found {seen}, expected {expected} bytes; {_PREPARE}.")
    saved = path / "tokenizer.json"
    with _reading(saved), files.open_regular(saved) as source:
        if hashlib.file_digest(source, "sha256").hexdigest() != store.tokenizer_hash:
            raise DataError(f"{saved}: not the tokenizer that this store was made with; {_PREPARE}.")
    return store


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    """Turns what is wrong with a store's file itself into a DataError that names it."""
    try:
        yield
    except FileNotFoundError:
        raise DataError(f"{file}: it is missing; {_PREPARE}.") from None
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}; {_PREPARE}.") from None
    except ValueError as error:
        raise DataError(f"{file}: {error}; {_PREPARE}.") from None


def _possible(store: Store) -> bool:
    """Whether a description's names and numbers are such as `write_store` could have written."""
    counts = [asdict(info) for info in store.info.values()]
    numbers = [n for entry in counts for key, n in entry.items() if key != "sha256"]
    return (
        set(store.info) <= {*SPLITS, WHOLE}
        and store.dtype in ("<u2", "<u4")
        and type(store.vocab_size) is int
        and 1 <= store.vocab_size < 2**31
        and all(type(n) is int and 0 <= n < 2**62 for n in numbers)
        and all(entry["tokens"] for entry in counts)
    )


def texts(blocks: Iterable[bytes], tokenizer: type[Tokenizer], place: str) -> Iterator[str]:
    """The blocks as text, cut where `tokenizer` allows: ids are those of the whole. The last line is ended.

    DataError naming `place` for bytes that are not UTF-8, or a word of more than 64 MB.
    """
    carry, offset, last = "", 0, "\n"
    for block in blocks:
        try:
            text = carry + block.decode()
        except UnicodeDecodeError as error:
            raise DataError(
                f"{place}: not UTF-8 text at byte {offset + error.start}; "
                "convert it to UTF-8, or use the byte tokenizer."
            ) from None
        offset, last = offset + len(block), text[-1]
        end = len(text) if last == "\n" else text.rfind("\n") + 1 or tokenizer.cut(text)
        carry = text[end:]
        if len(carry) > MAX_WORD:
            raise DataError(
                f"{place}: a word of more than {MAX_WORD >> 20} MB before byte {offset}; "
                "use another tokenizer than word."
            )
        if end:
            yield text[:end]
    if carry or last != "\n":
        yield carry + (tokenizer.line_end if last != "\n" else "")


# White space in UTF-8: ASCII's as a table, the wider ones as a pattern.
_SPACES = [chr(point) for point in range(0x3001) if chr(point).isspace()]
_IS_SPACE = bytes(chr(byte) in _SPACES and byte < 0x80 for byte in range(256))
_WIDE_SPACE = re.compile("|".join(c for c in _SPACES if c > "\x7f").encode())


@final
class _Counter:
    """Counts words, lines, characters and bytes of the blocks that pass through `watch`."""

    def __init__(self):
        self.words = self.lines = self.characters = self.bytes = 0

    def watch(self, blocks: Iterable[bytes]) -> Iterator[bytes]:
        before, last = b"\1", b"\n"
        for block in blocks:
            self.lines += block.count(b"\n")
            self.bytes += len(block)
            continuation = np.frombuffer(block, np.uint8) & 0xC0 == 0x80
            self.characters += len(block) - int(np.count_nonzero(continuation))
            narrow = block if block.isascii() else _WIDE_SPACE.sub(b" ", block)
            marks = before + narrow.translate(_IS_SPACE)
            space = np.frombuffer(marks, np.bool_)
            self.words += int(np.count_nonzero(space[:-1] & ~space[1:]))
            before, last = marks[-1:], block[-1:]
            yield block
        self.lines += last != b"\n"
        self.words += self.lines


def _write_split(corpus: Corpus, split: str, tokenizer: Tokenizer, dtype: np.dtype, file: BinaryIO) -> SplitInfo:
    counter, digest, tokens = _Counter(), hashlib.sha256(), 0
    blocks = counter.watch(corpus.blocks(split))
    parts = blocks if tokenizer.reads_bytes else texts(blocks, type(tokenizer), corpus.places[split])
    for part in parts:
        ids = tokenizer.encode_prefix(part)  # type: ignore[arg-type]
        if ids.size:
            if ids.min() < 0 or ids.max() >= tokenizer.vocab_size:
                raise DataError(
                    f"{corpus.places[split]}: the {tokenizer.kind} tokenizer gave an id that it does not have."
                )
            data = ids.astype(dtype).data
            digest.update(data)
            file.write(data)
            tokens += ids.size
    if not tokens:
        raise DataError(
            f"{corpus.places[split]}: the {split + ' ' if split != WHOLE else ''}text is empty; expected at least one line."
        )
    return SplitInfo(tokens, counter.words, counter.lines, counter.characters, counter.bytes, digest.hexdigest())


def _check_target(path: Path, overwrite: bool) -> None:
    if path.exists() and not (overwrite and is_store(path)):
        what = "a store" if is_store(path) else "something that is not a store"
        remedy = "use --force to replace it, or " if is_store(path) else ""
        raise UserError(f"{path}: {what} exists already; {remedy}choose another path.")


def _exchange(new: Path, old: Path) -> None:
    """Swaps two folders: on Linux at once (renameat2), elsewhere in three steps with a moment without `old`."""
    library = ctypes.CDLL(None)
    if hasattr(library, "renameat2"):
        here, both = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
        if library.renameat2(here, os.fsencode(new), here, os.fsencode(old), both) == 0:
            return
    aside = new.with_name(f"{new.name}-old")
    old.rename(aside)
    new.rename(old)
    aside.rename(new)


def _remove_litter(path: Path) -> None:
    """Removes what writers of `path` left behind that run no more."""
    for folder in path.parent.glob(f".{path.name}.tmp-*"):
        pid = folder.name.split(".tmp-")[-1].split("-")[0]
        if pid.isdigit() and not _is_running(int(pid)):
            shutil.rmtree(folder, ignore_errors=True)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return pid != os.getpid()


def _hash(content: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
