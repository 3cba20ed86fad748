"""Every piece of state that a checkpoint holds matters: left out, the resumed run differs from the unbroken one."""

import json
import math
import shutil
import time
from pathlib import Path

import pytest
from crashes import outcome

from recurlm.errors import CheckpointError
from recurlm.training import checkpoint
from recurlm.training.interrupt import Stopped
from recurlm.training.monitor import Monitor
from recurlm.training.trainer import Trainer
from support import record, tiny_config

COMMON = ("train.max_steps=44", "train.epochs=3", "train.eval_every=4", "data.batch_size=24")
AVERAGED = (*COMMON, "averaging.name=nt-asgd", "averaging.nonmono=1", "optimizer.name=sgd", "optimizer.lr=20",
            "optimizer.momentum=0.5", "optimizer.clip=1")  # fmt: skip
ADAM = (*COMMON, "optimizer.name=adam", "optimizer.lr=0.02", "schedule.name=linear")
PLATEAU = (
    *COMMON,
    "optimizer.name=adamw",
    "optimizer.lr=0.3",
    "schedule.name=plateau",
    "schedule.warmup_steps=0",
    "schedule.factor=0.5",
)
PATIENCE = (*COMMON, "optimizer.lr=0", "schedule.name=constant", "train.patience=8")
MILESTONES = (*COMMON, "schedule.name=milestones", "schedule.milestones=[1]", "schedule.factor=0.1")


def zero(*prefixes: str):
    def change(tensors, values):
        found = [name for name in tensors if name.startswith(prefixes) or name.endswith(prefixes)]
        assert found, prefixes
        for name in found:
            tensors[name].zero_()

    return change


def reset(key: str, value):
    def change(tensors, values):
        assert values["cursor"][key] != value
        values["cursor"][key] = value

    return change


def averaging_count(value: int):
    def change(tensors, values):
        assert values["averaging"]["count"] not in (value, -1)
        values["averaging"]["count"] = value

    return change


def averages_as_weights(tensors, values):
    """The raw weights were not saved, only the averaged ones."""
    means = [
        tensors[name] for name in sorted((n for n in tensors if n.startswith("averaging.")), key=lambda n: int(n[10:]))
    ]
    assert means
    for name, mean in zip([n for n in tensors["order"] if n.startswith("model.")], means, strict=True):
        tensors[name].copy_(mean)


PIECES = {
    "weights": (ADAM, zero("model.head")),
    "raw weights, the averaged ones instead": (AVERAGED, averages_as_weights),
    "carried hidden state": (ADAM, zero("state.")),
    "carried hidden state of the last layer": (ADAM, zero("state.2", "state.3")),
    "momentum": (AVERAGED, zero("momentum_buffer")),
    "Adam's first moment": (ADAM, zero(".exp_avg")),
    "Adam's second moment": (ADAM, zero(".exp_avg_sq")),
    "Adam's step": (ADAM, zero("optimizer.0.step", "optimizer.1.step")),
    "step": (ADAM, reset("step", 24)),
    "epoch (milestones)": (MILESTONES, reset("epoch", 0)),
    "data position": (ADAM, reset("position", 0)),
    "epoch's loss sum": (ADAM, reset("epoch_nats", 0.0)),
    "epoch's targets": (ADAM, reset("epoch_targets", 0)),
    "averaged weights": (AVERAGED, zero("averaging.")),
    "averaging's count": (AVERAGED, averaging_count(1)),
    "averaging's trigger": (AVERAGED, averaging_count(-1)),
    "validation losses (plateau)": (PLATEAU, reset("losses", [])),
    "validation losses (patience)": (PATIENCE, reset("losses", [])),
    "best loss": (PLATEAU, reset("best", None)),
    "validation that is due": (ADAM, reset("due", False)),
}


def go(trainer: Trainer, until: int) -> None:
    monitor = Monitor(trainer.folder, trainer.cursor.step, False, True, trainer.cursor.due)
    started = time.monotonic()
    if trainer.cursor.due:
        trainer.validate(monitor, started)
    while not trainer.done() and trainer.cursor.step < until:
        trainer.step_and_dues(monitor, started)
    trainer.save(started)
    monitor.close()


@pytest.fixture(scope="module")
def half(store, tmp_path_factory):
    """A function that gives a run's folder as it is at step 25 (at 24, its validation due, if so asked)."""
    done: dict[tuple, Path] = {}

    def make(settings: tuple[str, ...], due: bool) -> Path:
        if (settings, due) not in done:
            folder = done[settings, due] = tmp_path_factory.mktemp("half")
            trainer = Trainer(tiny_config(*settings), store, folder, quiet=True)
            go(trainer, 23 if due else 25)
            if due:
                monitor = Monitor(folder, 23, False, True)
                trainer.wish.signal = 15
                with pytest.raises(Stopped):
                    trainer.step_and_dues(monitor, time.monotonic())
                monitor.close()
                trainer.save(time.monotonic())
        return done[settings, due]

    return make


def resumed(half: Path, settings: tuple[str, ...], store, folder: Path, change=None) -> dict:
    """What the run gives when it goes on from `half`, a piece of its state changed."""
    shutil.copytree(half, folder, ignore=shutil.ignore_patterns("checkpoints"))
    saved, _ = checkpoint.newest(half / "checkpoints")
    assert saved is not None
    if change:
        order = [f"model.{name}" for name, _ in Trainer(tiny_config(*settings), store, folder).model.named_parameters()]
        values = json.loads(json.dumps(saved.values))
        change(saved.tensors | {"order": order} if change is averages_as_weights else saved.tensors, values)
        saved = saved._replace(values=values)
    trainer = Trainer(tiny_config(*settings), store, folder, quiet=True)
    trainer.resume(saved)
    go(trainer, 44)
    out = outcome(folder)
    return out | {"stopped": trainer.cursor.step, "best": trainer.cursor.best}


@pytest.mark.chaos
def test_every_piece_left_out_is_found(half, store, tmp_path):
    found, missed, unbroken = 0, [], {}
    for number, (piece, (settings, change)) in enumerate(PIECES.items()):
        due = "due" in piece
        if (settings, due) not in unbroken:
            whole = unbroken[settings, due] = resumed(
                half(settings, due), settings, store, tmp_path / f"{number}-whole"
            )
            never = tmp_path / f"{number}-never"
            never.mkdir()
            trainer = Trainer(tiny_config(*settings), store, never, quiet=True)
            go(trainer, 44)
            assert outcome(never) | {"stopped": trainer.cursor.step, "best": trainer.cursor.best} == whole, piece
        try:
            broken = resumed(half(settings, due), settings, store, tmp_path / f"{number}", change)
        except CheckpointError as error:  # found before any step
            broken = {"refused": str(error)}
        if broken == unbroken[settings, due]:
            missed.append(piece)
        found += broken != unbroken[settings, due]
    assert missed == []
    record("state_left_out", pieces=len(PIECES), found=found)


@pytest.mark.chaos
def test_another_seed_is_noticed(half, store, tmp_path):
    """The seed stands for all random states: randomness is a function of (seed, step)."""
    whole = resumed(half(ADAM, False), ADAM, store, tmp_path / "whole")
    other = resumed(half(ADAM, False), (*ADAM, "train.seed=7"), store, tmp_path / "other")
    assert other["trace"][:25] == whole["trace"][:25] and other["trace"][25:] != whole["trace"][25:]
    assert all(math.isfinite(float.fromhex(row[1])) for row in other["trace"])
