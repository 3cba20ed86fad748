"""What models get wrong, as one page: a section a question, the same words for every model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, final

import numpy as np

from recurlm.evaluation import probes
from recurlm.evaluation.metrics import calibration, last_occurrence
from recurlm.evaluation.page import Cell, Chart, Section, Series, Table, coloured, page
from recurlm.evaluation.reading import Reader, Reading, Subject, Text

WORDS = 250_000  # of a longer text the first lines that hold so many words are read
RARE = 1000
FREQUENCY = (
    ("new", 0, 0),
    ("1–9", 1, 9),
    ("10–99", 10, 99),
    ("100–999", 100, 999),
    ("1k–9k", 1000, 9999),
    ("10k+", 10000, 10**12),
)
DISTANCE = (
    ("new", 0, 0),
    ("1–10", 1, 10),
    ("11–50", 11, 50),
    ("51–200", 51, 200),
    ("201–1k", 201, 1000),
    ("1k+", 1001, 10**12),
)
PLACE = (
    ("1", 1, 1),
    ("2", 2, 2),
    ("3", 3, 3),
    ("4–5", 4, 5),
    ("6–10", 6, 10),
    ("11–20", 11, 20),
    ("21–40", 21, 40),
    ("41+", 41, 10**12),
)
SINCE = ((1, 1), (2, 2), (3, 5), (6, 10), (11, 20), (21, 50))
PIECES = 24


@final
@dataclass(frozen=True)
class Measured:
    """The text and each model's Reading of it."""

    text: Text
    counts: Mapping[str, int] | None
    """How often each word is in the first model's training text; None when that is not at hand."""
    readers: Sequence[Reader]
    readings: Sequence[Reading]

    @property
    def names(self) -> list[str]:
        return [reader.subject.name for reader in self.readers]

    @property
    def plain_W(self) -> np.ndarray:
        """Words that are neither line ends nor unknown to any model."""
        return ~self.text.line_ends & ~np.any([r.unknown_W for r in self.readings], 0)


def report(
    subjects: Sequence[Subject],
    text: str,
    place: str,
    counts: Mapping[str, int] | None = None,
    others: Mapping[str, str] | None = None,
    size: tuple[int, int] | None = None,
    rows: int = 8,
    say: Callable[[str], None] = lambda what: None,
) -> tuple[str, dict[str, Any]]:
    """(the page as HTML, its numbers) of models on a text that `place` names.

    `size` are the text's characters and bytes as it was written; `others` are texts to measure a change of style with.
    Every model reads in `rows` streams; `say` is told what goes on.
    """
    shortened = probes.first_lines(text, WORDS)
    the_text = Text(shortened, size if len(shortened) == len(text) else None)
    readers = [Reader(subject, the_text) for subject in subjects]
    readings = []
    for reader in readers:
        say(f"{reader.subject.name}: reading {len(the_text.words):,} words")
        readings.append(reader.read(rows))
    m = Measured(the_text, counts, readers, readings)
    sections = [
        _summary(m),
        _calibration(m),
        _kinds(m),
        _frequency(m),
        _unknown(m),
        _positions(m),
        _over_time(m),
        _distance(m),
    ]
    for reader in readers:
        say(f"{reader.subject.name}: asking how it uses context, copies, adds and writes")
    able = [n for n, reader in enumerate(readers) if probes.enough(reader)]
    if able:
        sections += [_context(m, able), _switch(m, able), _lines(m, able)]
    sections += [_repetition(m), _arithmetic(m)]
    if others:
        sections.append(_style(m, others))
    sections += _worst(m)
    cut = "" if len(shortened) == len(text) else f", the first {len(the_text.words):,} of them"
    apart = "parallel streams, so figures may differ a little from those of recurlm eval, which reads in one"
    streams = f"{rows} {apart}" if rows > 1 else "one stream"
    lead = (
        f"{place}{cut}: {len(the_text.words):,} words, line ends counted. Surprisal is -log2 p in bits; of a word that"
        " is several "
        f"tokens, their sum. Every model reads in {streams}. Kinds of words are means over all of the "
        "text; the sections "
        "on context, switches, copying and writing are samples, whose size each names."
    )
    title = (
        "What " + " and ".join([", ".join(m.names[:-1]), m.names[-1]] if len(m.names) > 1 else m.names) + " gets wrong"
    )
    title = title.replace("gets", "get") if len(m.names) > 1 else title
    numbers = {
        "text": place,
        "words": len(the_text.words),
        "models": m.names,
        "summary": {name: reading.summary(the_text) for name, reading in zip(m.names, readings, strict=True)},
        "sections": {
            s.key: [{"header": list(t.header), "rows": [list(r) for r in t.rows]} for t in s.tables] for s in sections
        },
    }
    return page(title, lead, sections), numbers


