"""ARPA files: the text form of back-off models that all n-gram tools share.

A line's boundary is `<s>` as a context and `</s>` as a word. The tokenizer's unknown id, an ordinary word of n-grams, is written
`<_unk_>`; `<unk>` is what the model leaves for words that it has never seen.
"""

from __future__ import annotations

import gzip
import math
import re
import zlib
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NoReturn, final

import numpy as np

from recurlm import files
from recurlm.errors import DataError, RequestError, UserError, shown
from recurlm.ngram.counts import MOST_ORDER
from recurlm.ngram.trie import LOG10_ZERO, MOST_NODES, Table, compiled, find, link, sums, word_dtype
from recurlm.text.tokenizers import Tokenizer
from recurlm.text.tokenizers.word import EOS, UNK, WordTokenizer

BEGIN, END, UNSEEN, PLACEHOLDER = "<s>", "</s>", "<unk>", "<_unk_>"
TOLERANCE = 1e-3  # by which the probabilities after a context may miss one
ROWS = 1 << 18  # n-grams written at once


def words_of(tokenizer: Tokenizer) -> list[str]:
    """How each id is written: a word as it is, an id of another tokenizer as #ID; RequestError for a word that ARPA uses itself."""
    if tokenizer.kind != "word":
        return [f"#{id}" for id in range(tokenizer.vocab_size)]
    words = [piece.decode() for piece in tokenizer.pieces]
    for word in {BEGIN, END, PLACEHOLDER}.intersection(words):
        raise RequestError(
            f"The word {word!r} of this vocabulary has a meaning of its own in ARPA files; rename it in the text."
        )
    if tokenizer.unk_id is not None:
        words[tokenizer.unk_id] = PLACEHOLDER
    return words


def write(path: Path, table: Table, tokenizer: Tokenizer) -> None:
    """None; writes the model as an ARPA file, packed if its name ends with .gz. OSError leaves what was there before."""
    words = words_of(tokenizer)
    begins = [*words]
    begins[tokenizer.boundary_id], words[tokenizer.boundary_id] = BEGIN, END
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with gzip.open(temporary, "wb", 6) if path.suffix == ".gz" else temporary.open("wb") as file:
            for lines in _lines(table, words, begins, tokenizer.boundary_id):
                file.write(lines.encode())
        files.publish(temporary, path)
    finally:
        files.remove(temporary)


def _lines(table: Table, words: list[str], begins: list[str], boundary: int) -> Iterator[str]:
    trie, known = table.trie, np.flatnonzero(table.known_V)
    sizes = [len(known) + 2, *(b - a for a, b in zip(trie.levels[1:], trie.levels[2:], strict=False))]
    yield "\\data\\\n" + "".join(f"ngram {m}={size}\n" for m, size in enumerate(sizes, 1)) + "\n\\1-grams:\n"
    inner = trie.order > 1
    zero = "\t0" if inner else ""
    unk, begin = _texts(np.array([table.unk_log10, table.backoff_I[boundary] if inner else 0], np.float32))
    begin = f"\t{begin}" if inner else ""
    yield f"{unk}\t{UNSEEN}{zero}\n0\t{BEGIN}{begin}\n"
    for order in range(1, trie.order + 1):
        if order > 1:
            yield f"\n\\{order}-grams:\n"
        low, high = trie.levels[order - 1 : order + 1]
        for start in range(low, high, ROWS):
            nodes = np.arange(start, min(start + ROWS, high)) if order > 1 else known[start : start + ROWS]
            texts = list(map(words.__getitem__, trie.words_K[nodes].tolist()))
            above = nodes
            for back in range(1, order):
                above = np.searchsorted(trie.first_I, above, side="right") - 1
                spell = begins if back == order - 1 else words
                before = map(spell.__getitem__, trie.words_K[above].tolist())
                texts = [f"{word} {text}" for word, text in zip(before, texts, strict=True)]
            p = _texts(table.log10_K[nodes])
            if order < trie.order:
                weights = table.backoff_I[nodes]
                if order == 1:
                    weights[nodes == boundary] = 0  # that of <s>, which has a line of its own
                columns = zip(p, texts, _texts(weights), strict=True)
            else:
                columns = zip(p, texts, strict=True)
            yield "".join("\t".join(row) + "\n" for row in columns)
    yield "\n\\end\\\n"


def _texts(values: np.ndarray) -> list[str]:
    """The shortest decimal of each float32 that is read back as the same."""
    return [text.removesuffix(".0") for text in values.astype("U16").tolist()]


def read(path: Path, *, normalised: bool = True) -> tuple[Table, WordTokenizer]:
    """(model, tokenizer of its words) of an ARPA file, plain or packed.

    DataError with the line for anything that cannot be right: syntax, numbers, words or contexts that are not listed, n-grams
    listed twice, and, unless `normalised` is false, a context after which the probabilities do not sum to one.
    """
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            return _Reader(path, file, normalised).read()  # type: ignore[arg-type]
    except (gzip.BadGzipFile, EOFError, zlib.error):
        raise DataError(f"{path}: this gzip file is damaged or cut short.") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}.") from None


