"""Whatever a run is made of, stopped and resumed it equals the unbroken one bit for bit: looped over the registries."""

import math
import time
from pathlib import Path

import pytest

from recurlm import api
from recurlm.config import apply_assignments, from_toml
from recurlm.model.heads import HEADS
from recurlm.model.layers import LAYERS
from recurlm.text.batches import BATCHING
from recurlm.training import checkpoint
from recurlm.training.averaging import AVERAGING
from recurlm.training.monitor import Monitor
from recurlm.training.optimizers import OPTIMIZERS
from recurlm.training.schedules import SCHEDULES
from recurlm.training.trainer import CHECKPOINTS, Trainer
from support import tiny_config

CHOICES = [
    *(("optimizer.name", name) for name in OPTIMIZERS),
    *(("schedule.name", name) for name in SCHEDULES),
    *(("averaging.name", name) for name in AVERAGING),
    *(("model.layer", name) for name in LAYERS),
    *(("model.head", name) for name in HEADS),
    *(("data.batching", name) for name in BATCHING),
    ("data.random_offset", "true"),
    ("data.partial_shuffle", "true"),
]
COMMON = (
    "train.epochs=3", "train.max_steps=40", "train.eval_every=4", "data.batch_size=40", "data.bptt=5", "data.bptt_min=3",
    "optimizer.momentum=0.5", "optimizer.clip_value=0.1", "averaging.nonmono=1", "averaging.start=0.2", "averaging.every=3",
    "schedule.warmup_steps=3", "schedule.cycles=2", "schedule.milestones=[1]", "model.zoneout=0.1",
)  # fmt: skip


def steps(trainer: Trainer, until: int) -> list[tuple[float, ...]]:
    """The numbers of each step up to step `until`; validations on the way."""
    monitor, out = Monitor(trainer.folder, trainer.cursor.step, False, True), []
    while trainer.cursor.step < until:
        numbers = trainer.step()
        out.append(tuple(numbers.values()))
        if trainer.cursor.step % 4 == 0:
            trainer.validate(monitor, time.monotonic())
    monitor.close()
    return out


@pytest.mark.parametrize(("setting", "name"), CHOICES)
def test_a_resumed_run_equals_an_unbroken_one(setting, name, store, tmp_path: Path):
    config = tiny_config(*COMMON, f"{setting}={name}")

    def make(folder: str) -> Trainer:
        (tmp_path / folder).mkdir(exist_ok=True)
        return Trainer(config, store, tmp_path / folder, quiet=True)

    whole = make("whole")
    expected = steps(whole, 34)
    broken, found = make("broken"), []
    for stop in (7, 18, 34):
        found += steps(broken, stop)
        broken.save(time.monotonic())
        saved, skipped = checkpoint.newest(tmp_path / "broken" / CHECKPOINTS)
        assert saved is not None and not skipped
        broken = make("broken")
        broken.resume(saved)
    assert whole.cursor.epoch >= 1 or whole.batches.epoch_length(0) > 34  # an epoch's end lay on the way
    assert all(math.isfinite(number) for row in expected for number in row)
    assert found == expected
    assert broken.cursor.losses == whole.cursor.losses
    for a, b in zip(broken.averaging.weights() or [], whole.averaging.weights() or [], strict=True):
        assert a.equal(b)


@pytest.mark.parametrize("head", HEADS)
def test_what_a_head_chose_is_kept_in_the_run_and_in_its_model(head, text_file, tmp_path):
    """Resumed by the settings as they were given, and by those that the run wrote; then loaded, measured and sampled."""
    given = tiny_config(f'data.path="{text_file}"', f"model.head={head}", "train.max_steps=4", "train.epochs=2")
    run = tmp_path / "run"
    api.train(given, run, quiet=True)
    written = from_toml((run / "config.toml").read_text(), "config.toml")
    api.train(apply_assignments(given, ["train.max_steps=6"]), run, resume=True, quiet=True)
    result = api.train(apply_assignments(written, ["train.max_steps=8"]), run, resume=True, quiet=True)
    assert result.step == 8
    model = api.load(run)
    assert model.model.config == written.model
    assert api.evaluate(model, data=text_file)["ppl"] > 1 and len(model.generate("the", tokens=4, seed=1)) > 3
