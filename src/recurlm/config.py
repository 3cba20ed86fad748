"""Configuration: frozen dataclasses, strict TOML in and out, `--set section.key=value`.

Order of precedence: defaults < recipe < file < `--set`. An unknown key is an error that names the nearest one.
A recipe may go on in later stages: `[[stages]]`, each a table of sections that says what it sets otherwise.
Every field carries its help text and bounds, from which `docs/configuration.md` is generated.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from recurlm.errors import ConfigError, nearest, shown


def _opt(
    default: Any,
    text: str,
    *,
    low: float | None = None,
    high: float | None = None,
    choices: tuple[str, ...] = (),
):
    return field(default=default, metadata={"help": text, "low": low, "high": high, "choices": choices})


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    path: str = _opt("", "Text file, folder with train/valid/test, prepared store, or the name of a data set")
    batching: str = _opt(
        "stream",
        "'stream': the text as parallel streams, the state carried on; 'sentence' (a line) and 'document' (what empty "
        "lines part): each starts afresh, in batches of like length",
        choices=("stream", "sentence", "document"),
    )
    batch_size: int = _opt(32, "Parallel streams (or sentences, documents) in training", low=1, high=65536)
    eval_batch_size: int = _opt(10, "Parallel streams in validation (1 = one uninterrupted text)", low=1, high=65536)
    bptt: int = _opt(70, "Time steps of one training window (truncated back-propagation)", low=1, high=100_000)
    bptt_full_share: float = _opt(
        1.0, "stream: probability that a window's mean length is bptt, not bptt/2", low=0, high=1
    )
    bptt_spread: float = _opt(0.0, "stream: standard deviation of a window's length; 0 = fixed", low=0, high=10_000)
    bptt_step: int = _opt(
        5,
        "Random window lengths differ from their mean by multiples of this, so that few CUDA graphs serve; 1 = any length",
        low=1,
        high=100_000,
    )
    bptt_min: int = _opt(5, "Shortest random window", low=1, high=100_000)
    bptt_cap: int = _opt(0, "Longest random window; 0 = no cap", low=0, high=100_000)
    random_offset: bool = _opt(
        False,
        "stream: begin each epoch's first stream at another place of the text, so that no token always starts one",
    )
    partial_shuffle: bool = _opt(
        False, "stream: turn each stream by another amount each epoch, so that other parts of the text meet in a window"
    )
    rescale_lr: bool = _opt(True, "Multiply the learning rate by drawn length / bptt")
    counting: str = _opt(
        "exact",
        "'exact' trains on and divides by every target; 'published' drops the remainder and the last targets "
        "and divides as awd-lstm-lm did (perplexities read about 0.05 % low)",
        choices=("exact", "published"),
    )


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    kind: str = _opt("bpe", "word, char, byte, bpe or unigram")
    vocab_size: int = _opt(
        0,
        "Largest vocabulary; 0 = no limit (word, char), up to 8000 (bpe, unigram)",
        low=0,
        high=2**31 - 1,
    )
    min_count: int = _opt(1, "word, char: rarer types become unknown", low=1, high=2**31 - 1)
    vocab_splits: str = _opt(
        "train",
        "Text that the vocabulary is taken from; 'all' (with valid and test) only to compare with published numbers",
        choices=("train", "all"),
    )
    byte_fallback: bool = _opt(
        True, "char: spell unknown characters as UTF-8 bytes (exact round trip) instead of <unk>"
    )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    layer: str = _opt("lstm", "Recurrent layer: lstm, gru, qrnn or rnn")
    head: str = _opt(
        "tied",
        "Output layer: softmax, tied (the embedding matrix is the output matrix), hierarchical, adaptive, tied-adaptive or "
        "mixture",
    )
    embedding_size: int = _opt(256, "Size of a token's vector", low=1, high=65536)
    hidden_size: int = _opt(512, "Units of each layer but the last, when hidden_sizes is empty", low=1, high=65536)
    num_layers: int = _opt(2, "Layers, when hidden_sizes is empty", low=1, high=256)
    hidden_sizes: tuple[int, ...] = _opt(
        (), "Units of every layer; a tied head needs the last = embedding_size", low=1, high=65536
    )
    windows: tuple[int, ...] = _opt(
        (2,), "qrnn: inputs seen by each layer (this and earlier time steps); missing = 1", low=1, high=64
    )
    pooling: str = _opt("fo", "qrnn: gates of the recurrence (Bradbury et al. 2017)", choices=("f", "fo", "ifo"))
    nonlinearity: str = _opt("tanh", "rnn: tanh or relu", choices=("tanh", "relu"))
    zoneout: float = _opt(0.0, "Probability that a unit keeps its state for a step (lstm: its cell)", low=0, high=0.999)
    zoneout_hidden: float = _opt(0.0, "lstm: the same for its output h", low=0, high=0.999)
    backward: bool = _opt(False, "Read every text from its end to its start")
    cutoffs: tuple[int, ...] = _opt(
        (),
        "adaptive, tied-adaptive: ids at which the tail clusters begin; empty = by the frequency table and a cost model "
        "of the device; those beyond the vocabulary are left out",
        low=1,
        high=2**31 - 1,
    )
    div: float = _opt(
        4.0,
        "adaptive, adaptive_inputs: each tail cluster has rows smaller by this factor than the one before; 1 = none",
        low=1,
        high=65536,
    )
    adaptive_inputs: bool = _opt(
        False, "tied-adaptive: the input vectors of the tail clusters are smaller by model.div each, and shared"
    )
    tree: str = _opt(
        "huffman", "hierarchical: huffman (frequent words near the root) or balanced", choices=("huffman", "balanced")
    )
    code_lengths: tuple[int, ...] = _opt(
        (),
        "hierarchical: how many words have a code of 0, 1, 2, ... bits, the first ids the shortest; empty = by model.tree",
        low=0,
        high=2**31 - 1,
    )
    experts: int = _opt(10, "mixture: its softmaxes", low=1, high=1024)
    base: str = _opt("tied", "mixture: the head that each expert's vector goes through; any of the others")
    init_range: float = _opt(0.1, "Embedding and output weights start uniform in +-this", low=0, high=10)


@dataclass(frozen=True, kw_only=True)
class DropoutConfig:
    embedding: float = _opt(0.0, "Whole words dropped from the embedding (dropoute)", low=0, high=0.999)
    input: float = _opt(0.1, "Locked dropout on the first layer's input (dropouti)", low=0, high=0.999)
    hidden: float = _opt(0.2, "Locked dropout between layers (dropouth)", low=0, high=0.999)
    output: float = _opt(0.2, "Locked dropout on the last layer's output (dropout)", low=0, high=0.999)
    weight: float = _opt(
        0.2, "Weight drop: hidden-to-hidden weights, the qrnn's input weights (wdrop)", low=0, high=0.999
    )
    recurrent: float = _opt(
        0.0, "lstm, gru, rnn: variational dropout on h before the hidden-to-hidden product", low=0, high=0.999
    )
    latent: float = _opt(0.2, "mixture: locked dropout on the experts' vectors (dropoutl)", low=0, high=0.999)


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    ar: float = _opt(
        0.0,
        "Activation regularisation: times the mean square of the last layer's dropped output",
        low=0,
        high=1e6,
    )
    tar: float = _opt(0.0, "Temporal AR: times the mean square of the last layer's change per step", low=0, high=1e6)


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    name: str = _opt("adamw", "sgd, adam, amsgrad, adamw, nadam, rmsprop, adagrad or adadelta")
    lr: float = _opt(4e-3, "Learning rate", low=0, high=1e6)
    weight_decay: float = _opt(
        0.0, "L2 penalty: added to the clipped gradient (adamw: decoupled from it)", low=0, high=1e3
    )
    momentum: float = _opt(0.0, "sgd, rmsprop: momentum", low=0, high=0.9999)
    nesterov: bool = _opt(False, "sgd: Nesterov's momentum")
    betas: tuple[float, ...] = _opt(
        (0.9, 0.999), "adam, amsgrad, adamw, nadam: decay of the two moments", low=0, high=0.999999
    )
    decay: float = _opt(0.95, "rmsprop, adadelta: decay of the mean square", low=0, high=0.999999)
    eps: float = _opt(1e-8, "All but sgd: added to the denominator", low=1e-30, high=1)
    clip: float = _opt(0.25, "Largest global gradient norm; 0 = no clipping", low=0, high=1e9)
    clip_value: float = _opt(
        0.0, "Largest gradient element, cut before the norm is looked at; 0 = no clipping", low=0, high=1e9
    )


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    name: str = _opt("linear", "constant, plateau, milestones, linear, cosine, cyclic or slanted-triangular")
    factor: float = _opt(0.1, "plateau, milestones: multiply the learning rate by this", low=0, high=1)
    milestones: tuple[int, ...] = _opt((), "milestones: after these epochs", low=1, high=10**9)
    milestone_shares: tuple[float, ...] = _opt(
        (), "milestones: after these shares of the training; [0.5, 0.75] is the fixed 50-75", low=0, high=1
    )
    patience: int = _opt(
        0, "plateau: validations without a new best that are tolerated before a step", low=0, high=10**6
    )
    hold: float = _opt(
        0.0, "linear, cosine: share of the training with the full rate before it falls", low=0, high=0.999
    )
    floor: float = _opt(
        0.0,
        "linear, cosine, cyclic, slanted-triangular: lowest share of the learning rate (the last two begin there)",
        low=0,
        high=1,
    )
    cycles: int = _opt(1, "cosine, cyclic: cycles over the training", low=1, high=10**6)
    peak: float = _opt(
        0.1, "slanted-triangular: share of the training at which the rate is highest", low=1e-6, high=0.999
    )
    warmup_steps: int = _opt(50, "Steps of linear warm-up, whatever the schedule", low=0, high=10**9)


@dataclass(frozen=True, kw_only=True)
class AveragingConfig:
    name: str = _opt("none", "Weights used to validate and kept: none (the last), nt-asgd, ema, swa or tail")
    trigger: str = _opt(
        "auto",
        "When the mean starts: 'share' (at `start`), 'nonmono' (by `nonmono`); auto: nonmono for nt-asgd, else share",
        choices=("auto", "share", "nonmono"),
    )
    nonmono: int = _opt(
        5, "nonmono: start when worse than the best of all but the last n validations", low=1, high=10**6
    )
    patience: int = _opt(
        0, "nonmono: so many validations in a row before must have been worse as well", low=0, high=10**6
    )
    restart: int = _opt(
        0,
        "Start the mean afresh when its validation is worse than the best of all but the last n since it started; 0 = never",
        low=0,
        high=10**6,
    )
    start: float = _opt(0.5, "share: start at this share of the training", low=0, high=0.999)
    decay: float = _opt(0.999, "ema: share of the mean that stays at each step", low=0, high=0.9999999)
    every: int = _opt(1, "swa: steps from one averaged iterate to the next", low=1, high=10**9)
    forget: float = _opt(
        3.0, "tail: how fast the mean forgets; it looks back over about 1 / (forget + 1) of its steps", low=0, high=1e6
    )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    capture: bool = _opt(True, "GPU: run the step as CUDA graphs, with fused kernels, where that is possible")
    epochs: int = _opt(10, "Passes over the training text", low=1, high=10**6)
    max_steps: int = _opt(0, "Stop after this many updates; 0 = no limit", low=0, high=10**12)
    seed: int = _opt(1111, "Seed of weights, dropout and window lengths", low=0, high=2**63 - 1)
    device: str = _opt("auto", "auto, cpu, cuda or cuda:N")
    dtype: str = _opt("auto", "Compute type; weights stay fp32", choices=("auto", "fp32", "tf32", "bf16"))
    eval_every: int = _opt(0, "Validate every N steps; 0 = at the end of each epoch", low=0, high=10**12)
    patience: int = _opt(0, "Stop early after this many validations without a new best; 0 = never", low=0, high=10**6)
    stop_nonmono: int = _opt(
        0, "Stop early when worse than the best of all but the last n validations; 0 = never", low=0, high=10**6
    )
    stages: int = _opt(0, "Run only so many stages of the recipe; 0 = all", low=0, high=16)
    checkpoint_every: int = _opt(0, "Save every N steps besides the timed saves; 0 = only timed", low=0, high=10**12)
    checkpoint_seconds: float = _opt(
        60.0, "Save a checkpoint when this long has passed since the last one", low=0, high=1e9
    )
    keep_checkpoints: int = _opt(2, "Newest checkpoints that are kept", low=2, high=10**6)
    log_every: int = _opt(50, "Steps between lines of metrics.jsonl", low=1, high=10**9)
    sample_every: int = _opt(0, "Generate a sample text every N steps; 0 = never", low=0, high=10**12)
    sample_prompt: str = _opt("", "Prompt of the sample text")
    tensorboard: bool = _opt(True, "Write TensorBoard events to RUN/tensorboard")


@dataclass(frozen=True, kw_only=True)
class PublishedConfig:
    valid: float = _opt(0.0, "Published figure on valid; 0 = none", low=0, high=1e9)
    test: float = _opt(0.0, "Published figure on test; 0 = none", low=0, high=1e9)
    unit: str = _opt("ppl", "What these figures are: perplexity a token, or bits a character", choices=("ppl", "bpc"))
    text: str = _opt("", "Data set that they are of, by name: on another text they are left out; '' = any")
    source: str = _opt("", "Where they were published")


@dataclass(frozen=True, kw_only=True)
class Config:
    """One run's settings, by section."""

    data: DataConfig = DataConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    model: ModelConfig = ModelConfig()
    dropout: DropoutConfig = DropoutConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    averaging: AveragingConfig = AveragingConfig()
    train: TrainConfig = TrainConfig()
    published: PublishedConfig = PublishedConfig()
    stages: tuple[Mapping[str, Mapping[str, Any]], ...] = ()
    """What each stage after the first sets otherwise: settings by section; see `stage`."""


