"""Questions put to a model that its loss alone does not answer: how far back it looks, what a change of subject costs it,
whether it can copy and add, and whether its own text repeats itself. Samples are small and drawn from fixed seeds."""

from __future__ import annotations

import numpy as np
import torch

from recurlm.evaluation.metrics import distinct, repeats_within, repetition
from recurlm.evaluation.perplexity import evaluate_ids
from recurlm.evaluation.reading import Reader, Subject
from recurlm.inference.engine import score_sequences
from recurlm.inference.generate import Sampling, sample_ids
from recurlm.text import rules
from recurlm.text.batches import reading_order

TARGETS = 40  # consecutive words, of which each kind of context sees the same
CHUNKS = 16
LENGTHS = (1, 2, 5, 10, 20, 50, 100, 200, 500)
WHOLE = 200  # words of context of which the farther ones are shuffled
NEAR = (10, 20, 50, 100)
AFTER = 50
SPLICES, LEAST_BORDERS = 64, 8


def _places(reader: Reader, count: int, before: int, after: int) -> np.ndarray:
    """`count` places spread over the text, in words, each with room before and after it."""
    return np.linspace(before, len(reader.text.words) - after, count).astype(int)


def enough(reader: Reader) -> bool:
    """Whether the text is long enough, and the model one that carries its state."""
    return reader.subject.batching == "stream" and len(reader.text.words) >= 2 * LENGTHS[-1]


def context_lengths(reader: Reader) -> dict[int, float]:
    """Bits per word of the same words, by how many words the model has read before them.

    Of n words of context the last word of a group has up to a quarter more, so that longer contexts serve several words.
    """
    return {n: _mean_bits(reader, n, n, None) for n in LENGTHS}


def shuffled_beyond(reader: Reader) -> dict[int, float]:
    """Bits per word with WHOLE words of context, by how many of the last ones stay in order (Khandelwal et al. 2018)."""
    return {near: _mean_bits(reader, near, WHOLE, np.random.default_rng(1)) for near in NEAR}


