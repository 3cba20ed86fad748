"""Every verb as a function: train, load, evaluate; and the language model that a person talks to, text in and out."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from recurlm import files
from recurlm.config import Config, TokenizerConfig
from recurlm.errors import CheckpointError, ConfigError, DataError, RequestError, UserError
from recurlm.evaluation.perplexity import RULES, evaluate_ids
from recurlm.inference.engine import score_sequences
from recurlm.inference.generate import Sampling, sample_ids
from recurlm.model import directory, precision
from recurlm.protocol import StatefulModel
from recurlm.text.corpora import open_corpus
from recurlm.text.store import Store, is_store, open_store, prepare, write_store
from recurlm.text.tokenizers import Tokenizer, load_tokenizer
from recurlm.training import checkpoint
from recurlm.training.trainer import Result, Trainer

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


class LanguageModel:
    """A trained model with its tokenizer: scores, generates and measures text."""

    def __init__(self, model: StatefulModel, tokenizer: Tokenizer, facts: dict[str, Any]):
        self.model, self.tokenizer, self.facts = model, tokenizer, facts

    @property
    def parameters(self) -> int:
        """The number of trained weights."""
        return self.facts.get("parameters", 0)

    def score_all(self, texts: Sequence[str], *, unit: str = "bits", end: bool = True) -> list[Score]:
        """A Score for each text. Every text starts after a line's end; with `end` the end of its own line counts too."""
        if unit not in UNITS:
            raise RequestError(f"unit {unit!r} is not known; expected one of {', '.join(UNITS)}.")
        sequences = [self._line_ids(text, end) for text in texts]
        out = []
        for ids, nll in zip(sequences, score_sequences(self.model, sequences, self.tokenizer.boundary_id), strict=True):
            surprisals = tuple((nll.double() * UNITS[unit]).tolist())
            out.append(Score(tuple(ids), tuple(map(self.tokenizer.token, ids)), surprisals, unit))
        return out

    def score(self, text: str, *, unit: str = "bits", end: bool = True) -> Score:
        """The Score of one text; see `score_all`."""
        return self.score_all([text], unit=unit, end=end)[0]

    def _line_ids(self, text: str, end: bool) -> list[int]:
        boundary = self.tokenizer.boundary_id
        ids = self.tokenizer.encode(text).tolist()
        if ids and ids[-1] == boundary:
            ids.pop()
        return [*ids, boundary] if end else ids

    def perplexity(self, text: str, *, batch_size: int = 1) -> float:
        """exp of the mean loss per token over the whole text, every token counted."""
        return float(self.evaluate_text(text, batch_size=batch_size, with_ranks=False)["ppl"])

    def evaluate_text(self, text: str, *, batch_size: int = 1, with_ranks: bool = True) -> dict[str, Any]:
        """All metrics on a text; see `evaluate`."""
        ids = self.tokenizer.encode(text)
        if len(ids) == 0:
            raise DataError("The text is empty: there is nothing to measure.")
        lines = text.count("\n") + (not text.endswith("\n"))
        counts = {"words": len(text.split()) + lines, "characters": len(text), "bytes": len(text.encode())}
        return evaluate_ids(self.model, ids, self.tokenizer.boundary_id, counts, batch_size, "exact", with_ranks)

    def stream(
        self,
        prompt: str = "",
        *,
        tokens: int = 100,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
    ) -> Iterator[str]:
        """Pieces of generated text as they become certain; together they equal `generate`, prompt left out."""
        if not 0 <= tokens <= 10**7:
            raise RequestError(f"tokens = {tokens}: expected 0 to 10,000,000.")
        stops = [s for s in ([stop] if isinstance(stop, str) else stop) if s]
        sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
        generator = torch.Generator()
        generator.seed() if seed is None else generator.manual_seed(seed)
        prompt_ids = self.tokenizer.encode_prefix(prompt).tolist()
        start = [self.tokenizer.boundary_id, *prompt_ids]
        forbidden = [self.tokenizer.unk_id] if self.tokenizer.unk_id is not None else []
        held = max((len(s) for s in stops), default=1) - 1  # characters that may yet turn out to begin a stop
        drawn, text, shown = list(prompt_ids), "", 0
        anchor, read = max(0, len(drawn) - 8), len(drawn)
        for token in sample_ids(self.model, start, tokens, sampling, generator, forbidden):
            drawn.append(token)
            known, longer = self.tokenizer.decode(drawn[anchor:read]), self.tokenizer.decode(drawn[anchor:])
            if longer.endswith("\ufffd") and len(drawn) - read < 4:
                continue  # perhaps the middle of a character
            text, anchor, read = text + longer[len(known) :], read, len(drawn)
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
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
    ) -> str:
        """Prompt and continuation of up to `tokens` tokens, ended before the first `stop` string.

        p^(1/temperature) over the top_k most probable tokens, then the smallest set holding top_p; 0 and 1 cut
        nothing; temperature 0 is greedy. `<unk>` is never drawn. A `seed` makes the text repeatable.
        """
        pieces = self.stream(
            prompt, tokens=tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed, stop=stop
        )
        return prompt + "".join(pieces)