SECTIONS: dict[str, type] = {f.name: type(f.default) for f in dataclasses.fields(Config) if f.name != "stages"}


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """The neural cache of an evaluation; see `inference.neural_cache`."""

    window: int = _opt(500, "Positions that it remembers", low=1, high=1_000_000)
    theta: float = _opt(1.0, "How sharply it attends to like contexts", low=0, high=1000)
    lambda_: float = _opt(0.1, "Its weight beside the model", low=0, high=1)
    rule: str = _opt(
        "exact",
        "'exact' from the first token on; 'published' as awd-lstm-lm: only with a full window, never for the first token of "
        "a chunk",
        choices=("exact", "published"),
    )
    chunk: int = _opt(5000, "published: tokens of a chunk, --bptt there", low=1, high=10**9)


@dataclass(frozen=True, kw_only=True)
class DynamicConfig:
    """Dynamic evaluation; see `inference.dynamic`."""

    rule: str = _opt(
        "rms", "'rms': gradients over their RMS on the training text; 'sgd': plain", choices=("rms", "sgd")
    )
    lr: float = _opt(5e-5, "Learning rate", low=0, high=1e6)
    decay: float = _opt(2e-3, "Pull towards the trained weights", low=0, high=1)
    eps: float = _opt(2e-5, "rms: added to the RMS", low=1e-30, high=1e6)
    segment: int = _opt(5, "Tokens between updates", low=1, high=100_000)
    batch: int = _opt(100, "rms: streams of the training text in its statistics", low=1, high=65536)
    batches: int = _opt(0, "rms: most minibatches of the statistics; 0 = the whole training text", low=0, high=10**12)
    tune_tokens: int = _opt(0, "Tokens of the --tune-on split that decide; 0 = all", low=0, high=10**12)