def _per_model(m: Measured, what: str) -> list[str]:
    return [what] if len(m.names) == 1 else [f"{what}: {name}" for name in m.names]


def _grouped(m: Measured, head: str, groups: Sequence[tuple[str, np.ndarray]]) -> Table:
    """Share of words, perplexity a word and share of all bits, of each group of words."""
    rows: list[list[Cell]] = []
    for name, mask in groups:
        if mask.any():
            row: list[Cell] = [name, int(mask.sum()), float(mask.mean())]
            row += [float(2 ** min(r.bits_W[mask].mean(), 1000)) for r in m.readings]
            row += [float(r.bits_W[mask].sum() / r.bits_W.sum()) for r in m.readings]
            rows.append(row)
    header = [head, "words", "of words %", *_per_model(m, "perplexity"), *(f"{c} %" for c in _per_model(m, "of bits"))]
    return Table(header, rows)


def _curve(m: Measured, x_label: str, groups: Sequence[tuple[str, np.ndarray]]) -> Chart:
    """Mean bits a word over groups of words."""
    kept = [(name, mask) for name, mask in groups if mask.any()]
    lines = [
        Series(name, range(len(kept)), [float(r.bits_W[mask].mean()) for _, mask in kept], n)
        for n, (name, r) in enumerate(zip(m.names, m.readings, strict=True))
    ]
    return Chart(x_label, "bits per word", lines, [name for name, _ in kept])


def _binned(
    values_W: np.ndarray, bins: Sequence[tuple[str, int, int]], among_W: np.ndarray
) -> list[tuple[str, np.ndarray]]:
    return [(name, among_W & (values_W >= low) & (values_W <= high)) for name, low, high in bins]


def _summary(m: Measured) -> Section:
    labels = {
        "ppl": "perplexity per token", "ppl_word": "perplexity per word", "bpc": "bits per character",
        "bpb": "bits per byte", "oov_rate": "unknown words %", "top1": "token foreseen %", "top5": "in the first 5 %",
        "top10": "in the first 10 %", "mrr": "mean reciprocal rank", "exact_1_words": "next word foreseen %",
        "exact_2_words": "next 2 words foreseen %", "exact_3_words": "next 3 words foreseen %",
        "keys_saved_1": "keystrokes saved, 1 suggestion %", "keys_saved_3": "keystrokes saved, 3 suggestions %",
        "keys_saved_5": "keystrokes saved, 5 suggestions %",
    }  # fmt: skip
    found = [r.summary(m.text) for r in m.readings]
    kinds = [r.subject.tokenizer.kind for r in m.readers]
    rows: list[list[Cell]] = [
        ["parameters", *(r.subject.parameters or None for r in m.readers)],
        ["tokenizer", *(f"{kind}, {r.subject.model.vocab_size:,}" for kind, r in zip(kinds, m.readers, strict=True))],
    ]
    for key, label in labels.items():
        values = [f.get(key) for f in found]
        if any(v is not None for v in values):
            percent = label.endswith("%")
            rows.append(
                [
                    label.removesuffix(" %"),
                    *(None if v is None else f"{100 * v:.1f} %" if percent else v for v in values),
                ]
            )
    rows.append(["seconds for the reading", *(r.seconds for r in m.readings)])
    sampled = " and ".join(f"{len(r.rank_S):,}" for r in m.readings)
    says = (
        f"Everything from 'token foreseen' on is of {sampled} tokens spread evenly over the text. Next k words "
        "foreseen: greedy "
        "prediction gives exactly these words. Keystrokes: for word models and known words; suggestions change with "
        "every letter, taking "
        "one is one key, the space included. A word model pays nothing for how an unknown word is spelled, so compare"
        " perplexities "
        "and bits only between models with like shares of unknown words."
    )
    return Section("summary", "Overall", says, tables=[Table(["", *m.names], rows)])


