"""The language model that a person talks to: text in, text, scores and measurements out."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from recurlm.errors import CheckpointError, DataError, RequestError, nearest
from recurlm.evaluation.perplexity import evaluate_ids
from recurlm.inference import embed
from recurlm.inference.beam import beam_search
from recurlm.inference.engine import score_sequences
from recurlm.inference.generate import MOST_TOKENS, Sampling, check_range, sample_ids
from recurlm.inference.picture import draw
from recurlm.model import directory, precision
from recurlm.model.neural import NeuralModel
from recurlm.protocol import StatefulModel
from recurlm.text.batches import reading_order
from recurlm.text.tokenizers import Tokenizer, load_tokenizer
from recurlm.text.tokenizers.base import to_bytes

UNITS = {"bits": 1 / math.log(2), "nats": 1.0, "log10": -1 / math.log(10)}


@dataclass(frozen=True)
class Score:
    """One text's tokens and their surprisal: -log2 p in bits, or the `unit` asked for (log10: log-probabilities)."""

    ids: tuple[int, ...]
    tokens: tuple[str, ...]
    surprisals: tuple[float, ...]
    unit: str

    @property
    def total(self) -> float:
        """The whole text's surprisal."""
        return math.fsum(self.surprisals)


@dataclass(frozen=True)
class Hypothesis:
    """A continuation that beam search found: the text with its prompt, the ids after the prompt, log P of these ids in
    nats, the score it is ranked by, and whether a stop string ended it."""

    text: str
    ids: tuple[int, ...]
    log_prob: float
    score: float
    ended: bool


@dataclass(frozen=True)
class Neighbour:
    """A token with its id and its score: the cosine, or what the analogy was ranked by."""

    token: str
    id: int
    score: float


@dataclass(frozen=True)
class EmbeddingMap:
    """Tokens in the order of their ids, and a point (x, y) in the plane for each."""

    tokens: tuple[str, ...]
    points: tuple[tuple[float, float], ...]

    def svg(self, title: str = "") -> bytes:
        """The map as an SVG picture; its text is text, a space in a token is shown as U+2423."""
        return draw([token.replace(" ", "\u2423") for token in self.tokens], self.points, title)


MAPS = {"tsne": embed.neighbour_map, "pca": embed.principal_plane}