DYNAMIC = {"rms": DynamicConfig(), "sgd": DynamicConfig(rule="sgd", lr=0.1, decay=0.0)}
"""The defaults of dynamic evaluation, by rule."""


MAX_LIST = 256
MAX_STAGES = 15
# A stage goes on with the weights of the one before, on the same text and device.
SAME_IN_ALL_STAGES = {
    "tokenizer": None, "model": None, "data": ("path",),
    "train": ("stages", "device", "dtype", "tensorboard", "keep_checkpoints"),
}  # fmt: skip


def _check(kind: Any, value: Any, meta: Mapping[str, Any], name: str) -> Any:
    """The value as its field's type; ConfigError with the expected type, bounds or choices otherwise."""
    if get_origin(kind) is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{name} = {shown(value)}: expected a list, such as [1, 2].")
        if len(value) > MAX_LIST:
            raise ConfigError(f"{name}: found a list of {len(value):,} values, expected at most {MAX_LIST}.")
        return tuple(_check(get_args(kind)[0], v, meta, f"{name}[{i}]") for i, v in enumerate(value))
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            value = float(value)
        except OverflowError:
            raise ConfigError(f"{name}: the number is too large.") from None
    if type(value) is not kind:
        raise ConfigError(
            f"{name} = {shown(value)}: expected {_TYPES[kind]}, found {_TYPES.get(type(value), 'no such')}."
        )
    if kind is float and not math.isfinite(value):
        raise ConfigError(f"{name} = {value}: expected a finite number.")
    low, high = meta["low"], meta["high"]
    if kind in (int, float) and ((low is not None and value < low) or (high is not None and value > high)):
        raise ConfigError(f"{name} = {shown(value)}: expected a value from {_bound(low)} to {_bound(high)}.")
    if isinstance(value, str) and not _is_utf8(value):
        raise ConfigError(f"{name} = {shown(value)}: holds something that is no character in UTF-8.")
    if meta["choices"] and value not in meta["choices"]:
        raise ConfigError(f"{name} = {shown(value)} is not known.{nearest(value, meta['choices'])}")
    return value