def _calibration(m: Measured) -> Section:
    lines, rows = [], []
    for n, (name, r) in enumerate(zip(m.names, m.readings, strict=True)):
        c = calibration(r.confidence_S, r.correct_S)
        lines.append(Series(name, c.confidence, c.accuracy, n))
        expected, actual = r.entropy_W[r.sampled_W].mean(), r.bits_W[r.sampled_W].mean()
        rows.append(
            [name, 100 * c.ece, float(r.confidence_S.mean()), float(r.correct_S.mean()), float(expected), float(actual)]
        )
    says = (
        "How often the most probable token is right, by the probability that the model gave it; on the grey line it "
        "is right as often as "
        "it says, below it is too sure. ECE: expected calibration error, 15 bins. Entropy is the surprisal that the "
        "model itself expects."
    )
    header = ["", "ECE, points", "mean confidence %", "right %", "entropy a word, bits", "surprisal a word, bits"]
    return Section(
        "calibration",
        "Does it know what it knows?",
        says,
        [Chart("confidence", "accuracy", lines, diagonal=True)],
        [Table(header, rows)],
    )


def _kinds(m: Measured) -> Section:
    words, unknown = m.text.words, ~m.plain_W & ~m.text.line_ends
    number = np.array([w == "N" or any(c.isdigit() for c in w) for w in words])
    mark = np.array([not any(c.isalnum() for c in w) for w in words]) & ~m.text.line_ends
    capital = np.array([w[0].isupper() and w != "N" for w in words])
    groups: list[tuple[str, np.ndarray]] = [("line ends", m.text.line_ends), ("unknown words", unknown)]
    taken = m.text.line_ends | unknown
    for name, mask in (("numbers", number), ("punctuation", mark), ("capitalised words", capital)):
        groups.append((name, mask & ~taken))
        taken = taken | mask
    groups.append(("other words", ~taken))
    before = np.concatenate(([False], number[:-1]))
    groups += [
        ("right after a number", before & ~m.text.line_ends),
        ("first word of a line", np.isin(np.arange(len(words)), m.text.line_starts)),
    ]
    says = "Where the bits go. The kinds down to 'other words' part the text; the last two look at what was before."
    return Section("kinds", "Numbers, names, punctuation", says, tables=[_grouped(m, "kind", groups)])


def _frequency(m: Measured) -> Section:
    counts = m.counts
    source = "the first model's training text"
    if counts is None:
        counts, source = Counter(m.text.words), "this text itself, for the training text is not at hand"
    seen = np.array([counts.get(w, 0) for w in m.text.words])
    groups = _binned(seen, FREQUENCY, m.plain_W)
    says = f"Words by how often they are in {source}; line ends and unknown words left out."
    return Section(
        "frequency", "Rare words", says, [_curve(m, "times seen in training", groups)], [_grouped(m, "seen", groups)]
    )


def _unknown(m: Measured) -> Section:
    rows: list[list[Cell]] = []
    inside = ~m.text.line_ends
    for name, r in zip(m.names, m.readings, strict=True):
        after = np.concatenate(([False], r.unknown_W[:-1])) & inside & ~r.unknown_W
        other = inside & ~r.unknown_W & ~after
        means = [float(r.bits_W[mask].mean()) if mask.any() else None for mask in (r.unknown_W, after, other)]
        rows.append([name, float(r.unknown_W.mean()), *means])
    header = ["", "unknown %", "bits: unknown words", "bits: right after one", "bits: other words"]
    says = "What words outside the vocabulary cost, and the known words after them."
    return Section("unknown", "Unknown words", says, tables=[Table(header, rows)])


def _positions(m: Measured) -> Section:
    starts = m.text.line_starts
    place = np.arange(len(m.text.words)) - np.repeat(starts, np.diff([*starts, len(m.text.words)])) + 1
    groups = _binned(place, PLACE, ~m.text.line_ends)
    return Section(
        "line",
        "Within a line",
        "By the word's place in its line; line ends left out.",
        [_curve(m, "place in the line", groups)],
        [_grouped(m, "place", groups)],
    )


def _over_time(m: Measured) -> Section:
    pieces = np.array_split(np.arange(len(m.text.words)), min(PIECES, len(m.text.words)))
    lines = []
    middle = [float(100 * piece.mean() / len(m.text.words)) for piece in pieces]
    for n, (name, r) in enumerate(zip(m.names, m.readings, strict=True)):
        bits = [float(r.bits_W[piece].mean()) for piece in pieces]
        lines.append(Series(name, middle, bits, n))
        own = [piece[r.sampled_W[piece]] for piece in pieces]
        if all(map(len, own)):
            lines.append(
                Series(f"{name}, expected", middle, [float(r.entropy_W[piece].mean()) for piece in own], n, dashed=True)
            )
    says = (
        f"The entropy rate over the text, in {len(pieces)} equal pieces: surprisal, and dashed the entropy of the "
        "predictions, from the sample. "
        "Where the line rises above the dashes the model is surprised more than it expects."
    )
    return Section("time", "Over the text", says, [Chart("place in the text, %", "bits per word", lines)])


