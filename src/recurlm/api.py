"""Every verb as a function: train, load, plan, evaluate and what else the command line does."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import math
import os
import re
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError

from recurlm import files
from recurlm.config import (
    Config,
    DataConfig,
    cache_config,
    dynamic_config,
    from_dict,
    from_toml,
    read_text_file,
    settings_of,
    stage,
    stage_count,
    to_dict,
    to_toml,
    without_published,
)
from recurlm.errors import CheckpointError, ConfigError, DataError, RequestError, RunError, UserError, lookup, shown
from recurlm.evaluation import suites
from recurlm.evaluation.interpolation import tuned_dynamic, tuned_mixture
from recurlm.evaluation.perplexity import check_measurable, evaluate_ids
from recurlm.evaluation.reading import Subject
from recurlm.evaluation.report import report as error_report
from recurlm.inference.dynamic import DynamicEvaluation, gradient_rms
from recurlm.inference.generate import check_range
from recurlm.inference.mixture import Mixture
from recurlm.inference.monte_carlo import MonteCarloDropout
from recurlm.inference.neural_cache import NeuralCache
from recurlm.language_model import LanguageModel, load
from recurlm.model import directory, precision
from recurlm.model.neural import NeuralModel
from recurlm.protocol import StatefulModel
from recurlm.text.batches import Sequences, reading_order
from recurlm.text.corpora import NAMED_SETS, SPLITS, WHOLE, open_corpus, open_whole
from recurlm.text.store import RETURNS, Store, has_carriage_returns, is_store, open_store, prepare, write_store
from recurlm.text.tokenizers import load_tokenizer
from recurlm.training import checkpoint, memory, range_test, snapshot
from recurlm.training import compare as side_by_side
from recurlm.training import plan as training_plan
from recurlm.training.cursor import Result
from recurlm.training.monitor import read_metrics
from recurlm.training.range_test import RangeTest
from recurlm.training.settings import check_settings, settle
from recurlm.training.trainer import CHECKPOINTS, Trainer


def figures_file(split: str) -> str:
    """The name of the file in which a run keeps what `recurlm eval` measured of a split."""
    return "eval.json" if split == "test" else f"eval-{split}.json"


OWN_STORE = "store"
FIGURES = tuple(map(figures_file, SPLITS))
OURS = (
    "config.toml",
    "metrics.jsonl",
    "README.md",
    directory.CONFIG,
    directory.WEIGHTS,
    directory.TOKENIZER,
    *FIGURES,
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
            return _trainer(config, folder, resume, quiet).run(max_seconds)
    except OSError as error:
        more = f"; {files.size(shutil.disk_usage(folder).free)} are free" if error.errno == errno.ENOSPC else ""
        raise RunError(
            f"{error.filename or folder}: {error.strerror or error}{more}. What was saved before is intact: "
            "put that right, then go on with --resume auto."
        ) from error


def _trainer(config: Config, folder: Path, resume: bool, quiet: bool) -> Trainer:
    """The Trainer of a locked run directory, at its newest valid checkpoint with `resume`.

    A store that was made for a run that could not start is removed again.
    """
    checkpoints, made, tokens = folder / CHECKPOINTS, not (folder / OWN_STORE).exists(), config.tokenizer
    try:
        files.clean(folder, "|".join(map(re.escape, (*OURS, directory.MANIFEST, f".{OWN_STORE}"))))
        checkpoint.clean(checkpoints)
        saved, skipped = checkpoint.newest(checkpoints) if resume else (None, [])
        if not resume and (directory.exists(folder) or checkpoint.steps(checkpoints)):
            raise ConfigError(f"{folder} already holds a run; go on with it by --resume auto, or choose another -o.")
        if saved is None and skipped:
            raise CheckpointError(
                f"{folder}: no checkpoint is usable; choose another -o to start anew. Why: {' '.join(skipped)}"
            )
        there = [name for name in OURS if (folder / name).exists()]
        if there and not checkpoints.is_dir():
            raise ConfigError(
                f"{folder} holds {', '.join(there)} but no {CHECKPOINTS} folder, so it is no run that could go on; "
                "nothing was touched. Choose another -o."
            )
        if folders := [name for name in OURS if (folder / name).is_dir()]:
            raise ConfigError(f"{folder / folders[0]}: a folder, where a run keeps a file; move it away.")
        store, notes = _store(config, folder, keep=saved is not None)
        if is_store(config.data.path):  # a prepared store brings its own tokenizer
            kind = dataclasses.replace(config.tokenizer, kind=store.tokenizer_kind)
            config = dataclasses.replace(config, tokenizer=kind)
        if (text := config.published.text) and (config.tokenizer != tokens or not _is_set(store, text)):
            notes.append(f"The published figures are of {text}; this is another text, so they are not shown beside it.")
            config = without_published(config, tokens)
        if saved is not None:
            config, choice = settle(config, store)
            notes += [choice] if choice else []
            snapshot.check(saved, config, store)
        memory.check(config, store.vocab_size)
        trainer = Trainer(config, store, folder, quiet)
        sizes = ", ".join(f"{split} {info.tokens:,}" for split, info in store.info.items())
        notes.append(
            f"{sizes} tokens; {store.tokenizer_kind} vocabulary of {store.vocab_size:,}; "
            f"{sum(p.numel() for p in trainer.parameters):,} parameters"
        )
        if isinstance(trainer.batches, Sequences):
            notes.append(f"{len(trainer.batches.lengths):,} {config.data.batching}s to train on")
        data, length = config.data, trainer.batches.epoch_length(0)
        if saved is None and data.batching == "stream" and data.batch_size > 1 and length < data.bptt:
            most = store.info["train"].tokens // data.bptt
            notes.append(
                f"data.batch_size = {data.batch_size:,} makes streams of {length:,} tokens, less than one window (data.bptt = "
                f"{data.bptt:,}), so an epoch is hardly a step; "
                + (f"up to {most:,} would have a whole one." if most else "one of the whole text would be shorter too.")
            )
        if saved is None and has_carriage_returns(store):
            notes.append(RETURNS)
        if resume and saved is None:
            notes.append(f"No checkpoint in {folder}: starting from the beginning.")
        if saved is not None:
            trainer.resume(saved)
            checkpoint.set_aside(checkpoints, saved.step)
            notes += [f"Skipped a checkpoint: {reason}" for reason in skipped]
            if differences := snapshot.changed(saved, config):
                notes.append(f"Settings that differ from the checkpoint's: {', '.join(differences)}")
            notes.append(f"Resumed {folder} at step {saved.step:,}.")
        trainer.notes += notes
    except BaseException:
        if made:
            files.remove(folder / OWN_STORE)
        raise
    return trainer


def plan(config: Config) -> dict[str, Any]:
    """What a run would be: parameters, tokens, steps, measured memory and time. Writes nothing that stays."""
    config = _settled(config)
    with tempfile.TemporaryDirectory() as scratch:
        store, _ = _store(config, Path(scratch), keep=False)
        memory.check(config, store.vocab_size)
        return training_plan.plan(config, store)


def lr_find(config: Config) -> RangeTest:
    """The learning-rate range test of a run (see `training.range_test`); writes nothing that stays."""
    config = _settled(config)
    with tempfile.TemporaryDirectory() as scratch:
        store, _ = _store(config, Path(scratch), keep=False)
        return range_test.range_test(config, store)


def compare(runs: Sequence[str | Path], out: str | Path | None = None, *, overwrite: bool = False) -> dict[str, Any]:
    """{header, rows, curves} of runs side by side, as their files tell it; with `out` (FILE.html) also as a page.

    A curve is {run, epochs, minutes, values}. Runs may be neural or n-gram, finished or not; no model is loaded.
    """
    paths = [Path(run).resolve() for run in runs]
    if not paths:
        raise UserError("No run was named; give one run directory or more.")
    page = None if out is None else _new_page(out, overwrite)
    found = [side_by_side.read(path, name) for path, name in zip(paths, _names(paths), strict=True)]
    if page is not None:
        _write_page(page, side_by_side.html(found))
    data = side_by_side.table(found)
    return {
        "header": list(data.header),
        "rows": [list(row) for row in data.rows],
        "curves": [{"run": r.name, "epochs": r.epochs, "minutes": r.minutes, "values": r.values} for r in found],
    }


def _new_page(out: str | Path, overwrite: bool) -> Path:
    """The path of a page that can be written; UserError otherwise."""
    out = Path(out)
    if out.suffix != ".html":
        raise UserError(f"{out}: the report is one HTML page; expected a name that ends in .html.")
    if out.exists() and not overwrite:
        raise UserError(f"{out} exists already; use --force to replace it, or choose another name.")
    if not out.parent.is_dir():
        raise UserError(f"{out.parent}: no such folder; make it first, or write the report elsewhere.")
    return out


def _write_page(out: Path, page: str) -> None:
    try:
        files.write_atomic(out, page)
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error.strerror}.") from None


CARD = ("README.md", "config.toml", "metrics.jsonl", *FIGURES)


def export(
    run: str | Path, out: str | Path, *, dtype: str = "fp32", max_shard_size: int = 0, card_only: bool = False
) -> dict[str, int]:
    """{file: bytes} of a new folder with a neural run's model and its card, without what only training needs.

    Weights are stored in `dtype` (fp32, bf16), in files of at most `max_shard_size` bytes where that is not 0. The card
    (alone with `card_only`) is README.md, config.toml with its text by name only, metrics.jsonl without single steps, and
    the figures of each split that was measured. ConfigError when the folder holds something; the folder is there whole or
    not at all.
    """
    run, out = Path(run), Path(out)
    lookup(directory.STORED, dtype, "dtype")
    if directory.kind(run) != "neural":
        raise UserError(f"{run}: an n-gram model, which is mapped into memory as it is; copy its folder instead.")
    texts = _card(run)
    try:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise ConfigError(f"{out} exists already; choose another -o.")
        out = out.resolve()  # "." has no name of its own
        temporary = out.with_name(f"{out.name}.tmp-{os.getpid()}")
        try:
            made = files.make_folder(temporary)
        except OSError as error:
            raise UserError(f"{out}: this folder cannot be made: {error.strerror}.") from None
        try:
            for name, text in texts.items():
                (temporary / name).write_text(text, encoding="utf-8")
            if not card_only:
                model, manifest = directory.read(run, torch.device("cpu"), precision.FP32)
                tokenizer = load_tokenizer(run / directory.TOKENIZER).to_json()
                directory.export(temporary, model, tokenizer, manifest["facts"], dtype, max_shard_size or 2**62)
            files.publish(temporary, out)
        finally:
            files.remove(temporary)
            for folder in made[1:]:
                with contextlib.suppress(OSError):  # not empty: it holds what was exported
                    folder.rmdir()
    except (OSError, SafetensorError) as error:
        raise RunError(f"{out}: the export could not be written: {error}.") from error
    return {path.name: path.stat().st_size for path in sorted(out.iterdir())}


def _card(run: Path) -> dict[str, str]:
    """The texts of a run that say what it is, by name: small, and without paths of this machine but in its command."""
    texts = {}
    for name in CARD:
        if not (run / name).is_file():
            continue
        text = read_text_file(run / name, "part of the run") if name != "metrics.jsonl" else ""
        if name == "config.toml":
            config = from_toml(text, str(run / name))
            data = dataclasses.replace(config.data, path=Path(config.data.path).name)
            text = to_toml(dataclasses.replace(config, data=data))
        if name == "metrics.jsonl":
            text = "".join(json.dumps(r) + "\n" for r in read_metrics(run) if r["event"] != "step")
        texts[name] = text
    return texts


def _settled(config: Config) -> Config:
    """The Config, every value checked, with an absolute path to its text."""
    config = from_dict(to_dict(config))
    check_settings(config)
    if not config.data.path:
        raise ConfigError("No training text was named: give --data with a text file, a folder, a store or a data set.")
    path = _place(config.data.path)
    if path.exists():
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, path=str(path.resolve())))
    return config


def _place(source: str) -> Path:
    """The path of a text; UserError for what is no possible path, or is a run directory."""
    path = Path(source)
    try:
        path.exists()
    except (OSError, ValueError):
        raise UserError(f"{shown(source)} is not a possible path.") from None
    if directory.exists(path):
        own = path / OWN_STORE
        hint = f" Its own tokens are in {own}." if is_store(own) else ""
        raise UserError(f"{path}: a run directory; expected a text file, a folder of text, or a store.{hint}")
    return path


def _store(config: Config, folder: Path, keep: bool) -> tuple[Store, list[str]]:
    """(store, notes): the store that the config's path names, or one made from its text at RUN/store."""
    own = folder / OWN_STORE
    if is_store(config.data.path):
        store = open_store(config.data.path)
    elif keep and is_store(own):
        store = open_store(own)
        store.verify()
        return store, []
    elif keep and own.exists():
        raise DataError(
            f"{own}: the run's own tokens are damaged (no {own / 'store.json'}); remove this folder to have them made "
            f"again from {config.data.path}."
        )
    else:
        return prepare(config.data.path, config.tokenizer, own, overwrite=True), []
    store.verify()
    kind = config.tokenizer.kind
    different = f"The store's tokenizer is {store.tokenizer_kind}; tokenizer.kind = {kind} is not used."
    return store, [different] if store.tokenizer_kind != kind else []


