"""Suites: minimal pairs (is the good sentence the more probable one?) and last words (is the word foreseen?).

A pair is right when P(good) > P(bad), whole sentences summed, no length norm; a tie is wrong. A last word is right when each
of its tokens is the most probable one. Accuracy is also given on the items that hold no word unknown to the model.
"""

from __future__ import annotations

import csv
import math
import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, final

import torch
from torch import Tensor

from recurlm import files
from recurlm.errors import DataError, RequestError, UserError, nearest, shown
from recurlm.evaluation.metrics import ranks
from recurlm.inference.engine import ROW_TOKENS, score_sequences
from recurlm.protocol import StatefulModel
from recurlm.text import rules
from recurlm.text.corpora import data_folder, numbered_lines
from recurlm.text.tokenizers import Tokenizer

TIE = 1e-5  # nats: less is rounding


@final
@dataclass(frozen=True)
class Pair:
    """Two sentences of which `good` is the right one; with a `prefix`, two ways to go on from it, the rest of the line open."""

    good: str
    bad: str
    prefix: str | None
    group: str
    family: str


@final
@dataclass(frozen=True)
class LastWord:
    """A text whose last word, `target`, is to be foreseen."""

    context: str
    target: str
    group: str
    family: str


Item = Pair | LastWord


# Reading. Every fault of a file names the line.


def _fail(path: Path, line: int, what: str) -> NoReturn:
    raise DataError(f"{path}, line {line}: {what}")


