"""A text as words, and what a model says of each of them: the ground of every figure of the report.

Words are the stretches without white space and the line ends, whatever a model's tokens are, so that models with
different tokenizers are compared on the same things. W words, N tokens, V vocabulary, S tokens with a full prediction.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from functools import cached_property
from typing import final

import numpy as np
import torch
from torch import Tensor

from recurlm.evaluation.metrics import SUGGESTIONS, TOP, Keyboard, ranks
from recurlm.inference.engine import score_sequences
from recurlm.protocol import StatefulModel
from recurlm.text.batches import BATCHING, Sequences, Streams
from recurlm.text.tokenizers import Tokenizer

BITS = 1 / np.log(2)
PREDICTIONS = 300_000_000  # probabilities looked at in full: the sample's tokens times the vocabulary
_CHUNK = 1 << 23  # log-probabilities at once


@final
@dataclass(frozen=True)
class Subject:
    """A model to report on."""

    name: str
    model: StatefulModel
    tokenizer: Tokenizer
    batching: str = "stream"
    parameters: int = 0


@final
class Text:
    """A text that ends with a line's end, and its words. `size` are the characters and bytes that it stands for, where it is
    not written as it was (a word tokenizer keeps no white space)."""

    def __init__(self, text: str, size: tuple[int, int] | None = None):
        self.text = text if text.endswith("\n") or not text else text + "\n"
        self.characters, self.bytes = size or (len(self.text), len(self.text.encode()))

    @cached_property
    def words(self) -> list[str]:
        """The words; a line's end is "\\n"."""
        return re.findall(r"\S+|\n", self.text)

    @cached_property
    def line_ends(self) -> np.ndarray:
        """Which words are line ends."""
        return np.array([word == "\n" for word in self.words], bool)

    @cached_property
    def line_starts(self) -> np.ndarray:
        """The first word of each line."""
        return np.concatenate(([0], np.flatnonzero(self.line_ends)[:-1] + 1))

    @cached_property
    def document_starts(self) -> np.ndarray:
        """The first word of each document but the first: at titles as WikiText writes them (= Title =), or after empty lines."""
        words, starts = self.words, self.line_starts
        ends = np.array([*starts[1:], len(words)]) - 1  # the line ends themselves
        titles = [
            a for a, b in zip(starts, ends, strict=True)
            if b - a > 2 and words[a] == words[b - 1] == "=" and words[a + 1] != "="
        ]  # fmt: skip
        empty = starts == ends
        after = starts[1:][empty[:-1] & ~empty[1:]]
        return np.array([place for place in (titles or after) if place], np.int64)

    @cached_property
    def word_ends(self) -> np.ndarray:
        """The byte after each word."""
        ends = np.array([found.end() for found in re.finditer(r"\S+|\n", self.text)], np.int64)
        return np.concatenate(([0], self.character_ends))[ends]

    @cached_property
    def character_ends(self) -> np.ndarray:
        """The byte after each character."""
        points = np.frombuffer(self.text.encode("utf-32-le"), np.uint32)
        return np.cumsum(1 + (points > 0x7F).astype(np.int64) + (points > 0x7FF) + (points > 0xFFFF))

    def words_of_tokens(self, tokenizer: Tokenizer, ids_N: np.ndarray) -> np.ndarray:
        """The word to which each token belongs: that of its last byte, white space belonging to the word after it."""
        if tokenizer.kind == "word":
            return np.arange(len(ids_N))
        if tokenizer.exact:
            last_N = np.cumsum(np.array([len(piece) for piece in tokenizer.pieces])[ids_N]) - 1
        else:  # characters, one id each
            last_N = self.character_ends - 1
        return np.minimum(np.searchsorted(self.word_ends, last_N, side="right"), len(self.words) - 1)