def _is_set(store: Store, name: str) -> bool:
    """Whether the store's text is the named data set, as the sizes of its splits tell."""
    known = lookup(NAMED_SETS, name, "published.text")
    return all(info.bytes == known.bytes.get(split) for split, info in store.info.items())


def evaluate(
    run: str | Path | LanguageModel, *, data: str | Path = "", split: str = "", batch_size: int = 1, counting: str = "exact",
    batching: str = "", with_ranks: bool = True, device: str = "auto", dtype: str = "auto",
    mixed_with: Sequence[str | Path | LanguageModel] = (), caches: Sequence[int | Mapping[str, Any]] = (),
    dynamic: Mapping[str, Any] | None = None, tune_on: str = "", mc_dropout: int = 0,
    say: Callable[[str], None] = lambda what: None,
) -> dict[str, Any]:  # fmt: skip
    """Metrics of a model on a split (test) of its own data, or of `data`: loss_nats, ppl, ppl_word, bpc, bpb, top1/5/10, mrr.

    A single file as `data` is measured whole. Losses are divided by the number of predicted targets; every token is
    predicted, the first from a boundary token. counting='published' reproduces awd-lstm-lm's slightly lower figure,
    for comparison only. `batching` is the way the model was trained unless it is named. A LanguageModel is measured
    where it is, in its own precision. With `mixed_with` or whole numbers among `caches` it is interpolated with these models
    of the same tokenizer, and with the best of these unigram caches (windows in tokens); weights from the split `tune_on`
    (valid), by EM. A mapping among `caches` is a neural cache's settings, `dynamic` those of dynamic evaluation (see
    `config.CacheConfig`, `config.DynamicConfig`). What they leave out has its default; where `tune_on` is named, theta,
    lambda, lr and decay that they leave out are searched on that split.
    `mc_dropout` K: the mean prediction of K networks thinned by the run's own dropout (see `inference.monte_carlo`).
    `say` is told what is odd about `data`.
    """
    start = time.perf_counter()
    if tune_on and not (mixed_with or caches or dynamic is not None):
        raise RequestError(f"--tune-on {tune_on}: nothing to tune; give --with, --cache or --dynamic too.")
    model = run if isinstance(run, LanguageModel) else load(run, device=device, dtype=dtype)
    if mc_dropout:
        if dynamic is not None or any(isinstance(c, Mapping) for c in caches):
            raise UserError("mc_dropout is a mean of many networks; a neural cache and dynamic evaluation follow one.")
        model = _thinned(model, run, mc_dropout)
    batching = batching or (model.batching if counting == "exact" else "stream")
    boundary, adapted = model.tokenizer.boundary_id, {}
    with tempfile.TemporaryDirectory() as scratch:

        def text_of(source: str, split: str, name: str) -> tuple[Store, str, np.ndarray]:
            """(store, split, the split's ids as the model reads them)."""
            store, split = _evaluation_store(model, run, source, split, Path(scratch) / name)
            return store, split, reading_order(store.ids(split), model.backward, boundary)

        store, split, ids = text_of(str(data), split, "measured")
        if data and has_carriage_returns(store, split):
            say(RETURNS)
        info, unknown = store.info[split], model.tokenizer.unk_id
        counts = {"words": info.words, "characters": info.characters, "bytes": info.bytes}
        oov = float((ids == unknown).mean()) if unknown is not None else 0.0
        measured = model.model
        if mixed_with or caches or dynamic is not None:
            check_measurable(
                ids, boundary, DataConfig(eval_batch_size=batch_size, counting=counting, batching=batching)
            )
            own = "" if isinstance(run, str | Path) else str(data)
            splits = (
                lambda: text_of(own, "train", "training")[2],
                lambda: text_of(str(data), tune_on or "valid", "held-out")[2],
            )
            others = [m if isinstance(m, LanguageModel) else load(m, device=device, dtype=dtype) for m in mixed_with]
            names = [str(m) if isinstance(m, str | Path) else f"model {n}" for n, m in enumerate((run, *mixed_with), 1)]
            models = list(zip(names, (model, *others), strict=True))
            measured, adapted = _adapted(models, caches, dynamic, tune_on, batch_size, batching, *splits)
        since = time.perf_counter()
        out = evaluate_ids(measured, ids, boundary, counts, batch_size, counting, with_ranks, batching)
    if adapted:
        now = time.perf_counter()
        adapted["seconds"] |= {"evaluation": now - since, "all": now - start}
    weights = {"step": model.facts["step"]} if "step" in model.facts else {}  # those that were measured
    return {"split": split, **out, "oov_rate": oov, **weights, **adapted} | (
        {"mc_dropout": mc_dropout} if mc_dropout else {}
    )