def _objects(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of each line that is not blank."""
    for number, line in numbered_lines(path):
        if not line.strip():
            continue
        try:
            value = files.parse_json(line.encode())
        except ValueError as error:
            _fail(path, number, f"not strict JSON ({shown(str(error))}).")
        if not isinstance(value, dict):
            _fail(path, number, f"expected a JSON object, found {shown(value)}.")
        yield number, value


def _text(path: Path, line: int, value: dict[str, Any], key: str, default: str | None = None) -> str:
    """The text under a key: not empty, and such that it can be encoded."""
    text = value.get(key, default)
    if text is None and key not in value:
        _fail(path, line, f'there is no "{key}"; expected text.')
    if not isinstance(text, str) or not (text.strip() or text == default):
        _fail(path, line, f'expected text under "{key}", found {shown(text)}.')
    if any("\ud800" <= c <= "\udfff" for c in text):
        _fail(path, line, f'the text under "{key}" holds a lone surrogate, which is no character.')
    return text


def _last_word(path: Path, line: int, text: str, group: str) -> LastWord:
    parts = text.rstrip().rsplit(None, 1)
    if len(parts) < 2:
        _fail(path, line, f"expected two words or more, found {shown(text)}.")
    return LastWord(parts[0], parts[1], group, "")


OWN_KEYS = {"good": {"good", "bad", "prefix", "group"}, "text": {"text", "group"}}


def read_own(path: Path) -> list[Item]:
    """The items of a JSONL file: {"good", "bad"[, "prefix"][, "group"]} or {"text"[, "group"]} a line, one kind a file."""
    items: list[Item] = []
    for number, value in _objects(path):
        kind = "text" if "text" in value and "good" not in value else "good"
        if unknown := value.keys() - OWN_KEYS[kind]:
            _fail(path, number, f"unknown key {shown(min(unknown))}.{nearest(min(unknown), OWN_KEYS[kind])}")
        group = _text(path, number, value, "group", "")
        if kind == "text":
            item: Item = _last_word(path, number, _text(path, number, value, "text"), group)
        else:
            prefix = _text(path, number, value, "prefix") if "prefix" in value else None
            good, bad = _text(path, number, value, "good"), _text(path, number, value, "bad")
            if good.split() == bad.split():
                _fail(path, number, f"the good and the bad text are the same ({shown(good)}).")
            item = Pair(good, bad, prefix, group, "")
        if items and type(items[0]) is not type(item):
            _fail(path, number, "minimal pairs and last words in one file; make two.")
        items.append(item)
    return items


def read_blimp(folder: Path) -> list[Item]:
    """The pairs of every *.jsonl of the folder, `group` the paradigm (UID), `family` the phenomenon as published."""
    items: list[Item] = []
    for path in sorted(p for p in folder.iterdir() if p.name.endswith((".jsonl", ".jsonl.gz"))):
        for n, value in _objects(path):
            good, bad = _text(path, n, value, "sentence_good"), _text(path, n, value, "sentence_bad")
            family = _text(path, n, value, "linguistics_term")
            family = "argument_structure" if family == "s-selection" else family  # the paper counts them together
            items.append(Pair(good, bad, None, _text(path, n, value, "UID"), family))
    return items


def read_lambada(folder: Path) -> list[Item]:
    """The passages of lambada_test.jsonl."""
    path = _either(folder, "lambada_test.jsonl")
    return [_last_word(path, n, _text(path, n, value, "text"), "") for n, value in _objects(path)]


def read_gulordava(folder: Path) -> list[Item]:
    """The pairs of generated.tab (families original, nonce) and of Linzen's sentences (linzen; group: attractors), if there."""
    items = list(_generated(_either(folder, "generated.tab")))
    if any((folder / name).is_file() for name in ("subj_agr_filtered.text", "subj_agr_filtered.text.gz")):
        items += _linzen(_either(folder, "subj_agr_filtered.text"), _either(folder, "subj_agr_filtered.gold"))
    return items


COLUMNS = ("pattern", "constr_id", "sent_id", "correct_number", "form", "class", "type", "prefix")


def _generated(path: Path) -> Iterator[Item]:
    """Two rows make a pair: the same prefix with its correct and its wrong form."""
    header: list[str] = []
    before: dict[str, str] | None = None
    number = 0
    for number, line in numbered_lines(path):
        try:
            cells = next(csv.reader([line], delimiter="\t", strict=True), [])
        except csv.Error as error:
            _fail(path, number, f"not a row of tab-separated columns ({error}).")
        if not header:
            if missing := [name for name in COLUMNS if name not in cells]:
                _fail(path, number, f"the column {missing[0]} is missing.")
            header = cells
            continue
        if len(cells) != len(header):
            _fail(path, number, f"found {len(cells)} columns, expected {len(header)}.")
        row = dict(zip(header, cells, strict=True))
        family = {"original": "original", "generated": "nonce"}.get(row["type"])
        if family is None or row["class"] not in ("correct", "wrong"):
            _fail(path, number, f"unknown type or class: {shown(row['type'])}, {shown(row['class'])}.")
        if not row["form"].strip() or not row["prefix"].strip():
            _fail(path, number, "its form or prefix is empty.")
        if before is None:
            before = row
            continue
        same = all(row[c] == before[c] for c in ("pattern", "constr_id", "sent_id", "type", "prefix"))
        if not same or {row["class"], before["class"]} != {"correct", "wrong"}:
            _fail(path, number, "not the other form of the row before.")
        good, bad = (row, before) if row["class"] == "correct" else (before, row)
        yield Pair(good["form"], bad["form"], row["prefix"], row["pattern"], family)
        before = None
    if before is not None:
        _fail(path, number, "its other form is missing.")


def _linzen(path: Path, gold_path: Path) -> Iterator[Item]:
    """The gold file's rows: place of the verb, right form, wrong form, number of attractors."""
    sentences = [line.split() for _, line in numbered_lines(path)]
    number = 0
    for number, line in numbered_lines(gold_path):
        cells = line.split("\t")
        if len(cells) != 4 or not all(re.fullmatch(r"[0-9]{1,6}", cells[i]) for i in (0, 3)):
            _fail(gold_path, number, f"expected place, right form, wrong form and attractors, found {shown(line)}.")
        # The text is lower case; four of the forms are not.
        at, good, bad = int(cells[0]), cells[1].lower(), cells[2].lower()
        there = [word.lower() for word in sentences[number - 1][at : at + 1]] if number <= len(sentences) else []
        if there != [good] or not bad.strip():
            _fail(gold_path, number, f"line {number} of {path.name} has no {shown(good)} as word {at}, from 0.")
        prefix = " ".join(sentences[number - 1][:at])
        if not prefix:
            _fail(gold_path, number, "the sentence begins with the verb.")
        # four published rows have the same word twice: they stay, as ties
        yield Pair(good, bad, prefix, f"{int(cells[3])} attractors", "linzen")
    if number < len(sentences):
        _fail(path, number + 1, f"{gold_path.name} has only {number} lines.")


def _either(folder: Path, name: str) -> Path:
    path = folder / name
    return path if path.is_file() or not (folder / f"{name}.gz").is_file() else folder / f"{name}.gz"


@final
@dataclass(frozen=True)
class Suite:
    """A named suite: how its folder is read, by which file it is known, and what others measured, in percent."""

    read: Callable[[Path], list[Item]]
    file: str
    source: str
    published: dict[str, dict[str, float]]
    """Of each family; "" is the whole suite."""


def _columns(names: Sequence[str], rows: dict[str, tuple[float, ...]]) -> dict[str, dict[str, float]]:
    return {family: dict(zip(names, values, strict=True)) for family, values in rows.items()}


# BLiMP: the authors' results of each phenomenon (Warstadt et al. 2020, table 3); the LSTM is that of Gulordava et al. (2018).
_BLIMP = {
    "anaphor_agreement": (47.9, 91.7), "argument_structure": (71.9, 73.2), "binding": (64.4, 73.5),
    "control_raising": (68.5, 67.0), "determiner_noun_agreement": (70.0, 85.4), "ellipsis": (36.9, 67.6),
    "filler_gap_dependency": (60.2, 73.9), "irregular_forms": (79.5, 89.0), "island_effects": (57.2, 46.6),
    "npi_licensing": (45.5, 51.7), "quantifiers": (53.5, 64.5), "subject_verb_agreement": (60.3, 80.1),
}  # fmt: skip

SUITES: dict[str, Suite] = {
    "blimp": Suite(
        read_blimp,
        "anaphor_gender_agreement.jsonl",
        "the folder data of alexwarstadt/blimp on GitHub",
        {
            "": {"5-gram": 61.2, "LSTM, 80 M tokens": 69.8, "Transformer-XL": 69.6, "people": 88.6},
            **_columns(("5-gram", "LSTM, 80 M tokens"), _BLIMP),
        },
    ),
    "lambada": Suite(
        read_lambada,
        "lambada_test.jsonl",
        'LAMBADA\'s test passages, one {"text": ...} a line',
        {"": {"LSTM": 0.0, "4-gram": 0.1}},
    ),
    "gulordava": Suite(
        read_gulordava,
        "generated.tab",
        "the folder data/agreement/English of facebookresearch/colorlessgreenRNNs on GitHub",
        _columns(("LSTM, 80 M tokens", "word frequency"), {"original": (80.5, 65.9), "nonce": (71.8, 42.5)}),
    ),
}


def open_suite(name: str, source: str | Path = "") -> tuple[str, list[Item]]:
    """(name, items) of a named suite, from the folder `source` or the data folder, or of a JSONL file of one's own.

    UserError when the files are not there, DataError with the line number for content that is wrong.
    """
    if name in SUITES:
        found = _folder(name, Path(source) if source else None)
        items = SUITES[name].read(found)
    else:
        found = Path(name)
        if not name.endswith((".jsonl", ".jsonl.gz")):
            raise UserError(f"suite {shown(name)}: expected {', '.join(SUITES)} or a file FILE.jsonl of your own.")
        items = read_own(found)
    if not items:
        raise DataError(f"{found}: no items in it.")
    return name, items


def _folder(name: str, source: Path | None) -> Path:
    """Where the suite's files are: in `source` or its folder NAME; by default in NAME or suites/NAME of the data folder."""
    root = source or data_folder()
    suite = SUITES[name]
    places = [root, root / name] if source else [root / name, root / "suites" / name, root / "suites"]
    for place in places:
        if _either(place, suite.file).is_file():
            return place
    raise UserError(
        f"{root}: the files of the suite {name} are not here ({suite.file}, or {suite.file}.gz); "
        f"get {suite.source} and say where it is by --from DIR."
    )


# Measuring.


def evaluate_suite(
    model: StatefulModel, tokenizer: Tokenizer, items: Sequence[Item], rule: str = "auto"
) -> dict[str, Any]:
    """Accuracy over all items, each family and each group; for last words also the target's perplexity.

    Each entry: items, accuracy, ties, in_vocabulary (items without unknown words), accuracy_in_vocabulary (None without any).
    """
    start = time.perf_counter()
    name = rules.rule_name(tokenizer, rule)
    words, apply = rules.vocabulary(tokenizer), rules.RULES[name]
    encode = _Encoder(tokenizer, lambda text: apply(text, words))
    if pairs := [item for item in items if isinstance(item, Pair)]:
        rows = _pairs(model, encode, pairs)
    else:
        rows = _last_words(model, encode, [item for item in items if isinstance(item, LastWord)])
    out: dict[str, Any] = {**_entry(rows), "oov_rate": encode.unknown / max(1, encode.tokens), "text_rule": name}
    for key, names in (("families", [i.family for i in items]), ("groups", [i.group for i in items])):
        parts = defaultdict(list)
        for row, name in zip(rows, names, strict=True):
            parts[name].append(row)
        out[key] = {name: _entry(part) for name, part in sorted(parts.items()) if name}
    return {**out, "seconds": time.perf_counter() - start}


@final
@dataclass(frozen=True)
class _Row:
    right: bool
    tie: bool
    known: bool
    nats: float = 0.0
    short_nats: float = 0.0


def _entry(rows: Sequence[_Row]) -> dict[str, Any]:
    known = [row for row in rows if row.known]
    out: dict[str, Any] = {
        "items": len(rows),
        "accuracy": _mean(row.right for row in rows),
        "ties": sum(row.tie for row in rows),
        "in_vocabulary": len(known),
        "accuracy_in_vocabulary": _mean(row.right for row in known),
    }
    if any(row.nats for row in rows):
        for key, values in (
            ("target_ppl", [r.nats for r in known]),
            ("target_ppl_last_sentence", [r.short_nats for r in known]),
        ):
            out[key] = math.exp(min(_mean(values) or 0, 700)) if values else None
    return out


def _mean(values: Iterable[float]) -> float | None:
    values = list(values)
    return sum(values) / len(values) if values else None


@final
class _Encoder:
    """Text to the ids of a line without its end, by a text rule."""

    def __init__(self, tokenizer: Tokenizer, rule: Callable[[str], str]):
        self.tokenizer, self.rule = tokenizer, rule
        self.tokens = self.unknown = 0

    def line(self, text: str) -> list[int]:
        ids = self.tokenizer.encode_prefix(self.rule(text)).tolist()
        self.tokens, self.unknown = self.tokens + len(ids), self.unknown + ids.count(self.tokenizer.unk_id)
        return ids

    def after(self, context: str, word: str) -> tuple[list[int], list[int]]:
        """(ids of the context, ids of the word that goes on from it)."""
        first = self.line(context)
        whole = self.tokenizer.encode_prefix(f"{self.rule(context)} {self.rule(word)}").tolist()
        rest = (
            whole[len(first) :]
            if whole[: len(first)] == first
            else self.tokenizer.encode_prefix(f" {self.rule(word)}").tolist()
        )
        return first, rest


def _pairs(model: StatefulModel, encode: _Encoder, items: Sequence[Pair]) -> list[_Row]:
    boundary, places = encode.tokenizer.boundary_id, dict[tuple[int, ...], int]()
    asked = []
    for item in items:
        for form in (item.good, item.bad):
            ids = encode.line(form if item.prefix is None else f"{item.prefix} {form}")
            if model.backward:
                ids.reverse()
            if item.prefix is None:
                ids.append(boundary)
            asked.append(places.setdefault(tuple(ids), len(places)))
    sequences = list(places)
    nats = [float(nll.double().sum()) for nll in score_sequences(model, sequences, boundary)]
    unknown = encode.tokenizer.unk_id
    known = [unknown not in ids for ids in sequences]
    rows = []
    for good, bad in zip(asked[::2], asked[1::2], strict=True):
        gain = nats[bad] - nats[good]
        rows.append(_Row(gain > TIE, abs(gain) <= TIE, known[good] and known[bad]))
    return rows


_SENTENCE = re.compile(r"[.!?][\"'”’)]*\s+")


def _last_words(model: StatefulModel, encode: _Encoder, items: Sequence[LastWord]) -> list[_Row]:
    if model.backward:
        raise RequestError("Last words follow from what is before them, but this model reads backward.")
    asked = []
    for item in items:
        cut = max((found.end() for found in _SENTENCE.finditer(item.context)), default=0)
        asked.append(encode.after(item.context, item.target))
        asked.append((encode.tokenizer.encode_prefix(encode.rule(item.context[cut:])).tolist(), asked[-1][1]))
    results = foresee(model, asked, encode.tokenizer.boundary_id)
    unknown, rows = encode.tokenizer.unk_id, []
    for n, (_, target) in enumerate(asked[::2]):
        known = bool(target) and unknown not in target
        (nats, right), (short, _) = results[2 * n], results[2 * n + 1]
        rows.append(_Row(known and right, False, known, nats, short))
    return rows


@torch.inference_mode()
def foresee(
    model: StatefulModel, asked: Sequence[tuple[list[int], list[int]]], start_id: int
) -> list[tuple[float, bool]]:
    """For each (context, target): nats of the target's ids, and whether each of them is the most probable one alone.

    Rows of equal lengths are read together, so that their last ids fall on the same step; (0.0, False) for no target.
    """
    out: list[tuple[float, bool]] = [(0.0, False)] * len(asked)
    by_length: dict[tuple[int, int], list[int]] = defaultdict(list)
    for n, (context, target) in enumerate(asked):
        by_length[len(context), len(target)].append(n)
    for (before, length), rows in by_length.items():
        most = max(1, ROW_TOKENS // (before + length * (1 + model.vocab_size // 256)))
        for first in range(0, len(rows) if length else 0, most):
            part = rows[first : first + most]
            block_TB = torch.tensor([[start_id, *asked[n][0], *asked[n][1]] for n in part]).t().contiguous()
            nll_TB, rank_TB = _ends(model, block_TB.to(model.device), before)
            for n, nats, right in zip(
                part, nll_TB.double().sum(0).tolist(), (rank_TB == 1).all(0).tolist(), strict=True
            ):
                out[n] = nats, right
    return out


def _ends(model: StatefulModel, block_TB: Tensor, before: int) -> tuple[Tensor, Tensor]:
    """(nll, rank) of the rows after `before` + 1 of the block, each given all rows before it."""
    state = model.initial_state(block_TB.shape[1])
    window = max(1, ROW_TOKENS // block_TB.shape[1])
    for t in range(0, before, window):
        end = min(t + window, before)
        _, state = model.score(block_TB[t:end], block_TB[t + 1 : end + 1], state)
    targets_TB = block_TB[before + 1 :]
    log_probs_TBV, _ = model.advance(block_TB[before:-1], state)
    return -log_probs_TBV.gather(-1, targets_TB[..., None]).squeeze(-1), ranks(log_probs_TBV, targets_TB)