@final
@dataclass(frozen=True)
class Reading:
    """What a model says of a text. Per word: bits; and where `sampled`, entropy in bits and whether it was foreseen."""

    bits_W: np.ndarray
    entropy_W: np.ndarray
    foreseen_W: np.ndarray
    """Whether each of the word's tokens was the single most probable one."""
    sampled_W: np.ndarray
    unknown_W: np.ndarray
    rank_S: np.ndarray
    confidence_S: np.ndarray
    correct_S: np.ndarray
    keys: tuple[float, ...]
    """Share of keystrokes saved with each number of SUGGESTIONS; () for other tokenizers than word."""
    tokens: int
    seconds: float

    def summary(self, text: Text) -> dict[str, float]:
        """Figures of the whole text, as `recurlm eval` names them, and of the sample."""
        bits, some = float(self.bits_W.sum()), max(1, len(self.rank_S))
        out = {
            "ppl": 2 ** min(bits / self.tokens, 1000),
            "ppl_word": 2 ** min(bits / len(text.words), 1000),
            "bpc": bits / text.characters,
            "bpb": bits / text.bytes,
            "oov_rate": float(self.unknown_W.mean()),
        }
        out |= {f"top{k}": float((self.rank_S <= k).sum()) / some for k in TOP}
        out["mrr"] = float((1 / self.rank_S).sum()) / some
        out |= {f"exact_{k}_words": exact_match(self.foreseen_W, self.sampled_W, k) for k in (1, 2, 3)}
        return out | {f"keys_saved_{k}": share for k, share in zip(SUGGESTIONS, self.keys, strict=False)}


def exact_match(foreseen_W: np.ndarray, sampled_W: np.ndarray, k: int) -> float:
    """The share of places at which greedy prediction gives the next k words. It does so exactly if each of them is the
    most probable one after the true text before it."""
    runs = len(foreseen_W) - k + 1
    if runs < 1:
        return 0.0
    asked, right = (np.lib.stride_tricks.sliding_window_view(a, k).all(-1) for a in (sampled_W, foreseen_W))
    return float((right & asked).sum() / max(1, asked.sum()))


