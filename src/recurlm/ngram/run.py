"""The verbs of `recurlm ngram` as functions: train, prune, import_arpa, export_arpa."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import math
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from recurlm import files
from recurlm.config import TokenizerConfig, from_toml, read_text_file
from recurlm.errors import CheckpointError, ConfigError, RunError, UserError
from recurlm.ngram import arpa, directory
from recurlm.ngram.counts import IN_MEMORY, count, in_files
from recurlm.ngram.model import NgramModel
from recurlm.ngram.prune import entropy_prune
from recurlm.ngram.smoothing import Settings, estimate
from recurlm.ngram.trie import Table
from recurlm.text.store import RETURNS, has_carriage_returns, is_store, open_store, prepare
from recurlm.text.tokenizers import Tokenizer, load_tokenizer

OWN_STORE, TOML, SCRATCH = "store", "config.toml", "scratch"
SCORED = 1 << 18  # ids at once


def train(
    data: str | Path,
    run: str | Path,
    *,
    order: int = 5,
    settings: Settings = Settings(),
    tokenizer: TokenizerConfig = TokenizerConfig(kind="word"),
    tokenizer_of: str | Path | None = None,
    out_of_core: bool | None = None,
    memory_limit: str = "1500MB",
    arpa_file: str | Path | None = None,
    say: Callable[[str], None] = lambda what: None,
) -> dict[str, Any]:
    """Facts of the n-gram model that was estimated on the train split of a text or store and written to the run directory.

    `tokenizer` makes the ids unless `data` is a store; with `tokenizer_of` they are those of another run or store, so that the
    models of several domains can be mixed. Texts of more than 30 million tokens, or with `out_of_core`, are
    counted by DuckDB in about `memory_limit`; what grows with the text then lies in files of the run directory. With
    `arpa_file` the model is written there too. `say` is told what is odd about the text.
    """
    given = None if tokenizer_of is None else load_tokenizer(Path(tokenizer_of) / directory.TOKENIZER)
    with _new_run(run) as folder:
        _check_arpa(arpa_file)
        store = open_store(data) if is_store(data) else prepare(data, tokenizer, folder / OWN_STORE, given)
        store.verify()
        if given is not None and store.tokenizer_hash != given.hash:
            raise ConfigError(f"{data}: this store has another tokenizer than {tokenizer_of}; give the text itself.")
        if has_carriage_returns(store):
            say(RETURNS)
        ids = store.ids("train")
        known = store.tokenizer()
        out_of_core = len(ids) > IN_MEMORY if out_of_core is None else out_of_core
        scratch = folder / f"{SCRATCH}.tmp-{os.getpid()}" if out_of_core else None
        if scratch is not None:
            scratch.mkdir()
        counts = count(
            ids, known.vocab_size, known.boundary_id, order,
            out_of_core=out_of_core, memory_limit=memory_limit, scratch=scratch,
        )  # fmt: skip
        valid = store.ids("valid") if "valid" in store.splits else None
        allocate = np.empty if scratch is None else in_files(scratch)
        table, facts = estimate(counts, ids, valid, settings, allocate)
        del counts
        return _publish(folder, table, known, dataclasses.asdict(settings), facts, store.path, valid, arpa_file)


def prune(run: str | Path, out: str | Path, threshold: float, *, arpa_file: str | Path | None = None) -> dict[str, Any]:
    """Facts of the run's model without the n-grams that raise its perplexity by less than `threshold` each, written to `out`."""
    model, tokenizer = load(run)
    facts = files.read_manifest(Path(run) / directory.MANIFEST, directory.FORMAT)["facts"]
    if facts.get("normalised") is False:
        raise ConfigError(
            f"{run}: its scores are no probabilities (stupid backoff), so none can be shared anew; prune another model."
        )
    if Path(out).resolve() == Path(run).resolve():
        raise ConfigError(f"{run} already holds a run; choose another -o.")
    source = _source(Path(run))
    with _new_run(out) as folder:
        _check_arpa(arpa_file)
        table = entropy_prune(model.table, threshold)
        valid = None
        if source and is_store(source) and "valid" in (store := open_store(source)).splits:
            valid = store.ids("valid")
        settings = {"pruned_from": Path(run).resolve().name, "threshold": threshold}
        return _publish(folder, table, tokenizer, settings, {}, source, valid, arpa_file)


def import_arpa(path: str | Path, run: str | Path, *, normalised: bool = True) -> dict[str, Any]:
    """Facts of the model of an ARPA file, written to the run directory; see `arpa.read` for what is refused."""
    with _new_run(run) as folder:
        table, tokenizer = arpa.read(Path(path), normalised=normalised)
        facts = {} if normalised else {"normalised": False}
        return _publish(folder, table, tokenizer, {"imported_from": Path(path).name}, facts, None, None, None)


