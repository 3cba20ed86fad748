"""Files that are damaged, missing or of something else: refused by name, never loaded with another content."""

import contextlib
import gzip
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from recurlm import api, files
from recurlm.cli.train import build_config
from recurlm.cli.use import eval_
from recurlm.config import apply_assignments
from recurlm.errors import CheckpointError, UserError
from recurlm.text.store import open_store, prepare
from recurlm.training import checkpoint
from recurlm.training.monitor import read_metrics
from support import counts, record, small_text, tiny_config

pytestmark = pytest.mark.chaos

LIMIT_SECONDS = 5
LAST = Path("checkpoints", "step-12")


class Runs(NamedTuple):
    """Two finished runs of one text, with the same settings but for the seed; and the text."""

    one: Path
    other: Path
    text: Path


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("damage")
    text = folder / "small.txt.gz"
    text.write_bytes(gzip.compress(small_text(200).encode(), mtime=0))
    for name in ("one", "other"):
        settings = ("train.max_steps=12", "train.checkpoint_every=4", "train.epochs=1", "tokenizer.kind=char")
        config = apply_assignments(tiny_config(*settings), [f'data.path="{text}"', f"train.seed={len(name)}"])
        api.train(config, folder / name, quiet=True)
        files.write_atomic(folder / name / "eval.json", files.to_json(api.evaluate(folder / name)))
    return Runs(folder / "one", folder / "other", text)