def load(path: str | Path, *, device: str = "auto", dtype: str = "auto") -> LanguageModel:
    """The language model of a run directory; CheckpointError naming the file when its content is wrong."""
    where = precision.resolve_device(device)
    how = precision.resolve_dtype(dtype, where)
    model, manifest = directory.read(Path(path), where, how.dtype)
    tokenizer = load_tokenizer(Path(path) / directory.TOKENIZER)
    if tokenizer.vocab_size != model.vocab_size:
        raise CheckpointError(f"{path}: the tokenizer has {tokenizer.vocab_size} ids, the model {model.vocab_size}.")
    return LanguageModel(model, tokenizer, manifest.get("facts", {}))


def train(
    config: Config,
    run: str | Path,
    *,
    resume: bool = False,
    max_seconds: float = math.inf,
    quiet: bool = False,
) -> Result:
    """Trains the model of `config` into the run directory; with `resume` goes on from its newest valid checkpoint.

    Without `resume` a folder that already holds a model or checkpoints is refused, so nothing is overwritten.
    """
    folder = Path(run)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be made the run directory: {error.strerror}.") from None
    with files.locked(folder):
        checkpoints = folder / "checkpoints"
        checkpoint.clean(checkpoints)
        saved, skipped = checkpoint.newest(checkpoints) if resume else (None, [])
        if not resume and (directory.exists(folder) or checkpoint.steps(checkpoints)):
            raise ConfigError(f"{folder} already holds a run; go on with it by --resume auto, or choose another -o.")
        if saved is None and skipped:
            raise DataError(f"{folder}: no checkpoint is usable: {' '.join(skipped)}")
        trainer = Trainer(config, _store(config, folder, keep=saved is not None), folder, quiet)
        for reason in skipped:
            trainer.notes.append(f"Skipped a checkpoint: {reason}")
        if saved is not None:
            trainer.resume(saved)
            trainer.notes.append(f"Resumed {folder} at step {saved.step}.")
        return trainer.run(max_seconds)


def _store(config: Config, folder: Path, keep: bool) -> Store:
    """The store that the config's path names, or one made from its text at RUN/store (kept when resuming)."""
    own = folder / "store"
    if keep and is_store(own):
        return open_store(own)
    if not config.data.path:
        raise ConfigError("No training text was named: give --data with a text file, a folder, a store or a data set.")
    if is_store(config.data.path):
        return open_store(config.data.path)
    return prepare(config.data.path, config.tokenizer, own, overwrite=True)