def _mean_bits(reader: Reader, near: int, whole: int, draw: np.random.Generator | None) -> float:
    group = next(g for g in (40, 20, 10, 5, 2, 1) if g <= max(1, near // 4))
    contexts, targets = [], []
    for place in _places(reader, CHUNKS, LENGTHS[-1], TARGETS):
        for first in range(place, place + TARGETS, group):
            far = [reader.span(word, word + 1) for word in range(first - whole, first - near)]
            if draw is not None:
                draw.shuffle(far)
            contexts.append(np.concatenate([*far, reader.span(first - near, first)]))
            targets.append(reader.span(first, first + group))
    return float(np.concatenate(reader.bits_after(contexts, targets)).sum() / (CHUNKS * TARGETS))


def after_a_switch(reader: Reader) -> dict[str, np.ndarray]:
    """Bits of each of the AFTER words from a line's start on, after WHOLE words of the same text, of elsewhere, and after none.

    The mean over SPLICES places; the words of elsewhere end with a line too.
    """
    starts = _line_starts(reader)
    usable = starts[(starts >= WHOLE) & (starts <= len(reader.text.words) - AFTER)]
    if len(usable) < 2:
        return {}
    places = usable[np.linspace(0, len(usable) - 1, SPLICES).astype(int)]
    elsewhere = usable[(np.searchsorted(usable, places) + len(usable) // 2) % len(usable)]
    own, other = ([reader.span(place - WHOLE, place) for place in where] for where in (places, elsewhere))
    return _after(reader, places, {"the text itself": own, "another place": other, "nothing": []})


def at_borders(reader: Reader) -> dict[str, np.ndarray]:
    """The same at borders of documents that the text itself has: after the WHOLE words before the border, and after none.

    {} for a text with fewer than LEAST_BORDERS, or one that is read backward.
    """
    starts = reader.text.document_starts
    usable = starts[(starts >= WHOLE) & (starts <= len(reader.text.words) - AFTER)]
    if len(usable) < LEAST_BORDERS or reader.subject.model.backward:
        return {}
    places = usable[np.linspace(0, len(usable) - 1, min(SPLICES, len(usable))).astype(int)]
    before = [reader.span(place - WHOLE, place) for place in places]
    return _after(reader, places, {"the document before": before, "nothing": []})


def _after(reader: Reader, places: np.ndarray, kinds: dict[str, list[np.ndarray]]) -> dict[str, np.ndarray]:
    """The mean over the places of the bits of each of the AFTER words from there on, after each kind of context."""
    targets = [reader.span(place, place + AFTER) for place in places]
    lengths = [np.diff(reader.starts[place : place + AFTER + 1]) for place in places]
    out = {}
    for kind, contexts in kinds.items():
        bits = reader.bits_after(contexts or [np.zeros(0, np.int64)] * len(places), targets)
        words = [np.add.reduceat(b, np.cumsum(n) - n) for b, n in zip(bits, lengths, strict=True)]
        out[kind] = np.mean(words, 0)
    return out


def _line_starts(reader: Reader) -> np.ndarray:
    """The words, counted in reading order, that follow a line's end."""
    return np.flatnonzero(reader.text.line_ends[reader.words_N[reader.starts[:-1]]]) + 1


def afresh_at_lines(reader: Reader, words: int = 20_000) -> tuple[np.ndarray, np.ndarray]:
    """(bits of the first words of the text with a fresh state at each line, which words those are)."""
    starts = np.concatenate(([0], _line_starts(reader)))
    ends = starts[1:][starts[1:] <= max(words, starts[1:2].max(initial=0))]
    spans = [reader.span(a, b) for a, b in zip(np.concatenate(([0], ends[:-1])), ends, strict=True)]
    bits = np.concatenate(reader.bits_after([np.zeros(0, np.int64)] * len(spans), spans))
    which_n = reader.words_N[: len(bits)]
    return np.bincount(which_n, bits, len(reader.text.words))[np.unique(which_n)], np.unique(which_n)


def copying(reader: Reader, length: int = 25, count: int = 48) -> tuple[float, float]:
    """Bits per word of passages of the text when read for the first and, at once, for the second time."""
    places = _places(reader, count, 0, length)
    passages = [reader.span(place, place + length) for place in places]
    first = reader.bits_after([p[:0] for p in passages], passages)
    second = reader.bits_after(passages, passages)
    return tuple(float(np.concatenate(bits).sum() / (count * length)) for bits in (first, second))  # type: ignore[return-value]


NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
SUMS = (("{} + {} =", tuple(map(str, range(1, 11)))), ("{} plus {} is", NUMBERS), ("{} and {} is", NUMBERS))


def arithmetic(subject: Subject) -> dict[str, float | str]:
    """The 45 sums a + b of 2 to 10: how often the right answer is the most probable of these nine, and its mean rank.

    Written in the first way whose words are all known; {} when there is none or the model reads backward.
    """
    tokenizer, model = subject.tokenizer, subject.model
    for form, names in () if model.backward else SUMS:
        known = tokenizer.encode_prefix(" ".join([form.replace("{}", " "), *names]))
        if tokenizer.unk_id is not None and (known == tokenizer.unk_id).any():
            continue
        sums = [(a, b) for a in range(1, 10) for b in range(1, 11 - a)]
        texts = [f"{form.format(names[a - 1], names[b - 1])} {answer}" for a, b in sums for answer in names[1:]]
        losses = score_sequences(model, [tokenizer.encode_prefix(t).tolist() for t in texts], tokenizer.boundary_id)
        nats = np.array([float(nll.double().sum()) for nll in losses]).reshape(len(sums), 9)
        own = nats[np.arange(len(sums)), [a + b - 2 for a, b in sums]][:, None]
        rank = 1 + (nats < own).sum(1) + ((nats == own).sum(1) - 1) / 2
        return {"written": form.format("a", "b"), "right": float((rank == 1).mean()), "mean_rank": float(rank.mean())}
    return {}


def own_text(reader: Reader, prompts: int = 12, length: int = 100) -> dict[str, dict[str, float]]:
    """How much the text repeats itself that the model writes after passages of the text, drawn and most probable, and how
    much the text's own continuation does: rep-4, rep/50, distinct-1 and distinct-2 over tokens."""
    subject, boundary = reader.subject, reader.subject.tokenizer.boundary_id
    before = 50
    places = np.linspace(before, len(reader.ids_N) - length, prompts).astype(int)
    starts = [[boundary, *reader.ids_N[place - before : place].tolist()] for place in places]
    texts = {"the text itself": [reader.ids_N[place : place + length].tolist() for place in places]}
    fresh = boundary if subject.batching == "sentence" else None
    for kind, sampling in (("drawn", Sampling()), ("most probable", Sampling(temperature=0.0))):
        draw = torch.Generator().manual_seed(1)
        texts[kind] = [list(sample_ids(subject.model, s, length, sampling, draw, (), fresh)) for s in starts]
    return {
        kind: {
            "rep-4": repetition(ids, 4),
            "rep/50": repeats_within(ids, 50),
            "distinct-1": distinct(ids, 1),
            "distinct-2": distinct(ids, 2),
        }
        for kind, ids in texts.items()
    }


def elsewhere(subject: Subject, text: str) -> dict[str, float | str]:
    """The model on the first words of another text, written as its own training text was: perplexity a word, bits a byte, unknown
    words; {} when hardly anything of it is left."""
    rule = rules.rule_name(subject.tokenizer)
    known = rules.vocabulary(subject.tokenizer)
    written = rules.RULES[rule](text, known)
    counts = {
        "words": len(written.split()) + written.count("\n"),
        "characters": len(written),
        "bytes": len(written.encode()),
    }
    ids = subject.tokenizer.encode(written)
    if len(ids) < 16:
        return {}
    unknown = float((ids == subject.tokenizer.unk_id).mean()) if subject.tokenizer.unk_id is not None else 0.0
    ids = reading_order(ids, subject.model.backward, subject.tokenizer.boundary_id)
    out = evaluate_ids(subject.model, ids, subject.tokenizer.boundary_id, counts, 8, "exact", False, subject.batching)
    return {"ppl_word": out["ppl_word"], "bpb": out["bpb"], "oov_rate": unknown, "rule": rule}


def first_lines(text: str, words: int) -> str:
    """The lines from the text's start that hold about so many words."""
    count, end = 0, 0
    for line in text.splitlines(keepends=True):
        count += len(line.split()) + 1
        end += len(line)
        if count >= words:
            break
    return text[:end]