def _distance(m: Measured) -> Section:
    counts = m.counts or Counter(m.text.words)
    rare = np.array([counts.get(w, 0) < RARE for w in m.text.words])
    groups = _binned(last_occurrence(m.text.words), DISTANCE, m.plain_W & rare)
    says = (
        f"Words that are less than {RARE:,} times in training, by how many words ago they were there last: a model "
        "that remembers finds "
        "a word again that was there not long ago."
    )
    return Section(
        "distance",
        "Words that come again",
        says,
        [_curve(m, "words since the last time", groups)],
        [_grouped(m, "words ago", groups)],
    )


def _context(m: Measured, able: Sequence[int]) -> Section:
    lines, header, columns = [], ["words of context"], []
    for n in able:
        lengths, shuffled = probes.context_lengths(m.readers[n]), probes.shuffled_beyond(m.readers[n])
        name = m.names[n]
        lines.append(Series(f"{name}, dropped", list(lengths), list(lengths.values()), n))
        lines.append(Series(f"{name}, shuffled", list(shuffled), list(shuffled.values()), n, dashed=True))
        header += ["dropped", "shuffled"] if len(able) == 1 else [f"dropped: {name}", f"shuffled: {name}"]
        columns += [lengths, shuffled]
    rows: list[list[Cell]] = [[str(n), *(column.get(n) for column in columns)] for n in probes.LENGTHS]
    says = (
        f"Bits per word of the same {probes.CHUNKS * probes.TARGETS} words when what lies farther back is dropped, or "
        f"(of {probes.WHOLE} words) "
        "shuffled. Where the curve is flat, the model makes nothing of what lies farther back; where only shuffling "
        "does no harm, it keeps topics but no order."
    )
    return Section(
        "context",
        "How far back it looks",
        says,
        [Chart("words of context in order", "bits per word", lines, log=True)],
        [Table(header, rows)],
    )


def _switch(m: Measured, able: Sequence[int]) -> Section:
    charts, rows = [], []
    names = [f"{a}" if a == b else f"{a}–{b}" for a, b in SINCE]
    for n in able:
        found = probes.after_a_switch(m.readers[n])
        lines = []
        for k, (kind, bits) in enumerate(found.items()):
            means = [float(bits[a - 1 : b].mean()) for a, b in SINCE]
            lines.append(Series(kind, range(len(SINCE)), means, k))
            rows.append([kind if len(able) == 1 else f"{m.names[n]}: {kind}", *means])
        for kind, bits in probes.at_borders(m.readers[n]).items():
            label = f"a border of documents: {kind}"
            means = [float(bits[a - 1 : b].mean()) for a, b in SINCE]
            rows.append([label if len(able) == 1 else f"{m.names[n]}, {label}", *means])
        if lines:
            charts.append(Chart(f"words since the line's start ({m.names[n]})", "bits per word", lines, names))
    says = (
        f"Bits per word from a line's start on, at {probes.SPLICES} places, when the {probes.WHOLE} words before it "
        "are its own, are of another place of the "
        "text, as at the border of two documents, or are none. The gap to its own is what the change of subject "
        "costs, and how soon it is made good. Where the text itself has titles or empty lines between documents, the last "
        "rows begin at these."
    )
    return Section("switch", "When the subject changes", says, charts, [Table(["after", *names], rows)])


def _lines(m: Measured, able: Sequence[int]) -> Section:
    rows: list[list[Cell]] = []
    for n in able:
        fresh, which = probes.afresh_at_lines(m.readers[n])
        carried = m.readings[n].bits_W[which]
        rows.append(
            [
                m.names[n],
                len(which),
                float(2 ** carried.mean()),
                float(2 ** fresh.mean()),
                float(fresh.mean() - carried.mean()),
            ]
        )
    header = ["", "words", "perplexity, state carried", "perplexity, afresh at each line", "loss in bits a word"]
    says = "The same words read in one go and line by line, with a fresh state at each."
    return Section("sentences", "Sentence by sentence", says, tables=[Table(header, rows)])