def plan(config: Config) -> dict[str, Any]:
    """What a run would be: settings, parameters, tokens, steps, measured memory and time, without writing anything."""
    import resource
    import time

    with tempfile.TemporaryDirectory() as scratch:
        trainer = Trainer(config, _store(config, Path(scratch), keep=False), Path(scratch), quiet=True)
        cuda = trainer.device.type == "cuda"
        seconds, tokens = [0.0], [0]
        with precision.applied(trainer.precision):
            trainer.step()  # the first compiles, allocates and warms up
            while len(seconds) < 2 or (len(seconds) < 20 and sum(seconds) < 3):
                start = time.perf_counter()
                tokens.append(trainer.step()["tokens"])
                seconds.append(time.perf_counter() - start)
        store, data = trainer.store, config.data
        mean = data.bptt * (data.bptt_full_share + (1 - data.bptt_full_share) / 2)
        steps = math.ceil(trainer.streams.train_length / mean)
        total = min(steps * config.train.epochs, config.train.max_steps or math.inf)
        step_seconds = sum(seconds) / sum(tokens) * mean * data.batch_size
        used = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return {
            "parameters": sum(p.numel() for p in trainer.parameters),
            "vocab_size": store.vocab_size,
            "tokens": {name: info.tokens for name, info in store.info.items()},
            "steps_per_epoch": steps,
            "steps": int(total),
            "seconds_per_step": step_seconds,
            "seconds_estimated": total * step_seconds,
            "memory_bytes": used,
            "memory_rule": f"peak of this process over {len(seconds)} real steps, {'GPU' if cuda else 'resident'} memory",
            "device": str(trainer.device),
            "dtype": trainer.precision.name,
            "dtype_reason": trainer.precision.reason,
        }


def evaluate(
    run: str | Path | LanguageModel,
    *,
    data: str | Path = "",
    split: str = "test",
    batch_size: int = 1,
    counting: str = "exact",
    with_ranks: bool = True,
    device: str = "auto",
    dtype: str = "auto",
) -> dict[str, Any]:
    """Metrics of a model on a split of its own data, or of `data`: loss_nats, ppl, ppl_word, bpc, bpb, top1/5/10, mrr.

    Losses are divided by the number of predicted targets; every token is predicted, the first from a boundary
    token. counting='published' reproduces awd-lstm-lm's slightly lower figure, for comparison only.
    """
    if counting not in RULES:
        raise RequestError(f"counting {counting!r} is not known; expected one of {', '.join(RULES)}.")
    if not 1 <= batch_size <= 65536:
        raise RequestError(f"batch_size = {batch_size}: expected 1 to 65536.")
    model = run if isinstance(run, LanguageModel) else load(run, device=device, dtype=dtype)
    where = precision.resolve_device(device)
    with tempfile.TemporaryDirectory() as scratch:
        store = _evaluation_store(model, run, str(data), split, Path(scratch))
        if split not in store.splits:
            raise UserError(f"{store.path}: there is no split {split!r}; it has {', '.join(store.splits)}.")
        info = store.info[split]
        ids = store.ids(split)
        if len(ids) == 0:
            raise DataError(f"{store.path}: the split {split!r} is empty.")
        counts = {"words": info.words, "characters": info.characters, "bytes": info.bytes}
        unknown = model.tokenizer.unk_id
        oov = float((ids == unknown).mean()) if unknown is not None else 0.0
        with precision.applied(precision.resolve_dtype(dtype, where)):
            out = evaluate_ids(model.model, ids, model.tokenizer.boundary_id, counts, batch_size, counting, with_ranks)
    return {"split": split, **out, "oov_rate": oov}


def _evaluation_store(
    model: LanguageModel, run: str | Path | LanguageModel, data: str, split: str, scratch: Path
) -> Store:
    own = None if isinstance(run, LanguageModel) else Path(run) / "store"
    if not data and own is not None and is_store(own):
        return open_store(own)
    if not data and not isinstance(run, LanguageModel) and (Path(run) / "config.toml").is_file():
        from recurlm.config import from_toml, read_text_file

        path = Path(run) / "config.toml"
        data = from_toml(read_text_file(path, "configuration"), str(path)).data.path
    if not data:
        raise ConfigError(
            "No text to evaluate was named: give --data with a text file, a folder, a store or a data set."
        )
    if is_store(data):
        store = open_store(data)
        if store.tokenizer_hash != model.tokenizer.hash:
            raise DataError(
                f"{store.path}: its tokens come from another tokenizer than the model's; give the text itself."
            )
        return store
    return write_store(open_corpus(data), model.tokenizer, scratch / "store", splits=(split,))


__all__ = [
    "Config",
    "LanguageModel",
    "Result",
    "Score",
    "TokenizerConfig",
    "evaluate",
    "load",
    "plan",
    "train",
]