@compiled
def _descend(words_K, first_I, rows_NM, out_N):
    """Writes the node of each row, -1 where there is none."""
    for i in range(rows_NM.shape[0]):
        node = np.int64(rows_NM[i, 0])
        for k in range(1, rows_NM.shape[1]):
            if node >= 0:
                node = find(words_K, first_I[node], first_I[node + 1], rows_NM[i, k])
        out_N[i] = node


@final
class _Reader:
    """Reads one file from its begin to its end."""

    def __init__(self, path: Path, file: BinaryIO, normalised: bool):
        self.path, self.file, self.normalised, self.number = path, file, normalised, 0

    def fail(self, what: str, number: int | None = None) -> NoReturn:
        raise DataError(f"{self.path}, line {number or self.number}: {what}.")

    def line(self) -> str:
        """The next line, without its end; DataError at the end of the file."""
        data = self.file.readline(1 << 20)
        self.number += 1
        if (
            not data.endswith(b"\n") and len(data) < 1 << 20 and data.strip() != b"\\end\\"
        ):  # nothing, or a part of a line
            self.fail("the file ends here, before \\end\\; it is cut short")
        try:
            return data.decode().rstrip("\r\n")
        except UnicodeDecodeError:
            self.fail("not UTF-8 text")

    def header(self) -> list[int]:
        """The number of n-grams of each order."""
        while (line := self.line().strip()) != "\\data\\":
            if line:
                self.fail(f"found {shown(line)}, expected \\data\\")
        sizes: list[int] = []
        while line := self.line().strip():
            found = re.fullmatch(r"ngram ([0-9]{1,3})=([0-9]{1,10})", line)
            if not found or int(found[1]) != len(sizes) + 1:
                self.fail(f"found {shown(line)}, expected 'ngram {len(sizes) + 1}=' and a number")
            sizes.append(int(found[2]))
        if not 1 <= len(sizes) <= MOST_ORDER or sum(sizes) > MOST_NODES:
            self.fail(f"found n-grams of {len(sizes)} orders, expected 1 to {MOST_ORDER}")
        return sizes

    def entries(self, order: int, size: int, last: bool) -> Iterator[tuple[list[str], float, float]]:
        """(words, log10 p, log10 back-off weight) of each n-gram of a section."""
        while not (line := self.line().strip()):
            pass
        if line != f"\\{order}-grams:":
            self.fail(f"found {shown(line)}, expected \\{order}-grams:")
        seen = 0
        while line := self.line():
            fields = line.split("\t")
            if len(fields) == 1:
                parts = line.split()
                fields = (
                    [parts[0], " ".join(parts[1 : order + 1]), *parts[order + 1 :]] if len(parts) > order else parts
                )
            if not 2 <= len(fields) <= 3 - last:
                self.fail(
                    f"found {shown(line)}, expected log10 p, {order} words{'' if last else ' and perhaps a weight'}"
                )
            words = fields[1].split(" ")
            if len(words) != order or "" in words:
                self.fail(f"found {shown(fields[1])}, expected {order} words, one space between them")
            seen += 1
            if seen > size:
                self.fail(f"more {order}-grams than the {size:,} of the header")
            p = self.logarithm(fields[0])
            if p > 0:
                self.fail(f"log10 p is {fields[0]}, but no probability is above one")
            yield words, p, self.logarithm(fields[2]) if len(fields) == 3 else 0.0
        if seen != size:
            self.fail(f"{seen:,} {order}-grams end here, but the header has {size:,}")

    def logarithm(self, text: str) -> float:
        try:
            value = float(text) if text.isascii() and "_" not in text else math.nan
        except ValueError:
            value = math.nan
        if value == -math.inf:
            return LOG10_ZERO
        if not abs(value) <= 1000:
            self.fail(f"found {shown(text)}, expected a base-10 logarithm")
        return max(value, LOG10_ZERO)

    def read(self) -> tuple[Table, WordTokenizer]:
        sizes = self.header()
        words, log10_V, backoff_V, lines_V, unk = self.unigrams(sizes[0], last=len(sizes) == 1)
        placed = PLACEHOLDER in words
        tokens = [EOS, UNK, *(word for word in words if word not in (UNSEEN, PLACEHOLDER))]
        ids = {word: id for id, word in enumerate(tokens)} | {BEGIN: 0, END: 0, PLACEHOLDER: 1}
        del ids[EOS], ids[UNSEEN if placed else PLACEHOLDER]
        levels, levels_words = [0, len(tokens)], [np.arange(len(tokens))]
        log10, backoff, lines, first = [log10_V], [backoff_V], [lines_V], []
        unknown_used = placed
        for order, size in enumerate(sizes[1:], 2):
            rows_NM, log10_N, backoff_N, lines_N = self.section(order, size, ids, last=order == len(sizes))
            unknown_used = unknown_used or bool((rows_NM == 1).any())
            parents_N = np.empty(size, np.int64)
            flat = (
                np.concatenate(levels_words).astype(np.int64),
                np.concatenate([*first, [levels[-1]]]).astype(np.int64),
            )
            _descend(*flat, rows_NM[:, :-1], parents_N)
            if (orphans := np.flatnonzero(parents_N < 0)).size:
                self.fail(
                    f"the first {order - 1} words of this n-gram are no n-gram of the file", int(lines_N[orphans[0]])
                )
            by = np.lexsort((rows_NM[:, -1], parents_N))
            parents_N, words_N, lines_N = parents_N[by], rows_NM[by, -1], lines_N[by]
            if (twice := np.flatnonzero((np.diff(parents_N) == 0) & (np.diff(words_N) == 0))).size:
                self.fail("this n-gram is listed twice", int(lines_N[twice[0] : twice[0] + 2].max()))
            first.append(np.searchsorted(parents_N, np.arange(*levels[-2:])) + levels[-1])
            levels.append(levels[-1] + size)
            levels_words.append(words_N)
            log10.append(log10_N[by])
            backoff.append(backoff_N[by])
            lines.append(lines_N)
        self.end()
        log10_V[1] = log10_V[1] if placed else unk
        known_V = np.ones(len(tokens), np.bool_)
        known_V[1] = unknown_used
        trie = link(
            tuple(levels),
            np.concatenate(levels_words).astype(word_dtype(len(tokens))),
            np.concatenate([*first, [levels[-1]]]).astype(np.int32),
        )
        left = LOG10_ZERO if unknown_used and not placed else unk
        table = Table(trie, np.concatenate(log10), np.concatenate(backoff)[: trie.inner], known_V, left)
        if self.normalised:
            self.check(table, np.concatenate(lines))
        return table, WordTokenizer(tokens)

    def unigrams(self, size: int, last: bool) -> tuple[list[str], np.ndarray, np.ndarray, np.ndarray, float]:
        """(words but <s> and </s>, log10 p, weights and lines of the ids that they get, log10 p(<unk>))."""
        found: dict[str, tuple[float, float, int]] = {}
        for (word,), p, weight in self.entries(1, size, last):
            if word in found:
                self.fail(f"the word {shown(word)} is listed twice")
            if word == EOS or word.split() != [word]:
                self.fail(
                    f"the word {shown(word)} cannot be a word here: it stands for a line's end or holds white space"
                )
            found[word] = p, weight, self.number
        for word in (BEGIN, END):
            if word not in found:
                self.fail(f"the 1-grams end here, without {word}")
        begin, end = found.pop(BEGIN), found.pop(END)
        unk = found.get(UNSEEN, (LOG10_ZERO, 0.0, self.number))
        second = found.get(PLACEHOLDER, unk)
        rows = [
            (end[0], begin[1], begin[2]),
            second,
            *(found[word] for word in found if word not in (UNSEEN, PLACEHOLDER)),
        ]
        p, weights, lines = zip(*rows, strict=True)
        return list(found), np.array(p, np.float32), np.array(weights, np.float32), np.array(lines), unk[0]

    def section(self, order: int, size: int, ids: dict[str, int], last: bool) -> tuple[np.ndarray, ...]:
        """(ids, log10 p, weights, lines) of the n-grams of an order, as they come."""
        rows, log10, backoff, lines = array("i"), array("f"), array("f"), array("q")
        for words, p, weight in self.entries(order, size, last):
            try:
                rows.extend([ids[word] for word in words])
            except KeyError as unknown:
                self.fail(f"the word {shown(unknown.args[0])} is not among the 1-grams")
            if BEGIN in words[1:] or END in words[:-1]:
                self.fail(f"{BEGIN} can only be the first word of an n-gram, and {END} the last")
            log10.append(p)
            backoff.append(weight)
            lines.append(self.number)
        return np.array(rows, np.int64).reshape(size, order), *(np.array(values) for values in (log10, backoff, lines))

    def end(self) -> None:
        while not (line := self.line().strip()):
            pass
        if line != "\\end\\":
            self.fail(f"found {shown(line)}, expected \\end\\")

    def check(self, table: Table, lines_K: np.ndarray) -> None:
        """None; DataError naming a context after which the probabilities do not sum to one."""
        p_V = 10.0 ** table.log10_K[: table.trie.vocab_size].astype(np.float64)
        total = float(p_V[table.known_V].sum() + 10.0**table.unk_log10)
        if not abs(total - 1) <= TOLERANCE:
            self.fail(f"the probabilities of the 1-grams sum to {total:.6g}, not to one", int(lines_K.min()))
        for order in range(1, table.trie.order):
            own, below = sums(table, order)
            with np.errstate(over="ignore", invalid="ignore"):
                totals = own + 10.0 ** table.backoff_I[table.trie.level(order)].astype(np.float64) * (1 - below)
                wrong = np.flatnonzero(~(np.abs(totals - 1) <= TOLERANCE))
            if wrong.size:
                at = int(lines_K[table.trie.levels[order - 1] + wrong[0]])
                self.fail(
                    f"after this n-gram the probabilities of all words sum to {totals[wrong[0]]:.6g}, not to one", at
                )