def _repetition(m: Measured) -> Section:
    rows: list[list[Cell]] = []
    copies: list[list[Cell]] = []
    for name, reader in zip(m.names, m.readers, strict=True):
        if len(reader.ids_N) >= 400:
            for kind, found in probes.own_text(reader).items():
                rows.append([kind if len(m.names) == 1 else f"{name}: {kind}", *found.values()])
        if probes.enough(reader):
            first, second = probes.copying(reader)
            copies.append([name, first, second, first - second])
    says = (
        "How much a model's own text repeats itself, beside the text's own continuations: 12 passages of 100 tokens "
        "each after 50 of the text. rep-4: "
        "share of 4-grams that were there before; rep/50: share of tokens that are among the 50 before; distinct-n: "
        "different n-grams over all. Below: "
        "bits per word of 48 passages of 25 words, read once and at once again; who can copy needs hardly any the "
        "second time."
    )
    tables = [Table(["continuation", "rep-4 %", "rep/50 %", "distinct-1 %", "distinct-2 %"], rows)] if rows else []
    tables += [Table(["copying", "first time", "second time", "gain"], copies)] if copies else []
    return Section("repetition", "Repetition and copying", says, tables=tables)


def _arithmetic(m: Measured) -> Section:
    rows: list[list[Cell]] = []
    for name, reader in zip(m.names, m.readers, strict=True):
        found = probes.arithmetic(reader.subject)
        rows.append(
            [
                name,
                found.get("written", "its vocabulary has no way to write sums"),
                found.get("right"),
                found.get("mean_rank"),
            ]
        )
    says = (
        "All 45 sums of two numbers that are 2 to 10: is the right answer the most probable of these nine? By chance "
        "it is in 11.1 % of them, "
        "at a mean rank of 5; always saying the most frequent number is right in up to 20 %."
    )
    return Section("arithmetic", "Arithmetic", says, tables=[Table(["", "written as", "right %", "mean rank"], rows)])


def _style(m: Measured, others: Mapping[str, str]) -> Section:
    rows: list[list[Cell]] = []
    for name, reading in zip(m.names, m.readings, strict=True):
        own = reading.summary(m.text)
        label = "the text of this page" if len(m.names) == 1 else f"the text of this page: {name}"
        rows.append([label, own["ppl_word"], own["bpb"], own["oov_rate"], "none"])
    for place, text in others.items():
        for name, reader in zip(m.names, m.readers, strict=True):
            found = probes.elsewhere(reader.subject, probes.first_lines(text, 20_000))
            label = place if len(m.names) == 1 else f"{place}: {name}"
            rows.append([label, *(found.get(key) for key in ("ppl_word", "bpb", "oov_rate", "rule"))])
    says = (
        "The first 20,000 words of each text, written as the model's training text was (text rule). Unknown words "
        "make a text look easier than it is."
    )
    return Section(
        "style",
        "Other styles",
        says,
        tables=[Table(["text", "perplexity a word", "bits a byte", "unknown %", "text rule"], rows)],
    )


def _worst(m: Measured, count: int = 8) -> list[Section]:
    starts = m.text.line_starts
    ends = np.array([*starts[1:], len(m.text.words)])
    usable = np.flatnonzero((ends - starts >= 7) & (ends - starts <= 60))
    if not len(usable):
        return []
    sections = []
    for n, (name, r) in enumerate(zip(m.names, m.readings, strict=True)):
        means = np.array([r.bits_W[starts[i] : ends[i]].mean() for i in usable])
        worst = usable[np.argsort(-means, kind="stable")[:count]]
        sections.append(
            _coloured(
                m,
                f"worst-{n}",
                f"Worst lines of {name}",
                "The lines of 6 to 60 words with the most bits per word.",
                worst,
                [n],
            )
        )
    if len(m.names) > 1:
        gaps = np.array([(m.readings[0].bits_W - m.readings[1].bits_W)[starts[i] : ends[i]].mean() for i in usable])
        apart = usable[np.argsort(-np.abs(gaps), kind="stable")[:count]]
        says = f"The lines on which {m.names[0]} and {m.names[1]} differ most, in bits per word."
        sections.append(_coloured(m, "apart", "Where they differ", says, apart, [0, 1]))
    return sections


def _coloured(m: Measured, key: str, title: str, says: str, lines: np.ndarray, models: Sequence[int]) -> Section:
    starts = m.text.line_starts
    ends = np.array([*starts[1:], len(m.text.words)])
    parts = []
    for i in lines:
        for n in models:
            bits = m.readings[n].bits_W[starts[i] : ends[i]]
            who = f"{escape(m.names[n])}, " if len(models) > 1 else ""
            parts.append(f'<p class="note">{who}line {i + 1:,}: {bits.mean():.1f} bits a word</p>')
            parts.append(coloured(m.text.words[starts[i] : ends[i]], bits.tolist()))
    says += " The darker a word, the more surprising; 16 bits and more are darkest."
    return Section(key, title, says, html="".join(parts))