_TYPES = {
    int: "a whole number", float: "a number", str: "a text", bool: "true or false", list: "a list", dict: "a table",
}  # fmt: skip


def _bound(value: float | None) -> str:
    if value is None:
        return "any"
    return f"{int(value):,}" if value == int(value) else f"{value:g}"


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    """The types of a section's fields."""
    return get_type_hints(cls)


def section_from_dict(section: str, values: Any, base: Any = None) -> Any:
    """A section's dataclass: `values` over `base` (or the defaults). ConfigError for unknown keys and bad values."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"[{section}] must be a table of settings, found {type(values).__name__}.")
    return _with(base if base is not None else SECTIONS[section](), values, f"[{section}]", f"{section}.")


def _with(base: Any, values: Mapping[str, Any], place: str, prefix: str) -> Any:
    """The dataclass `base` with `values`, each checked; a field that ends in _ is named without it."""
    hints = _hints(type(base))
    fields = {f.name.rstrip("_"): f for f in dataclasses.fields(base)}
    clean: dict[str, Any] = {}
    for key, value in values.items():
        if key not in fields:
            raise ConfigError(f"{place} has no setting {shown(key)}.{nearest(key, fields)}")
        field = fields[key]
        clean[field.name] = _check(hints[field.name], value, field.metadata, prefix + key)
    return dataclasses.replace(base, **clean)


def cache_config(values: Mapping[str, Any]) -> CacheConfig:
    """The neural cache of the settings {name: value}; ConfigError for unknown names and bad values."""
    return _with(CacheConfig(), values, "cache", "cache ")


def dynamic_config(values: Mapping[str, Any]) -> DynamicConfig:
    """Dynamic evaluation by the settings {name: value} over its rule's; ConfigError for unknown names and bad values."""
    rule = _with(DynamicConfig(), {k: v for k, v in values.items() if k == "rule"}, "dynamic", "dynamic ").rule
    return _with(DYNAMIC[rule], values, "dynamic", "dynamic ")