def _thinned(model: LanguageModel, run: str | Path | LanguageModel, samples: int) -> LanguageModel:
    """The run's model with the dropout of its last stage; UserError when it is no neural run."""
    toml = None if isinstance(run, LanguageModel) else Path(run) / "config.toml"
    if toml is None or not toml.is_file() or not isinstance(model.model, NeuralModel):
        raise UserError("mc_dropout needs a neural run directory, whose config.toml says how it was dropped out.")
    config = from_toml(read_text_file(toml, "configuration"), str(toml))
    dropout = stage(config, stage_count(config) - 1).dropout
    return LanguageModel(MonteCarloDropout(model.model, dropout, samples), model.tokenizer, model.facts)


def _adapted(
    models: Sequence[tuple[str, LanguageModel]], caches: Sequence[int | Mapping[str, Any]], dynamic: Mapping[str, Any] | None,
    tune_on: str, batch_size: int, batching: str, training: Callable[[], np.ndarray], held_out: Callable[[], np.ndarray],
) -> tuple[StatefulModel, dict[str, Any]]:  # fmt: skip
    """(one model of all: the first, moved by dynamic evaluation, with its neural cache, mixed with the others and a unigram
    cache; its settings, weights, tuned losses and seconds)."""
    (name, first), boundary = models[0], models[0][1].tokenizer.boundary_id
    parts = {other: model.model for other, model in models}
    windows = [c for c in caches if not isinstance(c, Mapping)]
    neural = [c for c in caches if isinstance(c, Mapping)]
    mixes = bool(len(models) > 1 or windows)
    cache = cache_config(neural[0]) if neural else None
    how = None if dynamic is None else dynamic_config(dynamic)
    free_cache = {"theta", "lambda"} - set(neural[0]) if neural and tune_on else set()
    searched = {"lr", "decay"} if how and how.rule == "rms" else {"lr"}  # sgd's decay is 0 unless it is given
    free_dynamic = searched - set(dynamic) if dynamic is not None and tune_on else set()
    for other, model in models:
        if model.tokenizer.hash != first.tokenizer.hash:
            raise UserError(f"{other}: it has another tokenizer than {name}; train both on one store to mix them.")
    if len(parts) < len(models):
        raise UserError("A model is named twice; mix models that differ.")
    if len(neural) > 1:
        raise UserError("Two neural caches were asked for; give one (and, beside it, unigram caches: --cache N).")
    if (cache or how) and not isinstance(first.model, NeuralModel):
        raise UserError(
            f"{name}: an n-gram model; a neural cache and dynamic evaluation need a neural one, named first."
        )
    if (cache or how) and batching != "stream":
        raise UserError(
            f"A neural cache and dynamic evaluation follow one stream of text, not {batching}s; give --batching stream."
        )
    if how and batch_size != 1:
        raise UserError(f"batch_size = {batch_size}: dynamic evaluation reads one stream, for its weights follow it.")
    if tune_on and not (mixes or free_cache or free_dynamic):
        raise UserError(
            f"--tune-on {tune_on}: every setting is given, so nothing is left to tune; leave out theta, lambda, lr or decay."
        )
    out: dict[str, Any] = {"seconds": {}}

    @contextlib.contextmanager
    def timed(what: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        out["seconds"][what] = time.perf_counter() - start

    ids = held_out() if mixes or free_cache or free_dynamic else np.empty(0)
    if how and isinstance(first.model, NeuralModel):
        with timed("statistics"):
            rms = gradient_rms(first.model, training(), boundary, how) if how.rule == "rms" else None
        if free_dynamic:
            with timed("tuning dynamic"):
                how, out["tuned_dynamic_loss_nats"] = tuned_dynamic(first.model, how, free_dynamic, rms, ids, boundary)
        parts[name] = DynamicEvaluation(first.model, how, rms)
        out["dynamic"] = settings_of(how)
    if mixes or free_cache:
        with timed("tuning"):
            one, weights, out["tuned_loss_nats"] = tuned_mixture(
                parts, windows, ids, boundary, batch_size, batching, cache, free_cache
            )
        out |= {"weights": weights} if mixes else {}
        cached = one.models[0] if isinstance(one, Mixture) else one
        cache = cached.config if isinstance(cached, NeuralCache) else None
    else:
        one = NeuralCache(parts[name], cache) if cache else parts[name]
    out |= {"cache": settings_of(cache)} if cache else {}
    if len(ids):
        tuned = sorted(free_cache | free_dynamic)
        out |= ({"tuned": tuned} if tuned else {}) | {"tuned_on": tune_on or "valid"}
    return one, out


def evaluate_suite(
    run: str | Path | LanguageModel, suite: str, *, source: str | Path = "", text_rule: str = "auto",
    device: str = "auto", dtype: str = "auto",
) -> dict[str, Any]:  # fmt: skip
    """A model's results on a suite: blimp, lambada or gulordava, from the folder `source` or the data folder, or a FILE.jsonl.

    Accuracy of all items, each family and each group (see `evaluation.suites`), with the published figures beside. Text
    is written as the model's training text was, by the rule that its vocabulary shows unless one is named.
    """
    name, items = suites.open_suite(suite, source)
    model = run if isinstance(run, LanguageModel) else load(run, device=device, dtype=dtype)
    found = suites.evaluate_suite(model.model, model.tokenizer, items, text_rule)
    return {"suite": name, **found, "published": suites.SUITES[name].published if name in suites.SUITES else {}}


def report(
    run: str | Path | LanguageModel, out: str | Path, *, against: Sequence[str | Path | LanguageModel] = (),
    others: Sequence[str | Path] = (), data: str | Path = "", split: str = "", batch_size: int = 8, overwrite: bool = False,
    device: str = "auto", dtype: str = "auto", say: Callable[[str], None] = lambda what: None,
) -> dict[str, Any]:  # fmt: skip
    """The numbers of an error analysis, written to the page `out` (FILE.html): see `evaluation.report`.

    The text is a split (test) of the run's own data, or of `data`, as in `evaluate`; `against` are models to compare on the
    same words, `others` texts of another style. UserError before anything is measured when `out` cannot be written.
    """
    check_range("batch_size", batch_size, 1, 65536)
    out = _new_page(out, overwrite)
    models = [m if isinstance(m, LanguageModel) else load(m, device=device, dtype=dtype) for m in (run, *against)]
    paths = [m if isinstance(m, LanguageModel) else Path(m).resolve() for m in (run, *against)]
    subjects = [
        Subject(name, m.model, m.tokenizer, m.batching, m.parameters)
        for name, m in zip(_names(paths), models, strict=True)
    ]
    other_texts = {str(other): _beginning(other, "")[1] for other in others}
    if short := [name for name, text in other_texts.items() if len(text.split()) < 16]:
        raise UserError(f"{short[0]}: too short to measure; expected at least a few lines of text.")
    with tempfile.TemporaryDirectory() as scratch:
        if data and not is_store(_place(str(data))):
            place, text = _beginning(data, split)
            size = None
        else:
            store, split = _evaluation_store(models[0], run, str(data), split, Path(scratch))
            info, ids = store.info[split], store.ids(split)[:_MOST_TOKENS]
            place = f"{store.path}, {split}"
            text = _as_written(models[0], run, split, ids) or models[0].tokenizer.decode(ids)
            size = (info.characters, info.bytes) if len(ids) == info.tokens else None
        counts = _training_counts(models[0], run)
    page, numbers = error_report(subjects, text, place, counts, other_texts, size, batch_size, say)
    _write_page(out, page)
    return numbers


_MOST_TOKENS, _MOST_BYTES = 2_000_000, 8_000_000  # of a text to report on; the report itself may take less


def _names(models: Sequence[Path | LanguageModel]) -> list[str]:
    """A short name for each model, no two the same."""
    names = [m.name if isinstance(m, Path) else f"model {n}" for n, m in enumerate(models, 1)]
    return [name if names.count(name) == 1 else f"{name} ({n})" for n, name in enumerate(names, 1)]


def _beginning(data: str | Path, split: str) -> tuple[str, str]:
    """(place, text): the first lines of a file, or of a folder's or data set's split (test)."""
    if _place(str(data)).is_file() and not split:
        corpus, split = open_whole(data), WHOLE
    else:
        corpus = open_corpus(data, needs_train=False)
        split = _known_split(split or "test", corpus.splits, str(data))
    blocks, size = [], 0
    for block in corpus.blocks(split):
        blocks.append(block)
        size += len(block)
        if size >= _MOST_BYTES:
            break
    try:
        return (str(data) if split == WHOLE else f"{data}, {split}"), b"".join(blocks).decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{data}: not UTF-8 text at byte {error.start}.") from None


def _as_written(model: LanguageModel, run: str | Path | LanguageModel, split: str, ids: np.ndarray) -> str:
    """The run's own text as it was written, white space and all, if it is still there and gives these ids; "" otherwise.

    Where a word tokenizer's decoding stood in for it, models that read white space were wrong about every line end.
    """
    if isinstance(run, LanguageModel):
        return ""
    try:
        toml = Path(run) / "config.toml"
        text = _beginning(from_toml(read_text_file(toml, "configuration"), str(toml)).data.path, split)[1]
        own = model.tokenizer.encode(text)
    except UserError:
        return ""
    return text if len(own) and np.array_equal(own, ids[: len(own)]) else ""


def _training_counts(model: LanguageModel, run: str | Path | LanguageModel) -> Counter[str] | None:
    """How often each word is in the first 10 million tokens of the run's own training text; None when that is not there."""
    own = None if isinstance(run, LanguageModel) else Path(run) / OWN_STORE
    if own is None or not is_store(own) or "train" not in (store := open_store(own)).splits:
        return None
    return Counter(model.tokenizer.decode(store.ids("train")[:10_000_000]).split())


def _evaluation_store(
    model: LanguageModel, run: str | Path | LanguageModel, data: str, split: str, scratch: Path
) -> tuple[Store, str]:
    """(store, split) to measure: the named text tokenized for the model, or the run's own."""
    if not data and not isinstance(run, LanguageModel):
        toml, own = Path(run) / "config.toml", Path(run) / OWN_STORE
        if own.exists():
            data = str(own)
        elif toml.is_file():
            data, split = from_toml(read_text_file(toml, "configuration"), str(toml)).data.path, split or "test"
    if not data:
        raise ConfigError(
            "No text to measure was named: give --data with a text file, a folder, a store or a data set."
        )
    if is_store(_place(data)):
        store = open_store(data)
        store.verify()
        if store.tokenizer_hash != model.tokenizer.hash:
            raise DataError(
                f"{store.path}: its tokens come from another tokenizer than the model's; give the text itself."
            )
        return store, _known_split(split or "test", store.splits, data)
    if Path(data).is_file() and not split:
        return write_store(open_whole(data), model.tokenizer, scratch / "store"), WHOLE
    corpus = open_corpus(data, needs_train=False)
    split = _known_split(split or "test", corpus.splits, data)
    return write_store(corpus, model.tokenizer, scratch / "store", splits=(split,)), split


def _known_split(split: str, splits: tuple[str, ...], place: str) -> str:
    if split not in splits:
        raise UserError(f"{place}: there is no split {split!r}; it has {', '.join(splits)}.")
    return split
