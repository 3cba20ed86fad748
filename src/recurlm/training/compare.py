"""Runs side by side: what they recorded, as rows and as a page. Finished or not, neural or n-gram; no model is loaded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from recurlm import files
from recurlm.config import Config, from_toml, read_text_file, stage, stage_count
from recurlm.errors import CheckpointError, DataError, UserError
from recurlm.evaluation.page import Cell, Chart, Section, Series, Table, page
from recurlm.model import directory
from recurlm.model.neural import layer_sizes
from recurlm.text.tokenizers import load_tokenizer
from recurlm.training.monitor import METRICS, read_metrics

HEADER = ("run", "model", "text", "parameters", "unit", "valid", "published valid", "test", "published test", "epochs",
          "minutes", "state", "seed", "device", "type", "commit")  # fmt: skip

TOKENS = {"word": "word", "char": "character", "byte": "byte", "bpe": "piece", "unigram": "piece"}
SAYS = (
    "Best validation of each run; test as recurlm eval measured it with these weights. Perplexities of different tokens "
    "cannot be compared: see the column unit."
)


@final
@dataclass(frozen=True)
class Run:
    """One run as its files tell it: the cells of HEADER, and its validations."""

    name: str
    cells: tuple[Cell, ...]
    epochs: tuple[float, ...]
    minutes: tuple[float, ...]
    values: tuple[float, ...]
    published: float


def read(folder: Path, name: str) -> Run:
    """The Run of a folder; UserError when it is none, CheckpointError or ConfigError naming a file that is damaged."""
    toml, manifest = folder / "config.toml", {}
    if directory.exists(folder):
        manifest = files.read_manifest(folder / directory.MANIFEST, directory.FORMAT)
    elif not (toml.is_file() and (folder / METRICS).is_file()):
        raise UserError(
            f"{folder}: not a run directory; expected one as `recurlm train` or `recurlm ngram train` makes it."
        )
    config = from_toml(read_text_file(toml, "configuration"), str(toml)) if toml.is_file() else Config()
    facts = manifest.get("facts", {})
    if not isinstance(facts, dict):
        raise CheckpointError(f"{folder / directory.MANIFEST}: its facts are no table.")
    neural = manifest.get("kind", "neural") == "neural"
    last = stage(config, stage_count(config) - 1)
    bits, published = last.published.unit == "bpc", last.published

    def figure(loss: Any) -> float | None:
        if not _number(loss):
            return None
        return loss / math.log(2) if bits else math.exp(min(loss, 700))

    records = [r for r in read_metrics(folder) if _number(r.get("loss_nats")) and _number(r.get("seconds"))]
    records = [r for r in records if r["event"] == "valid" and type(r.get("epoch")) is int]
    started = [r for r in read_metrics(folder) if r["event"] == "start"]
    start = started[-1] if started else {}
    best = min(
        [r["loss_nats"] for r in records] + [loss for loss in [facts.get("loss_nats")] if _number(loss)], default=None
    )
    sizes = ", ".join(map(str, layer_sizes(config.model)))
    if neural:
        model = f"{config.model.layer} {sizes}"
        state = "finished" if records and records[-1].get("done") is True else "not finished"
        place = (
            f"stage {records[-1]['stage']}, " if stage_count(config) > 1 and records and "stage" in records[-1] else ""
        )
    else:
        model, state, place = f"{facts.get('order', '?')}-gram", "finished", ""
    cells = (
        name, model, Path(config.data.path).name, _whole(facts.get("parameters", start.get("parameters"))),
        "bits a character" if bits else f"perplexity a {_token(folder, config)}", figure(best), published.valid or None,
        figure(_tested(folder, facts.get("step"))),
        published.test or None, records[-1]["epoch"] if records else None,
        records[-1]["seconds"] / 60 if records else None, place + state, config.train.seed if neural else None,
        _text(start.get("device")), _text(start.get("dtype")), _text(start.get("commit"))[:12],
    )  # fmt: skip
    return Run(
        name, cells, tuple(_places(records)), tuple(r["seconds"] / 60 for r in records),
        tuple(figure(r["loss_nats"]) or math.nan for r in records), published.valid,
    )  # fmt: skip


def _places(records: Sequence[dict[str, Any]]) -> list[float]:
    """Where each validation was, in epochs: several within an epoch are spread over it."""
    counts: dict[int, int] = {}
    for r in records:
        counts[r["epoch"]] = counts.get(r["epoch"], 0) + 1
    seen: dict[int, int] = {}
    out = []
    for r in records:
        seen[r["epoch"]] = seen.get(r["epoch"], 0) + 1
        out.append(r["epoch"] - 1 + seen[r["epoch"]] / counts[r["epoch"]])
    return out


def _token(folder: Path, config: Config) -> str:
    """What a token of the run is, and out of how many where its tokenizer can be read."""
    try:
        tokenizer = load_tokenizer(folder / directory.TOKENIZER)
    except (UserError, DataError):
        return TOKENS.get(config.tokenizer.kind, "token")
    return f"{TOKENS[tokenizer.kind]} of {tokenizer.vocab_size:,}"


def _tested(folder: Path, step: Any) -> Any:
    """The loss that `recurlm eval` kept of the test split; None when it kept none, or that of other weights than `step`'s."""
    try:
        kept = files.parse_json(files.read_regular(folder / "eval.json", 1 << 20))
    except (OSError, ValueError):
        return None
    if not isinstance(kept, dict) or kept.get("split") != "test" or kept.get("step", step) != step:
        return None
    return kept.get("loss_nats")


def _number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _whole(value: Any) -> int | None:
    return value if type(value) is int else None


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def table(runs: Sequence[Run]) -> Table:
    """The runs as rows; columns in which no run has anything are left out."""
    kept = [n for n in range(len(HEADER)) if any(run.cells[n] not in (None, "") for run in runs)]
    return Table([HEADER[n] for n in kept], [[run.cells[n] for n in kept] for run in runs])


def html(runs: Sequence[Run]) -> str:
    """The page: the table, and the validations by epoch and by minute."""
    curves = [run for run in runs if run.values]
    sections = [Section("runs", "The runs", SAYS, tables=[table(runs)])]
    for axis, unit in (("epochs", "epoch"), ("minutes", "minute")):
        charts = []
        for what in sorted({str(run.cells[HEADER.index("unit")]) for run in curves}):
            some = [(n, run) for n, run in enumerate(runs) if run in curves and run.cells[HEADER.index("unit")] == what]
            lines = [
                Series(run.name, run.epochs if axis == "epochs" else run.minutes, run.values, n, n >= 6)
                for n, run in some
            ]
            published = sorted({run.published for _, run in some if run.published})
            charts.append(Chart(axis, f"valid {what}", lines, log_y=what.startswith("perplexity"), levels=published))
        if charts:
            says = f"Validation by {unit}, training time alone. A grey line is a published figure."
            sections.append(Section(axis, f"By {unit}", says, charts))
    return page("Runs side by side", f"{len(runs)} runs, from the files that they left.", sections)