def settings_of(config: Any) -> dict[str, Any]:
    """{name: value} of a CacheConfig or DynamicConfig, as it takes them."""
    return {name.rstrip("_"): value for name, value in dataclasses.asdict(config).items()}


def parse_options(option: str, text: str) -> dict[str, Any]:
    """{key: value} of `key=value,key=value`; the values are TOML, or bare strings. ConfigError naming the option."""
    out: dict[str, Any] = {}
    for part in text.split(","):
        key, equals, raw = (piece.strip() for piece in part.partition("="))
        if not equals or not key or not raw:
            raise ConfigError(f"{option} {shown(text)}: expected key=value,key=value, found {shown(part)}.")
        if key in out:
            raise ConfigError(f"{option} {shown(text)}: {shown(key)} is given twice.")
        out[key] = _value(raw)
    return out


def from_dict(values: Mapping[str, Any], base: Config | None = None) -> Config:
    """A Config: `values` (nested by section) over `base` (or the defaults)."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"Expected a table of sections, found {type(values).__name__}.")
    base = base or Config()
    clean: dict[str, Any] = {}
    for section, table in values.items():
        if section == "stages":
            clean[section] = _stages(table)
            continue
        if section not in SECTIONS:
            raise ConfigError(f"There is no section [{shown(section)[1:-1]}].{nearest(section, SECTIONS)}")
        clean[section] = section_from_dict(section, table, getattr(base, section))
    return dataclasses.replace(base, **clean)


def _stages(tables: Any) -> tuple[dict[str, dict[str, Any]], ...]:
    """The tables of later stages, every value checked and as plain as `to_dict` gives it; ConfigError otherwise."""
    if not isinstance(tables, list | tuple) or len(tables) > MAX_STAGES:
        raise ConfigError(f"stages: expected at most {MAX_STAGES} tables, each under [[stages]].")
    out = []
    for number, table in enumerate(tables, 2):
        try:
            if isinstance(table, Mapping) and "stages" in table:
                raise ConfigError("a stage has no stages of its own.")
            checked = to_dict(from_dict(table))
            for section, settings in table.items():
                kept = SAME_IN_ALL_STAGES.get(section, ())
                if found := [key for key in settings if kept is None or key in kept]:
                    raise ConfigError(f"{section}.{found[0]} is the same in all stages; set it for the whole run.")
        except ConfigError as error:
            raise ConfigError(f"Stage {number}: {error}") from None
        out.append({section: {key: checked[section][key] for key in keys} for section, keys in table.items()})
    return tuple(out)


def stage(config: Config, number: int) -> Config:
    """The settings of one stage: number 0 is the first, and the later ones are `config.stages` over its settings."""
    own = dataclasses.replace(config, stages=())
    return from_dict(config.stages[number - 1], own) if number else own


def stage_count(config: Config) -> int:
    """How many stages the run has."""
    there, wanted = 1 + len(config.stages), config.train.stages
    if wanted > there:
        raise ConfigError(f"train.stages = {wanted}: expected 0 (all) to {there}, the number of stages that there are.")
    return wanted or there


def to_dict(config: Config) -> dict[str, Any]:
    """The Config as nested plain values (tuples become lists)."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def to_toml(config: Config) -> str:
    """The Config as TOML text that `from_toml` reads back to an equal Config."""
    values = to_dict(config)
    stages, lines = values.pop("stages"), _toml_tables(values)
    for table in stages:
        lines += ["[[stages]]", *_toml_tables(table, "stages.")]
    return "\n".join(lines)


