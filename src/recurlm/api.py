"""Every verb as a function: train, load, evaluate; and the language model that a person talks to, text in and out."""

from __future__ import annotations

import dataclasses
import errno
import math
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from recurlm import files
from recurlm.config import Config, from_dict, from_toml, read_text_file, to_dict
from recurlm.errors import CheckpointError, ConfigError, DataError, RequestError, RunError, UserError
from recurlm.evaluation.perplexity import evaluate_ids
from recurlm.inference.engine import score_sequences
from recurlm.inference.generate import Sampling, sample_ids
from recurlm.model import directory, precision
from recurlm.protocol import StatefulModel
from recurlm.text.corpora import WHOLE, open_corpus, open_whole
from recurlm.text.store import Store, is_store, open_store, prepare, write_store
from recurlm.text.tokenizers import Tokenizer, load_tokenizer
from recurlm.text.tokenizers.base import to_bytes
from recurlm.training import checkpoint
from recurlm.training import plan as training_plan
from recurlm.training.cursor import Result
from recurlm.training.trainer import CHECKPOINTS, Trainer, check_settings

OWN_STORE = "store"
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
        size = len(to_bytes(text))
        ids = self.tokenizer.encode(text)
        if len(ids) == 0:
            raise DataError("The text is empty: there is nothing to measure.")
        lines = text.count("\n") + (not text.endswith("\n"))
        counts = {"words": len(text.split()) + lines, "characters": len(text), "bytes": size}
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
        if seed is not None and not 0 <= seed < 2**63:
            raise RequestError(f"seed = {seed}: expected 0 to 2^63 - 1.")
        stops = [s for s in ([stop] if isinstance(stop, str) else stop) if s]
        sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
        generator = torch.Generator()
        generator.seed() if seed is None else generator.manual_seed(seed)
        prompt_ids = self.tokenizer.encode_prefix(prompt).tolist()
        return self._stream(prompt, prompt_ids, tokens, sampling, generator, stops)

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
        forbidden = [self.tokenizer.unk_id] if self.tokenizer.unk_id is not None else []
        held = max((len(s) for s in stops), default=1) - 1  # characters that may yet turn out to begin a stop
        drawn, text, shown = list(prompt_ids), "", 0
        anchor, read = max(0, len(drawn) - 8), len(drawn)
        for token in sample_ids(self.model, start, tokens, sampling, generator, forbidden):
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
    model, manifest = directory.read(Path(path), where, precision.resolve_dtype(dtype, where))
    tokenizer = load_tokenizer(Path(path) / directory.TOKENIZER)
    if tokenizer.vocab_size != model.vocab_size:
        raise CheckpointError(f"{path}: the tokenizer has {tokenizer.vocab_size} ids, the model {model.vocab_size}.")
    return LanguageModel(model, tokenizer, manifest.get("facts", {}))


OURS = (
    "config.toml",
    "metrics.jsonl",
    "README.md",
    directory.CONFIG,
    directory.WEIGHTS,
    directory.TOKENIZER,
    "eval.json",
)


def train(
    config: Config, run: str | Path, *, resume: bool = False, max_seconds: float = math.inf, quiet: bool = False
) -> Result:
    """Trains the model of `config` into the run directory; with `resume` goes on from its newest valid checkpoint.

    Without `resume` a folder that already holds a model, checkpoints or files of those names is refused, so
    nothing is overwritten.
    """
    config = _settled(config)
    folder = Path(run)
    try:
        with files.locked(folder):
            return _train(config, folder, resume, max_seconds, quiet)
    except OSError as error:
        more = f"; {shutil.disk_usage(folder).free:,} bytes are free" if error.errno == errno.ENOSPC else ""
        raise RunError(
            f"{error.filename or folder}: {error.strerror or error}{more}. What was saved before is intact: "
            "put that right, then go on with --resume auto."
        ) from error


def _train(config: Config, folder: Path, resume: bool, max_seconds: float, quiet: bool) -> Result:
    """`train` under the folder's lock. A store that was made for a run that could not start is removed again."""
    checkpoints, made = folder / CHECKPOINTS, not (folder / OWN_STORE).exists()
    try:
        files.clean(folder, "|".join(map(re.escape, (*OURS, directory.MANIFEST, f".{OWN_STORE}"))))
        checkpoint.clean(checkpoints)
        saved, skipped = checkpoint.newest(checkpoints) if resume else (None, [])
        if not resume and (directory.exists(folder) or checkpoint.steps(checkpoints)):
            raise ConfigError(f"{folder} already holds a run; go on with it by --resume auto, or choose another -o.")
        if saved is None and skipped:
            raise CheckpointError(f"{folder}: no checkpoint is usable: {' '.join(skipped)}")
        there = [name for name in OURS if (folder / name).exists()]
        if there and not checkpoints.is_dir():
            raise ConfigError(
                f"{folder} holds {', '.join(there)} but no {CHECKPOINTS} folder, so it is no run that could go on; "
                "nothing was touched. Choose another -o."
            )
        store, notes = _store(config, folder, keep=saved is not None)
        if is_store(config.data.path):  # a prepared store brings its own tokenizer
            config = dataclasses.replace(
                config, tokenizer=dataclasses.replace(config.tokenizer, kind=store.tokenizer_kind)
            )
        trainer = Trainer(config, store, folder, quiet)
        if resume and saved is None:
            notes = [*notes, f"No checkpoint in {folder}: starting from the beginning."]
        if saved is not None:
            trainer.resume(saved)
            checkpoint.set_aside(checkpoints, saved.step)
            notes = [*notes, *(f"Skipped a checkpoint: {reason}" for reason in skipped)]
            notes.append(f"Resumed {folder} at step {saved.step:,}.")
        trainer.notes += notes
    except BaseException:
        if made:
            files.remove(folder / OWN_STORE)
        raise
    return trainer.run(max_seconds)