def export_arpa(run: str | Path, path: str | Path) -> None:
    """None; writes the run's model as an ARPA file."""
    model, tokenizer = load(run)
    _check_arpa(path)
    _write_arpa(Path(path), model.table, tokenizer)


def load(run: str | Path) -> tuple[NgramModel, Tokenizer]:
    """(model, tokenizer) of an n-gram run; `recurlm.load` gives the whole LanguageModel."""
    folder = Path(run)
    if not directory.exists(folder):
        raise UserError(f"{folder}: not a run directory, for it has no {directory.MANIFEST}.")
    model, _ = directory.read(folder)
    tokenizer = load_tokenizer(folder / directory.TOKENIZER)
    if tokenizer.vocab_size != model.vocab_size:
        raise CheckpointError(f"{folder}: the tokenizer has {tokenizer.vocab_size} ids, the model {model.vocab_size}.")
    return model, tokenizer


@contextlib.contextmanager
def _new_run(run: str | Path) -> Iterator[Path]:
    """The locked folder of a new run; what a failure leaves is removed. ConfigError where files of a run are already."""
    folder = Path(run)
    ours = (directory.CONFIG, directory.TOKENIZER, directory.WEIGHTS, directory.CARD, TOML, OWN_STORE)
    try:
        with files.locked(folder):
            files.clean(folder, "|".join(map(re.escape, (*ours, directory.MANIFEST, f".{OWN_STORE}", SCRATCH))))
            if there := [name for name in (directory.MANIFEST, *ours) if (folder / name).exists()]:
                raise ConfigError(f"{folder} holds {', '.join(there)} already; choose another -o.")
            try:
                yield folder
            except BaseException:
                if not directory.exists(folder):
                    for name in ours:
                        files.remove(folder / name)
                raise
            finally:
                files.remove(folder / f"{SCRATCH}.tmp-{os.getpid()}")
    except OSError as error:
        raise RunError(f"{error.filename or folder}: {error.strerror or error}.") from error


def _publish(
    folder: Path, table: Table, tokenizer: Tokenizer, settings: dict[str, Any], facts: dict[str, Any],
    source: Path | None, valid: np.ndarray | None, arpa_file: str | Path | None,
) -> dict[str, Any]:  # fmt: skip
    """The facts of a model, which is measured on the valid ids and written to the folder, and perhaps to an ARPA file."""
    if arpa_file is not None:  # first, for it can fail, and a run is whole
        _write_arpa(Path(arpa_file), table, tokenizer)
    loss = None
    if valid is not None and len(valid):
        loss = mean_loss(NgramModel(table), valid, tokenizer.boundary_id)
    levels = table.trie.levels
    facts = {
        "order": table.trie.order,
        "ngrams": [int(table.known_V.sum()), *(b - a for a, b in itertools.pairwise(levels[1:]))],
        "parameters": levels[-1] + table.trie.inner,
        "loss_nats": loss,
        "loss_split": "valid",
        "ppl": None if loss is None else math.exp(min(loss, 700)),
        **facts,
    }
    if source is not None and source != folder / OWN_STORE:
        files.write_atomic(folder / TOML, f"[data]\npath = {json.dumps(str(source.resolve()))}\n")
    directory.write(folder, table, tokenizer.to_json(), settings, facts)
    return facts


def _source(run: Path) -> Path | None:
    """The text that a run was made from: its own store, or what its settings name."""
    if is_store(run / OWN_STORE):
        return run / OWN_STORE
    toml = run / TOML
    return Path(from_toml(read_text_file(toml, "configuration"), str(toml)).data.path) if toml.is_file() else None


def _check_arpa(path: str | Path | None) -> None:
    """UserError where no ARPA file could be written: told before a model is estimated."""
    if path is None:
        return
    if Path(path).is_dir():
        raise UserError(f"{path}: a folder; expected the name of an ARPA file to write.")
    if not Path(path).parent.is_dir():
        raise UserError(f"{Path(path).parent}: no such folder; make it first, or write the ARPA file elsewhere.")


def _write_arpa(path: Path, table: Table, tokenizer: Tokenizer) -> None:
    try:
        arpa.write(path, table, tokenizer)
    except OSError as error:
        raise RunError(f"{path}: the ARPA file could not be written: {error.strerror or error}.") from error


def mean_loss(model: NgramModel, ids: np.ndarray, boundary: int) -> float:
    """Nats per token over a text, the first predicted from a line's begin."""
    state, total, before = model.initial_state(1), 0.0, boundary
    for start in range(0, len(ids), SCORED):
        targets = torch.from_numpy(ids[start : start + SCORED].astype(np.int64))
        inputs = torch.cat((torch.tensor([before]), targets[:-1]))
        nll_TB, state = model.score(inputs[:, None], targets[:, None], state)
        total, before = total + float(nll_TB.sum()), int(targets[-1])
    return total / len(ids)