def _toml_tables(tables: Mapping[str, Any], prefix: str = "") -> list[str]:
    lines: list[str] = []
    for section, table in tables.items():
        lines.append(f"[{prefix}{section}]")
        # JSON's strings, numbers, booleans and lists are TOML as well (DEL must be escaped in both readings).
        lines += [
            f"{key} = {json.dumps(value, ensure_ascii=False)}".replace("\x7f", "\\u007f")
            for key, value in table.items()
        ]
        lines.append("")
    return lines


def from_toml(text: str, source: str, base: Config | None = None) -> Config:
    """A Config from TOML text over `base`; `source` names the text in errors."""
    try:
        values = tomllib.loads(text)
        return from_dict(values, base)
    except ValueError as error:  # a number of thousands of digits is none that tomllib names itself
        raise ConfigError(f"{source}: not valid TOML: {error}.") from None
    except RecursionError:
        raise ConfigError(f"{source}: not valid TOML: nested too deeply.") from None
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None


MAX_TEXT = 1 << 20


def read_text_file(path: Path, what: str) -> str:
    """The file's text; ConfigError in one sentence when it cannot be read."""
    try:
        if not path.is_file() and path.exists():
            raise ConfigError(f"{path}: cannot read this {what}: not a regular file.")
        if path.stat().st_size > MAX_TEXT:
            raise ConfigError(f"{path}: this {what} is longer than {MAX_TEXT:,} bytes.")
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: this {what} is not UTF-8 text.") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot read this {what}: {error.strerror}.") from None
    except ValueError as error:
        raise ConfigError(f"{str(path)!r}: cannot read this {what}: {error}.") from None


def recipe_names() -> list[str]:
    """The names of the recipes that come with recurlm."""
    folder = resources.files("recurlm") / "recipes"
    return sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))


def load_recipe(name: str, base: Config | None = None) -> Config:
    """The Config of a recipe that comes with recurlm, or of a .toml file at that path."""
    if name.endswith(".toml"):
        return from_toml(read_text_file(Path(name), "configuration"), name, base)
    if name not in recipe_names():
        there = False
        with contextlib.suppress(OSError, ValueError):  # a name too long for one, or with a NUL
            there = Path(name).exists()
        if there:
            raise ConfigError(
                f"{name} is no recipe and no .toml file; if it is the text to learn from, give it by --data."
            )
        raise ConfigError(
            f"There is no recipe {shown(name)}; settings of your own go into a file that ends with .toml."
            f"{nearest(name, recipe_names())}"
        )
    text = (resources.files("recurlm") / "recipes" / f"{name}.toml").read_text(encoding="utf-8")
    return from_toml(text, f"recipe {name}", base)