@final
class Reader:
    """A text in a model's ids and reading order."""

    def __init__(self, subject: Subject, text: Text):
        self.subject, self.text = subject, text
        ids_N = subject.tokenizer.encode(text.text)
        boundary, order = subject.tokenizer.boundary_id, np.arange(len(ids_N))
        if subject.model.backward:  # lines end as they do forward: see text.batches.reading_order
            body = len(ids_N) - bool(ids_N[-1] == boundary)
            order[:body] = order[:body][::-1]
        self.ids_N = ids_N[order]
        self.words_N = text.words_of_tokens(subject.tokenizer, ids_N)[order]
        self.starts = np.concatenate(([0], np.flatnonzero(np.diff(self.words_N)) + 1, [len(ids_N)]))
        self.unknown_N = self.ids_N == (-1 if subject.tokenizer.unk_id is None else subject.tokenizer.unk_id)

    def span(self, first: int, end: int) -> np.ndarray:
        """The ids of the words `first` to `end`, counted in reading order."""
        return self.ids_N[self.starts[max(first, 0)] : self.starts[end]]

    def per_word(self, values_N: np.ndarray) -> np.ndarray:
        """The sum over each word's tokens, in the text's order."""
        return np.bincount(self.words_N, values_N, len(self.text.words))

    def bits_after(self, contexts: list[np.ndarray], targets: list[np.ndarray]) -> list[np.ndarray]:
        """Bits of each target's tokens after its context, which begins afresh."""
        whole = [np.concatenate(both).tolist() for both in zip(contexts, targets, strict=True)]
        losses = score_sequences(self.subject.model, whole, self.subject.tokenizer.boundary_id)
        return [nll[len(c) :].double().numpy() * BITS for nll, c in zip(losses, contexts, strict=True)]

    @torch.inference_mode()
    def read(self, rows: int) -> Reading:
        """The Reading of the whole text, as the model was trained to read it, in so many streams; the full predictions
        of windows spread evenly over it."""
        start, subject, count = time.perf_counter(), self.subject, len(self.ids_N)
        model, boundary = subject.model, subject.tokenizer.boundary_id
        rows = max(1, min(rows, count // 64))
        steps = max(1, min(256, _CHUNK // (rows * model.vocab_size)))
        ends = BATCHING[subject.batching]
        places = np.arange(count)  # batches of places instead of ids tell where in the text each row is
        if ends is not None:
            batches = Sequences(places, ends(self.ids_N, boundary), rows, -1, steps)
            windows = batches.length
        else:
            batches = Streams(places, rows, -1)
            windows = -(-batches.length // steps)
        sampled = max(1, int(PREDICTIONS / model.vocab_size / count * windows))
        chosen = set(np.linspace(0, windows - 1, min(windows, sampled)).astype(int).tolist())
        nats_N, found, state = np.zeros(count), _Predictions(subject, count), None
        for number, window in enumerate(batches.windows(steps)):
            inputs_TB = torch.from_numpy(np.where(window.inputs_TB < 0, boundary, self.ids_N[window.inputs_TB]))
            targets_TB = torch.from_numpy(np.where(window.targets_TB < 0, boundary, self.ids_N[window.targets_TB]))
            inputs_TB, targets_TB = inputs_TB.to(model.device), targets_TB.to(model.device)
            state = model.initial_state(inputs_TB.shape[1]) if window.fresh else state
            counted_TB = np.ones(window.inputs_TB.shape, bool) if window.counted_TB is None else window.counted_TB
            at_S = window.targets_TB[counted_TB]
            if number in chosen:
                log_probs_TBV, state = model.advance(inputs_TB, state)
                kept_TB = torch.from_numpy(counted_TB).to(model.device)
                nll_S = found.add(log_probs_TBV[kept_TB], targets_TB[kept_TB], at_S)
            else:
                nll_TB, state = model.score(inputs_TB, targets_TB, state)
                nll_S = nll_TB.double().cpu().numpy()[counted_TB]
            nats_N[at_S] = nll_S
        return found.reading(self, nats_N * BITS, time.perf_counter() - start)


@final
class _Predictions:
    """Full predictions, gathered window by window."""

    def __init__(self, subject: Subject, count: int):
        self.entropy_N, self.rank_N = np.zeros(count), np.zeros(count)
        self.confidence_N, self.correct_N = np.zeros(count), np.zeros(count, bool)
        self.keyboard, self.pressed, self.characters = None, np.zeros(len(SUGGESTIONS)), 0
        if subject.tokenizer.kind == "word":
            words = [piece.decode("utf-8", "replace") for piece in subject.tokenizer.pieces]
            self.keyboard = Keyboard(words, (subject.tokenizer.unk_id, subject.tokenizer.boundary_id))

    def add(self, log_probs_SV: Tensor, targets_S: Tensor, at_S: np.ndarray) -> np.ndarray:
        """nll_S; keeps what the predictions say of their targets, at these places."""
        best = log_probs_SV.max(-1)
        entropy_S = -(log_probs_SV.exp() * log_probs_SV.clamp_min(-1e4)).sum(-1)  # a probability of 0 adds nothing
        self.entropy_N[at_S] = entropy_S.double().cpu().numpy() * BITS
        self.rank_N[at_S] = ranks(log_probs_SV, targets_S).double().cpu().numpy()
        self.confidence_N[at_S] = best.values.double().exp().cpu().numpy()
        self.correct_N[at_S] = (best.indices == targets_S).cpu().numpy()
        if self.keyboard is not None:
            shown_SV = log_probs_SV.float().cpu().numpy()[:, self.keyboard.order]
            for shown_V, target in zip(shown_SV, targets_S.tolist(), strict=True):
                if characters := self.keyboard.characters(target):
                    self.pressed += self.keyboard.keys(shown_V, target)
                    self.characters += characters
        return -log_probs_SV.gather(-1, targets_S[:, None]).squeeze(-1).double().cpu().numpy()

    def reading(self, reader: Reader, bits_N: np.ndarray, seconds: float) -> Reading:
        """The Reading, per word in the text's order."""
        seen_N = self.rank_N > 0
        keys = tuple((1 - self.pressed / self.characters).tolist()) if self.characters else ()
        return Reading(
            bits_W=reader.per_word(bits_N),
            entropy_W=reader.per_word(self.entropy_N),
            foreseen_W=reader.per_word(self.rank_N != 1) == 0,
            sampled_W=reader.per_word(~seen_N) == 0,
            unknown_W=reader.per_word(reader.unknown_N) > 0,
            rank_S=self.rank_N[seen_N],
            confidence_S=self.confidence_N[seen_N],
            correct_S=self.correct_N[seen_N],
            keys=keys,
            tokens=len(bits_N),
            seconds=seconds,
        )