class LanguageModel:
    """A trained model with its tokenizer: scores, generates and measures text."""

    def __init__(self, model: StatefulModel, tokenizer: Tokenizer, facts: dict[str, Any]):
        self.model, self.tokenizer, self.facts = model, tokenizer, facts

    @property
    def backward(self) -> bool:
        """Whether the model reads text from its end to its start."""
        return self.model.backward

    @property
    def parameters(self) -> int:
        """The number of trained weights."""
        return self.facts.get("parameters", 0)

    def score_all(self, texts: Sequence[str], *, unit: str = "bits", end: bool = True) -> list[Score]:
        """A Score for each text. Every text starts after a line's end; with `end` the end of its own line counts too.

        Of a backward model each token's surprisal is that given what follows it, and the last one the line's start.
        """
        if unit not in UNITS:
            raise RequestError(f"unit {unit!r} is not known; expected one of {', '.join(UNITS)}.")
        if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
            raise RequestError("score takes one text, score_all a list of texts.")
        sequences = [self._line_ids(text) for text in texts]
        boundary, out = self.tokenizer.boundary_id, []
        read = [[*(ids[::-1] if self.backward else ids), *([boundary] if end else [])] for ids in sequences]
        for ids, nll in zip(read, score_sequences(self.model, read, boundary), strict=True):
            values = (nll.double() * UNITS[unit]).tolist()
            if self.backward:  # back into the text's order, the line's end (here: its start) still last
                body = len(ids) - end
                ids, values = [*ids[:body][::-1], *ids[body:]], [*values[:body][::-1], *values[body:]]
            out.append(Score(tuple(ids), tuple(map(self.tokenizer.token, ids)), tuple(values), unit))
        return out

    def score(self, text: str, *, unit: str = "bits", end: bool = True) -> Score:
        """The Score of one text; see `score_all`."""
        return self.score_all([text], unit=unit, end=end)[0]

    def _line_ids(self, text: str) -> list[int]:
        """The ids of a line without its end."""
        ids = self.tokenizer.encode(text).tolist()
        if ids and ids[-1] == self.tokenizer.boundary_id:
            ids.pop()
        return ids

    def perplexity(self, text: str, *, batch_size: int = 1) -> float:
        """exp of the mean loss per token over the whole text, every token counted."""
        return float(self.evaluate_text(text, batch_size=batch_size, with_ranks=False)["ppl"])

    def evaluate_text(self, text: str, *, batch_size: int = 1, with_ranks: bool = True) -> dict[str, Any]:
        """All metrics on a text, read as the model was trained; see `evaluate`."""
        size = len(to_bytes(text))
        ids = self.tokenizer.encode(text)
        if len(ids) == 0:
            raise DataError("The text is empty: there is nothing to measure.")
        ids = reading_order(ids, self.backward, self.tokenizer.boundary_id)
        lines = text.count("\n") + (not text.endswith("\n"))
        counts = {"words": len(text.split()) + lines, "characters": len(text), "bytes": size}
        rule = batch_size, "exact", with_ranks, self.batching
        return evaluate_ids(self.model, ids, self.tokenizer.boundary_id, counts, *rule)

    def stream(
        self,
        prompt: str = "",
        *,
        tokens: int = 100,
        repetition_penalty: float = 1.0,
        repetition_window: int = 0,
        temperature: float = 1.0,
        top_k: int = 0,
        min_p: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
    ) -> Iterator[str]:
        """Pieces of generated text as they become certain; together they equal `generate`, prompt left out.

        Of a backward model it is one piece: the text before the prompt, begun after the last `stop` string in it.
        """
        check_range("tokens", tokens, 0, MOST_TOKENS)
        if seed is not None:
            check_range("seed", seed, 0, 2**63 - 1)
        sampling = Sampling(
            repetition_penalty=repetition_penalty,
            repetition_window=repetition_window,
            temperature=temperature,
            top_k=top_k,
            min_p=min_p,
            top_p=top_p,
        )
        generator = torch.Generator()
        generator.seed() if seed is None else generator.manual_seed(seed)
        prompt_ids = self.tokenizer.encode_prefix(prompt).tolist()
        draw = self._before if self.backward else self._stream
        return draw(prompt, prompt_ids, tokens, sampling, generator, _strings(stop))

    def _before(
        self,
        prompt: str,
        prompt_ids: list[int],
        tokens: int,
        sampling: Sampling,
        generator: torch.Generator,
        stops: list[str],
    ) -> Iterator[str]:
        """The text before the prompt, of a backward model."""
        reach = max((len(to_bytes(s)) for s in stops), default=0) + 1  # ids in which the newest may complete a stop
        drawn: list[int] = []
        start = [self.tokenizer.boundary_id, *prompt_ids[::-1]]
        for token in sample_ids(self.model, start, tokens, sampling, generator, self._forbidden, self._fresh_after):
            drawn.append(token)
            newest = self.tokenizer.decode(drawn[: -reach - 1 : -1])
            if any(s in newest for s in stops):
                break
        known = self.tokenizer.decode(prompt_ids[:8])
        text = self.tokenizer.decode([*drawn[::-1], *prompt_ids[:8]])
        text = text.removesuffix(known)
        if prompt[:1].isspace() and not known[:1].isspace():
            text = text.removesuffix(" ")  # the prompt's own space, which a word tokenizer does not keep
        yield text[max((text.rfind(s) + len(s) for s in stops if s in text), default=0) :]

    def _stream(
        self,
        prompt: str,
        prompt_ids: list[int],
        tokens: int,
        sampling: Sampling,
        generator: torch.Generator,
        stops: list[str],
    ) -> Iterator[str]:
        start = [self.tokenizer.boundary_id, *prompt_ids]
        held = max((len(s) for s in stops), default=1) - 1  # characters that may yet turn out to begin a stop
        drawn, text, shown = list(prompt_ids), "", 0
        anchor, read = max(0, len(drawn) - 8), len(drawn)
        for token in sample_ids(self.model, start, tokens, sampling, generator, self._forbidden, self._fresh_after):
            drawn.append(token)
            known, longer = self.tokenizer.decode(drawn[anchor:read]), self.tokenizer.decode(drawn[anchor:])
            if longer.endswith("\ufffd") and len(drawn) - read < 4:
                continue  # perhaps the middle of a character
            new = longer[len(known) :]
            if not text and prompt[-1:].isspace() and not known[-1:].isspace():
                new = new.removeprefix(" ")  # the prompt's own space, which a word tokenizer does not keep
            text, anchor, read = text + new, read, len(drawn)
            found = [at for s in stops if (at := text.find(s, max(0, shown - held))) >= 0]
            if found:
                yield text[shown : min(found)]
                return
            if len(text) - held > shown:
                yield text[shown : len(text) - held]
                shown = len(text) - held
        tail = self.tokenizer.decode(drawn[anchor:])[len(self.tokenizer.decode(drawn[anchor:read])) :]
        yield text[shown:] + tail

    def generate(
        self,
        prompt: str = "",
        *,
        tokens: int = 100,
        repetition_penalty: float = 1.0,
        repetition_window: int = 0,
        temperature: float = 1.0,
        top_k: int = 0,
        min_p: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
    ) -> str:
        """Prompt and continuation of up to `tokens` tokens, ended before the first `stop` string.

        What the numbers do, and in which order: `recurlm.inference.generate.Sampling`. temperature 0 is greedy.
        `<unk>` is never drawn. A `seed` makes the text repeatable.
        """
        pieces = self.stream(
            prompt,
            tokens=tokens,
            repetition_penalty=repetition_penalty,
            repetition_window=repetition_window,
            temperature=temperature,
            top_k=top_k,
            min_p=min_p,
            top_p=top_p,
            seed=seed,
            stop=stop,
        )
        return self.joined(prompt, "".join(pieces))

    def joined(self, prompt: str, generated: str) -> str:
        """The whole text of a prompt and what was generated: after it, or before it by a backward model."""
        return generated + prompt if self.backward else prompt + generated

    @property
    def batching(self) -> str:
        """How its training text was read: stream, sentence or document."""
        return self.facts.get("batching", "stream")

    @property
    def _fresh_after(self) -> int | None:
        return self.tokenizer.boundary_id if self.batching == "sentence" else None

    @property
    def _forbidden(self) -> list[int]:
        return [self.tokenizer.unk_id] if self.tokenizer.unk_id is not None else []

    def beam(
        self,
        prompt: str = "",
        *,
        tokens: int = 100,
        beams: int = 5,
        num_return: int = 1,
        length_penalty: float = 0.0,
        stop: str | Sequence[str] = (),
    ) -> list[Hypothesis]:
        """The `num_return` most probable continuations of up to `tokens` tokens that `beams` beams find, best first.

        A hypothesis ends before the first `stop` string (stop="\\n": at its line's end); the ids up to the one that
        completed it count in log P. Ranked by log P / ((5 + length) / 6)^length_penalty. `<unk>` is in none.
        """
        if self.backward:
            raise RequestError("Beam search goes forward, but this model reads backward; sample from it instead.")
        stops = _strings(stop)
        prompt_ids = self.tokenizer.encode_prefix(prompt).tolist()
        near = prompt_ids[-8:]
        known = self.tokenizer.decode(near)
        # A stop that the last id completes lies in so many ids; one more for the space that joins it to words before.
        reach = max((len(to_bytes(s)) for s in stops), default=0) + 1

        def text_after(ids: Sequence[int]) -> str:
            new = self.tokenizer.decode([*near, *ids])[len(known) :]
            return new.removeprefix(" ") if prompt[-1:].isspace() and not known[-1:].isspace() else new

        def ends(ids: tuple[int, ...]) -> bool:
            text = text_after(ids) if len(ids) <= reach else self.tokenizer.decode(ids[-reach:])
            return any(s in text for s in stops)

        found = beam_search(
            self.model,
            [self.tokenizer.boundary_id, *prompt_ids],
            tokens,
            beams=beams,
            best=num_return,
            length_penalty=length_penalty,
            forbidden=self._forbidden,
            ends=ends,
        )
        out = []
        for path in found:
            text = text_after(path.ids)
            cut = min((at for s in stops if (at := text.find(s)) >= 0), default=len(text))
            out.append(Hypothesis(prompt + text[:cut], path.ids, path.log_prob, path.score, path.ended))
        return out

    def neighbours(self, word: str, *, k: int = 10, among: int = 0) -> list[Neighbour]:
        """The k tokens whose input embeddings have the largest cosine with that of `word`, best first.

        `among` keeps to that many of the most frequent tokens (0: all), for rare ones have learned little. `word` is one
        token: a word as bpe and unigram have most words, with a space before it, or else as written. What such a token
        has beside it are others that begin with a space, not pieces from inside words; bytes of unknown characters are
        left out. RequestError when it is several tokens or not in the vocabulary.
        """
        id = self._one_id(word)
        return self._ranked(embed.neighbours(self._unit_rows, id, *self._limits(k, among, id)))

    def analogy(self, a: str, b: str, c: str, *, k: int = 10, among: int = 0, method: str = "add") -> list[Neighbour]:
        """The k best answers to "a is to b as c is to ...", the three words left out: man king woman.

        method "add" is 3CosAdd (Mikolov et al. 2013), "mul" 3CosMul (Levy & Goldberg 2014). Words, among: see `neighbours`.
        """
        if method not in ("add", "mul"):
            raise RequestError(f"method {method!r} is not known; expected add or mul.")
        ids = self._one_id(a), self._one_id(b), self._one_id(c)
        return self._ranked(embed.analogy(self._unit_rows, *ids, *self._limits(k, among, *ids), method == "mul"))

    def embedding_map(self, top: int = 300, *, method: str = "tsne") -> EmbeddingMap:
        """The `top` most frequent tokens (2 to 2,000) in a plane, by the directions of their input embeddings.

        method "tsne" keeps near tokens near (half a minute for 2,000), "pca" is the plane of the principal components.
        """
        check_range("top", top, 2, 2000)
        if method not in MAPS:
            raise RequestError(f"method {method!r} is not known; expected {' or '.join(MAPS)}.")
        ids = self._limits(1, 0)[1].nonzero().flatten()[:top]
        xy_N2 = MAPS[method](self._unit_rows[ids])
        return EmbeddingMap(tuple(map(self.tokenizer.token, ids.tolist())), tuple((x, y) for x, y in xy_N2.tolist()))

    @cached_property
    def _unit_rows(self) -> torch.Tensor:
        if not isinstance(self.model, NeuralModel):
            raise RequestError("This model has no embeddings; take a neural one.")
        return embed.unit_rows(self.model.vectors())

    def _one_id(self, word: str) -> int:
        """The id of a word that is one token; RequestError otherwise."""
        pieces = self.tokenizer.pieces
        spellings = to_bytes(word), to_bytes(f" {word}")
        for spelling in spellings[::-1] if word[:1].isalnum() else spellings:
            if word and spelling in pieces:
                return pieces.index(spelling)
        ids = self.tokenizer.encode_prefix(word).tolist()
        if len(ids) == 1 and ids[0] != self.tokenizer.unk_id:
            return ids[0]
        if len(ids) > 1:
            parts = ", ".join(repr(self.tokenizer.token(i)) for i in ids[:8]) + ", ..." * (len(ids) > 8)
            raise RequestError(f"{word!r} is {len(ids)} tokens of this model ({parts}); name one of them.")
        if not ids:
            raise RequestError(f"{word!r} is no token of this model; name a word that it read in training.")
        known = (piece.decode("utf-8", "replace") for piece in pieces)
        raise RequestError(f"{word!r} is not in the vocabulary.{nearest(word, known)}")

    @cached_property
    def _kinds(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(which tokens are bytes of unknown characters, which begin with a space as words do), of all tokens."""
        ids, pieces = range(self.tokenizer.vocab_size), self.tokenizer.pieces
        begins = [len(piece) > 1 and piece[:1] == b" " for piece in pieces]
        return torch.tensor([self.tokenizer.is_byte(id) for id in ids]), torch.tensor(begins)

    def _limits(self, k: int, among: int, *asked: int) -> tuple[int, torch.Tensor]:
        """(k, which tokens may be an answer): no bytes, and no pieces from inside words where the words asked for are none."""
        check_range("k", k, 1, 2**31 - 1)
        check_range("among", among, 0, 2**31 - 1, " (0: all tokens)")
        bytes_V, begins_V = self._kinds
        words = bool(asked) and bool(begins_V[list(asked)].all())
        may_V = ~bytes_V & begins_V if words else ~bytes_V
        may_V[among or len(may_V) :] = False
        return k, may_V

    def _ranked(self, best: tuple[list[float], list[int]]) -> list[Neighbour]:
        return [Neighbour(self.tokenizer.token(i), i, score) for score, i in zip(*best, strict=True)]


def _strings(stop: str | Sequence[str]) -> list[str]:
    stops = [stop] if isinstance(stop, str) else list(stop)
    if "" in stops:
        raise RequestError("stop holds an empty string, at which every text would end; leave it out.")
    return stops


def load(path: str | Path, *, device: str = "auto", dtype: str = "auto") -> LanguageModel:
    """The language model of a run directory; CheckpointError naming the file when its content is wrong."""
    where = precision.resolve_device(device)
    how = precision.resolve_dtype(dtype, where)
    if directory.kind(Path(path)) == "ngram":
        from recurlm.ngram import directory as ngrams  # compiles; only who has an n-gram model waits for that

        model, manifest = ngrams.read(Path(path))
    else:
        model, manifest = directory.read(Path(path), where, how)
    tokenizer = load_tokenizer(Path(path) / directory.TOKENIZER)
    if tokenizer.vocab_size != model.vocab_size:
        raise CheckpointError(f"{path}: the tokenizer has {tokenizer.vocab_size} ids, the model {model.vocab_size}.")
    return LanguageModel(model, tokenizer, manifest.get("facts", {}))