def parse_assignment(text: str) -> tuple[str, str, Any]:
    """(section, key, value) of one `section.key=value`; the value is TOML, or a bare string."""
    name, equals, raw = text.partition("=")
    section, dot, key = name.strip().partition(".")
    if not equals or not dot:
        raise ConfigError(f"--set {shown(text)}: expected section.key=value, such as optimizer.lr=30.")
    return section, key, _value(raw)


def _value(raw: str) -> Any:
    """The TOML value, or the text itself where it is none."""
    try:
        parsed = tomllib.loads(f"value = {raw}")
        return parsed["value"] if len(parsed) == 1 else raw
    except (ValueError, RecursionError):
        return raw.strip()


def apply_assignments(config: Config, assignments: Iterable[str]) -> Config:
    """The Config with every `section.key=value` applied in order.

    Published figures are of a model and its tokens: where [model] or [tokenizer] changes, they go, unless they are set too.
    """
    given = config
    for text in assignments:
        section, key, value = parse_assignment(text)
        if section == "model" and key in ("hidden_size", "num_layers") and (sizes := config.model.hidden_sizes):
            raise ConfigError(
                f"--set {shown(text)} has no effect, for model.hidden_sizes is {list(sizes)}: set that, one number a layer."
            )
        of_stage = section == "stages"
        config = _assign_to_stage(config, text, key, value) if of_stage else from_dict({section: {key: value}}, config)
    if config.published != given.published or (config.model, config.tokenizer) == (given.model, given.tokenizer):
        return config
    return without_published(config, given.tokenizer)


def without_published(config: Config, tokens: TokenizerConfig) -> Config:
    """The Config without published figures; their unit stays where its tokens are still `tokens`."""
    kept = PublishedConfig(unit=config.published.unit) if config.tokenizer == tokens else PublishedConfig()
    stages = tuple({name: t for name, t in tables.items() if name != "published"} for tables in config.stages)
    return dataclasses.replace(config, published=kept, stages=stages)


def _assign_to_stage(config: Config, text: str, key: str, value: Any) -> Config:
    """The Config with one setting of a later stage changed: `stages.2.train.epochs=9` is the second stage's."""
    number, *path = key.split(".")
    numbers = [str(n) for n in range(2, 2 + len(config.stages))]
    if len(path) != 2 or number not in numbers:
        there = f"from {numbers[0]} to {numbers[-1]}" if numbers else "but this run has one stage"
        raise ConfigError(
            f"--set {shown(text)}: expected stages.NUMBER.section.key=value, such as stages.2.train.epochs=9, "
            f"NUMBER {there}."
        )
    tables = [{section: dict(table) for section, table in stage.items()} for stage in config.stages]
    tables[int(number) - 2].setdefault(path[0], {})[path[1]] = value
    return from_dict({"stages": tables}, config)


def configure(recipe: str = "", *settings: str) -> Config:
    """A Config: the defaults, or a recipe (by name, or a .toml file), with `section.key=value` settings applied."""
    return apply_assignments(load_recipe(recipe) if recipe else Config(), settings)


def reference_markdown() -> str:
    """The settings as Markdown tables: the content of docs/configuration.md."""
    out = [
        "# Settings",
        "",
        "Generated from `src/recurlm/config.py` by `python -m recurlm.config`; do not edit.",
        "",
    ]
    out += ["Order: defaults < recipe < file < `--set section.key=value`.", ""]
    out += [
        "A recipe may go on in later stages, each from the best weights so far: `[[stages]]` and below it, as",
        "`[stages.optimizer]` and so on, what the stage sets otherwise than the sections above. "
        "`--set stages.2.train.epochs=9` is",
        "a setting of the second stage, `--stages 1` leaves out all but the first.",
        "",
    ]
    for section, cls in SECTIONS.items():
        out += [f"## [{section}]", "", "| setting | default | meaning |", "|---|---|---|"]
        for f in dataclasses.fields(cls):
            default = json.dumps(f.default)
            out.append(f"| `{f.name}` | `{default}` | {f.metadata['help']} |")
        out.append("")
    return "\n".join(out)


if __name__ == "__main__":
    print(reference_markdown(), end="")