@contextlib.contextmanager
def no_hang() -> Iterator[None]:
    """Fails when the block takes more than LIMIT_SECONDS."""

    def fail(number: int, frame: object) -> None:
        raise TimeoutError(f"no answer after {LIMIT_SECONDS} s")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(LIMIT_SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


# ---- what can happen to a file --------------------------------------------------------------------------------


def truncate(data: bytes, draw: random.Random) -> bytes:
    return data[: draw.randrange(len(data))]


def flip_bit(data: bytes, draw: random.Random) -> bytes:
    return flip_bits(data, draw, 1)


def flip_bits(data: bytes, draw: random.Random, number: int = 0) -> bytes:
    out = bytearray(data)
    for _ in range(number or draw.randrange(2, 20)):
        out[draw.randrange(len(out))] ^= 1 << draw.randrange(8)
    return bytes(out)


def zero_range(data: bytes, draw: random.Random) -> bytes:
    start = draw.randrange(len(data))
    length = min(draw.randrange(1, 600), len(data) - start)
    return data[:start] + bytes(length) + data[start + length :]


def duplicate_block(data: bytes, draw: random.Random) -> bytes:
    start = draw.randrange(1, len(data))
    length = draw.randrange(1, 600)
    return data[: start + length] + data[start : start + length] + data[start + length :]


def append(data: bytes, draw: random.Random) -> bytes:
    return data + draw.randbytes(draw.randrange(1, 100))


def empty(data: bytes, draw: random.Random) -> bytes:
    return b""


CHANGES: list[Callable[[bytes, random.Random], bytes]] = [
    truncate, flip_bit, flip_bits, zero_range, duplicate_block, append, empty,
]  # fmt: skip
REPLACEMENTS = ["missing", "directory", "link out", "dangling link", "link loop", "fifo", "other run's"]


def damage(path: Path, kind: Any, draw: random.Random, other: Path) -> None:
    """Does that to the file; `other` is the same file of the other run."""
    data = path.read_bytes()
    path.unlink()
    if callable(kind):
        path.write_bytes(kind(data, draw))
    elif kind == "directory":
        path.mkdir()
    elif kind == "link out":
        outside = path.parent.parent / f"moved-{path.name}"
        outside.write_bytes(data)
        path.symlink_to(outside)
    elif kind == "dangling link":
        path.symlink_to(path.with_name("nothing-here"))
    elif kind == "link loop":
        path.symlink_to(path)
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "other run's":
        shutil.copyfile(other, path)


# ---- what is asked of each file -------------------------------------------------------------------------------


def same_tensors(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)


def load_model(run: Path, runs: Runs) -> None:
    found, good = api.load(run), api.load(runs.one)
    assert same_tensors(dict(found.model.named_parameters()), dict(good.model.named_parameters()))  # type: ignore[attr-defined]
    assert (found.tokenizer.to_json(), found.facts) == (good.tokenizer.to_json(), good.facts)


def load_checkpoint(run: Path, runs: Runs) -> None:
    saved, skipped = checkpoint.newest(run / "checkpoints")
    good = checkpoint.load(runs.one / "checkpoints" / ("step-8" if skipped else "step-12"))
    assert saved is not None
    assert (saved.step, saved.values) == (good.step, good.values) and same_tensors(saved.tensors, good.tensors)
    found = checkpoint.load(run / LAST)  # raises with the reason that `newest` gave
    assert not skipped and same_tensors(found.tensors, good.tensors)


def read_store(run: Path, runs: Runs) -> None:
    store = open_store(run / "store")
    store.verify()
    good = open_store(runs.one / "store")
    assert (store.hash, store.info) == (good.hash, good.info)
    assert all((store.ids(split) == good.ids(split)).all() for split in good.splits)


def resume(run: Path, runs: Runs) -> None:
    """A run goes on; settings that differ from its checkpoint's are refused or named."""
    config = build_config("", run, True, [], {})
    trainer = api._trainer(config, run, True, True)
    before = build_config("", runs.one, True, [], {})
    named = any("Settings that differ" in note for note in trainer.notes)
    assert named == (config != before)
    assert trainer.cursor.step == 12
    good = checkpoint.load(runs.one / LAST)
    assert same_tensors(
        {f"model.{name}": p for name, p in trainer.model.named_parameters()},
        {name: t for name, t in good.tensors.items() if name.startswith("model.")},
    )


def go_on(run: Path, runs: Runs) -> None:
    """Metrics are for people: what is no record is dropped, and nothing stops training."""
    api.train(build_config("", run, True, ["train.max_steps=14"], {}), run, resume=True, quiet=True)
    assert [r["step"] for r in read_metrics(run) if r["event"] == "step"][-2:] == [13, 14]


def measure(run: Path, runs: Runs) -> None:
    eval_(run, device="cpu", ranks=False)
    load_model(run, runs)


def read_text(run: Path, runs: Runs) -> None:
    store = prepare(run / runs.text.name, tiny_config("tokenizer.kind=char").tokenizer, run / "again")
    assert store.hash == open_store(runs.one / "store").hash


TARGETS: dict[str, Callable[[Path, Runs], None]] = {
    "model.safetensors": load_model,
    "config.json": load_model,
    "tokenizer.json": load_model,
    "manifest.json": load_model,
    f"{LAST}/tensors.safetensors": load_checkpoint,
    f"{LAST}/manifest.json": load_checkpoint,
    "store/train.bin": read_store,
    "store/store.json": read_store,
    "store/tokenizer.json": read_store,
    "config.toml": resume,
    "metrics.jsonl": go_on,
    "eval.json": measure,
    "small.txt.gz": read_text,
}


def ask(target: str, run: Path, runs: Runs) -> str:
    """ "" when the file was accepted with its content, the sentence that refused it otherwise."""
    try:
        with no_hang():
            TARGETS[target](run, runs)
    except UserError as error:
        return str(error)
    return ""


def damaged_copy(runs: Runs, folder: Path, target: str, kind: Any, seed: str) -> Path:
    run = Path(shutil.copytree(runs.one, folder))
    shutil.copyfile(runs.text, run / runs.text.name)
    other = runs.other / target
    damage(run / target, kind, random.Random(seed), other if other.exists() else runs.one / "README.md")
    return run


def test_damage_is_refused_by_name_or_does_not_matter(runs, tmp_path, capsys):
    kinds = [*CHANGES, *REPLACEMENTS]
    number, refused = counts(200, 1000), 0
    for i in range(number):
        target = list(TARGETS)[i % len(TARGETS)]
        kind = kinds[i // len(TARGETS) % len(kinds)]
        run = damaged_copy(runs, tmp_path / "runs" / "copy", target, kind, f"{i}")
        sentence = ask(target, run, runs)
        what = f"{i}: {target}, {kind if isinstance(kind, str) else kind.__name__}: {sentence}"
        if sentence:
            refused += 1
            # A file of the other run may be in order in itself: then the one that it does not fit is named.
            names = [Path(target).name] if kind != "other run's" else [Path(name).name for name in TARGETS]
            assert any(name in sentence for name in names) or (
                target == "config.toml" and "was started with" in sentence
            ), what
            assert "\n" not in sentence and sentence.endswith("."), what
        else:
            harmless = ("config.toml", "metrics.jsonl", "eval.json", "small.txt.gz")
            assert target in harmless or runs_equal(run, runs, target), what
        shutil.rmtree(tmp_path / "runs")
    assert "Traceback" not in capsys.readouterr().err
    record("damage", variants=number, refused=refused, accepted=number - refused)


def runs_equal(run: Path, runs: Runs, target: str) -> bool:
    """Whether the file holds what it held: a block of zeros may have been zeros before."""
    return (run / target).read_bytes() == (runs.one / target).read_bytes()


def test_exit_codes_of_damage(runs, tmp_path):
    """The same through the command line: no signal, one sentence, exit code 2 or 3."""
    verbs = {"model.safetensors": "eval", "tokenizer.json": "score", "manifest.json": "generate", "store/train.bin": "eval",
             f"{LAST}/tensors.safetensors": "train", "config.toml": "train", "metrics.jsonl": "train"}  # fmt: skip
    kinds = ["fifo", flip_bit, "directory", truncate, zero_range]
    for i in range(counts(5, 20)):
        target, kind = list(verbs)[i % len(verbs)], kinds[i % len(kinds)]
        run = damaged_copy(runs, tmp_path / f"copy-{i}", target, kind, f"exit {i}")
        arguments = ["train", "-o", run, "--resume", "auto"] if verbs[target] == "train" else [verbs[target], run]
        command = [sys.executable, "-m", "recurlm", *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)
        assert done.returncode in ((0, 2, 3) if verbs[target] == "train" else (2, 3)), done.stderr
        assert "Traceback" not in done.stderr
        if done.returncode:
            assert done.stderr.startswith("recurlm: ") and done.stderr.count("\n") == 1 and not done.stdout


# ---- mixtures -------------------------------------------------------------------------------------------------

SETS = {
    "model": ["manifest.json", "config.json", "model.safetensors", "tokenizer.json"],
    "store": ["store/store.json", "store/train.bin", "store/valid.bin", "store/test.bin", "store/tokenizer.json"],
    "checkpoint": [f"{LAST}/manifest.json", f"{LAST}/tensors.safetensors"],
}


@pytest.fixture(scope="module")
def sources(runs, tmp_path_factory) -> list[Path]:
    """Folders with complete sets: two runs of the same text, one of another text, an older checkpoint as if newest."""
    folder = tmp_path_factory.mktemp("sources")
    (folder / "text.txt").write_text(small_text(150, seed=9).upper())
    config = apply_assignments(
        tiny_config("train.max_steps=12", "train.checkpoint_every=4", "tokenizer.kind=char", "model.hidden_size=15"),
        [f'data.path="{folder / "text.txt"}"'],
    )
    api.train(config, folder / "third", quiet=True)
    older = Path(shutil.copytree(runs.one, folder / "older"))
    shutil.rmtree(older / LAST)
    (older / "checkpoints" / "step-8").rename(older / LAST)
    return [runs.one, runs.other, folder / "third", older]


def test_mixtures_of_two_runs_are_refused(runs, sources, tmp_path):
    """The first file of a set lists the others: what is accepted is exactly the set that it lists."""
    number, refused, draw = counts(60, 200), 0, random.Random(5)
    for i in range(number):
        kind = list(SETS)[i % len(SETS)]
        run = Path(shutil.copytree(runs.one, tmp_path / "copy"))
        chosen = {name: draw.choice(sources) for name in SETS[kind]}
        for name, source in chosen.items():
            shutil.copyfile(source / name, run / name)
        first = chosen[SETS[kind][0]]
        fits = all((run / name).read_bytes() == (first / name).read_bytes() for name in chosen)
        if kind == "checkpoint" and first == sources[3]:
            fits = False  # an older one under a newer name
        try:
            load = {"model": api.load, "store": lambda p: open_store(p / "store").verify(), "checkpoint": newest_only}[
                kind
            ]
            load(run)
            assert fits, chosen
        except UserError as error:
            assert not fits, error
            assert any(Path(name).name in str(error) for name in chosen) or "step-12" in str(error)
            refused += 1
        shutil.rmtree(run)
    assert refused > number // 3
    record("mixtures", mixtures=number, refused=refused)


def newest_only(run: Path) -> None:
    saved, skipped = checkpoint.newest(run / "checkpoints")
    if skipped:
        assert saved is not None and saved.step == 8
        raise CheckpointError(skipped[0])