def plan(config: Config) -> dict[str, Any]:
    """What a run would be: parameters, tokens, steps, measured memory and time. Writes nothing that stays."""
    config = _settled(config)
    with tempfile.TemporaryDirectory() as scratch:
        store, _ = _store(config, Path(scratch), keep=False)
        return training_plan.plan(config, store)


def _settled(config: Config) -> Config:
    """The Config, every value checked, with an absolute path to its text."""
    config = from_dict(to_dict(config))
    check_settings(config)
    if not config.data.path:
        raise ConfigError("No training text was named: give --data with a text file, a folder, a store or a data set.")
    path = Path(config.data.path)
    if path.exists():
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, path=str(path.resolve())))
    return config


def _store(config: Config, folder: Path, keep: bool) -> tuple[Store, list[str]]:
    """(store, notes): the store that the config's path names, or one made from its text at RUN/store."""
    own = folder / OWN_STORE
    if is_store(config.data.path):
        store = open_store(config.data.path)
    elif keep and is_store(own):
        store = open_store(own)
        store.verify()
        return store, []
    else:
        return prepare(config.data.path, config.tokenizer, own, overwrite=True), []
    store.verify()
    kind = config.tokenizer.kind
    different = f"The store's tokenizer is {store.tokenizer_kind}; tokenizer.kind = {kind} is not used."
    return store, [different] if store.tokenizer_kind != kind else []


def evaluate(
    run: str | Path | LanguageModel, *, data: str | Path = "", split: str = "", batch_size: int = 1, counting: str = "exact",
    with_ranks: bool = True, device: str = "auto", dtype: str = "auto",
) -> dict[str, Any]:  # fmt: skip
    """Metrics of a model on a split (test) of its own data, or of `data`: loss_nats, ppl, ppl_word, bpc, bpb, top1/5/10, mrr.

    A single file as `data` is measured whole. Losses are divided by the number of predicted targets; every token is
    predicted, the first from a boundary token. counting='published' reproduces awd-lstm-lm's slightly lower figure,
    for comparison only. A LanguageModel is measured where it is, in its own precision.
    """
    model = run if isinstance(run, LanguageModel) else load(run, device=device, dtype=dtype)
    with tempfile.TemporaryDirectory() as scratch:
        store, split = _evaluation_store(model, run, str(data), split, Path(scratch))
        info, ids, unknown = store.info[split], store.ids(split), model.tokenizer.unk_id
        counts = {"words": info.words, "characters": info.characters, "bytes": info.bytes}
        oov = float((ids == unknown).mean()) if unknown is not None else 0.0
        out = evaluate_ids(model.model, ids, model.tokenizer.boundary_id, counts, batch_size, counting, with_ranks)
    return {"split": split, **out, "oov_rate": oov}


def _evaluation_store(
    model: LanguageModel, run: str | Path | LanguageModel, data: str, split: str, scratch: Path
) -> tuple[Store, str]:
    """(store, split) to measure: the named text tokenized for the model, or the run's own."""
    if not data and not isinstance(run, LanguageModel):
        toml = Path(run) / "config.toml"
        data = str(Path(run) / OWN_STORE)
        if not is_store(data) and toml.is_file():
            data = from_toml(read_text_file(toml, "configuration"), str(toml)).data.path
    if not data:
        raise ConfigError(
            "No text to measure was named: give --data with a text file, a folder, a store or a data set."
        )
    if is_store(data):
        store = open_store(data)
        store.verify()
        if store.tokenizer_hash != model.tokenizer.hash:
            raise DataError(
                f"{store.path}: its tokens come from another tokenizer than the model's; give the text itself."
            )
        return store, _known_split(split or "test", store.splits, data)
    if Path(data).is_file() and not split:
        return write_store(open_whole(data), model.tokenizer, scratch / "store"), WHOLE
    corpus = open_corpus(data)
    split = _known_split(split or "test", corpus.splits, data)
    return write_store(corpus, model.tokenizer, scratch / "store", splits=(split,)), split


def _known_split(split: str, splits: tuple[str, ...], place: str) -> str:
    if split not in splits:
        raise UserError(f"{place}: there is no split {split!r}; it has {', '.join(splits)}.")
    return split
