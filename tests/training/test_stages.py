"""Runs of several stages: each starts from the best weights of the one before, and all of them have one resume point."""

import itertools
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from test_run import trace, validations, weights_hash

from recurlm import api
from recurlm.config import Config, apply_assignments, from_dict, from_toml, load_recipe, stage, stage_count, to_toml
from recurlm.errors import CheckpointError, ConfigError
from recurlm.training import checkpoint
from recurlm.training.monitor import Monitor, read_metrics
from recurlm.training.trainer import Trainer
from support import tiny_config

SECOND = {
    "data": {"bptt_cap": 10, "batch_size": 5},
    "dropout": {"weight": 0.1},
    "optimizer": {"name": "sgd", "lr": 2.0},
    "schedule": {"name": "constant"},
    "averaging": {"trigger": "share", "start": 0.0},
    "train": {"max_steps": 40},
}
FIRST = ("train.epochs=9", "train.max_steps=50", "train.eval_every=10", "train.checkpoint_every=7", "averaging.name=nt-asgd",
         "averaging.nonmono=1", "optimizer.name=adam", "optimizer.lr=1", "schedule.name=constant")  # fmt: skip


def two_stages(*settings: str, second: dict | None = None, **values) -> Config:
    return apply_assignments(from_dict({"stages": [second or SECOND], **values}, tiny_config(*FIRST)), settings)


@pytest.fixture
def recipe(text_file, tmp_path) -> Path:
    """The two stages as a file, for runs in processes of their own."""
    path = tmp_path / "two.toml"
    path.write_text(to_toml(two_stages(f'data.path="{text_file}"')))
    return path


def make(store, folder: Path, config: Config) -> Trainer:
    folder.mkdir(exist_ok=True)
    return Trainer(config, store, folder, quiet=True)


# ---- settings -------------------------------------------------------------------------------------------------------


def test_stages_survive_toml_and_override_only_what_they_name():
    config = two_stages()
    assert from_toml(to_toml(config), "test") == config and stage_count(config) == 2
    first, second = stage(config, 0), stage(config, 1)
    assert first == tiny_config(*FIRST)
    assert (second.optimizer.lr, second.optimizer.clip, second.data.bptt_cap) == (2.0, first.optimizer.clip, 10)
    assert second.train.eval_every == 10 and second.model == first.model
    assert stage_count(apply_assignments(config, ["train.stages=1"])) == 1


def test_a_stage_is_set_by_its_number():
    config = apply_assignments(two_stages(), ["stages.2.optimizer.lr=7", "stages.2.objective.ar=1", "optimizer.lr=3"])
    assert (stage(config, 0).optimizer.lr, stage(config, 1).optimizer.lr, stage(config, 1).objective.ar) == (3, 7, 1)


@pytest.mark.parametrize("text", ["stages.1.optimizer.lr=3", "stages.3.optimizer.lr=3", "stages.2.lr=3", "stages.x=3",
                                  "stages.2.optimizer.lr.x=1"])  # fmt: skip
def test_a_stage_that_is_not_there_is_refused(text):
    with pytest.raises(ConfigError, match=r"expected stages\.NUMBER\.section\.key=value.*from 2 to 2"):
        apply_assignments(two_stages(), [text])
    with pytest.raises(ConfigError, match="this run has one stage"):
        apply_assignments(Config(), [text])


@pytest.mark.parametrize(
    ("stages", "sentence"),
    [
        (3, "at most 15 tables"),
        ([{}] * 16, "at most 15 tables"),
        ([{"optimizer": {"rate": 3}}], "Stage 2: .*has no setting 'rate'"),
        ([{}, {"optimiser": {}}], "Stage 3: There is no section"),
        ([{"optimizer": {"lr": -1}}], r"Stage 2: optimizer\.lr"),
        ([{"model": {"layer": "gru"}}], r"Stage 2: model\.layer is the same in all stages"),
        ([{"data": {"path": "x"}}], r"data\.path is the same"),
        ([{"train": {"device": "cpu"}}], r"train\.device is the same"),
        ([{"stages": []}], "no stages of its own"),
        ([[]], "Expected a table"),
    ],
)
def test_stages_that_cannot_be_are_refused(stages, sentence):
    with pytest.raises(ConfigError, match=sentence):
        from_dict({"stages": stages})


def test_what_cannot_work_later_is_found_before_any_training(text_file, tmp_path):
    config = two_stages(f'data.path="{text_file}"', second={"averaging": {"name": "nt-asdg"}})
    with pytest.raises(ConfigError, match=r"Stage 2: averaging\.name = 'nt-asdg' is not known"):
        api.train(config, tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["awd-lstm-ptb", "awd-qrnn-ptb"])
def test_the_published_second_stage(name):
    config = load_recipe(name)
    first, second = stage(config, 0), stage(config, 1)
    assert stage_count(config) == 2 and first.averaging.trigger == "auto"
    assert (second.averaging.name, second.averaging.trigger, second.averaging.start) == ("nt-asgd", "share", 0)
    assert second.train.stop_nonmono == 5 and second.data.bptt_cap == second.data.bptt + 10
    assert (second.optimizer, second.dropout, second.objective) == (first.optimizer, first.dropout, first.objective)
    assert 0 < second.published.test < first.published.test


# ---- how it goes on -------------------------------------------------------------------------------------------------


def test_the_second_stage_starts_from_the_best_weights_and_averages_from_its_first_step(store, tmp_path):
    trainer = make(store, tmp_path / "run", two_stages())
    monitor = Monitor(trainer.folder, 0, False, True)
    while not trainer.stage_done():
        trainer.step_and_dues(monitor, 0.0)
    c, best = trainer.cursor, {name: p.clone() for name, p in trainer.kept.items()}
    assert c.step == 50 and not trainer.done() and c.best < c.losses[-1]  # the last weights are not the best ones
    before = c.best
    trainer.next_stage()
    assert (c.stage, c.step, c.stage_step, c.losses, c.best, c.position) == (1, 50, 50, [], before, 0)
    assert all(torch.equal(p, best[name]) for name, p in trainer.model.named_parameters())
    assert isinstance(trainer.optimizer, torch.optim.SGD) and trainer.averaging.weights() is None
    assert trainer.progress().step == trainer.progress().share == 0
    numbers = [trainer.step() for _ in range(30)]
    assert all(n["lr"] <= 2.0 * 10 / 12 and n["length"] <= 10 for n in numbers)  # its rate and its longest window
    assert trainer.averaging.count == 30
    monitor.close()


def test_all_stages_are_one_run(text_file, tmp_path):
    config = two_stages(f'data.path="{text_file}"')
    result = api.train(config, tmp_path / "run", quiet=True)
    assert (result.step, result.finished, result.stage, result.stages) == (90, True, 2, 2)
    records = [r for r in read_metrics(tmp_path / "run") if r["event"] == "valid"]
    assert [r["stage"] for r in records] == [1] * 5 + [2] * 4
    assert [r["step"] for r in records] == list(range(10, 91, 10))
    assert all(a["epoch"] <= b["epoch"] for a, b in itertools.pairwise(records))
    assert all(r["averaged"] for r in records[5:])
    best = min(records, key=lambda r: r["loss_nats"])
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["facts"]["step"] == best["step"] and manifest["facts"]["stage"] == best["stage"]
    assert manifest["facts"]["stages"] == 2
    assert f"stage {best['stage']} of 2" in (tmp_path / "run" / "README.md").read_text()
    assert api.plan(config)["steps_of_stages"] == [50, 40]


def test_a_stage_stops_when_its_validations_rise(store, tmp_path):
    second = SECOND | {"train": {"max_steps": 400, "stop_nonmono": 2}, "optimizer": {"name": "sgd", "lr": 0.0}}
    trainer = make(store, tmp_path / "run", two_stages(second=second))
    trainer.next_stage()
    c = trainer.cursor
    for losses, over in (([3.0, 2.0, 2.5, 2.9], False), ([3.0, 2.0, 2.5, 2.9, 2.8], True), ([2.0, 3.0, 4.0], False)):
        c.losses = losses
        assert trainer.stage_done() == over


def test_the_first_stage_alone_and_the_second_later(text_file, tmp_path):
    config = two_stages(f'data.path="{text_file}"')
    api.train(config, tmp_path / "whole", quiet=True)
    result = api.train(apply_assignments(config, ["train.stages=1"]), tmp_path / "parts", quiet=True)
    assert (result.step, result.finished, result.stages) == (50, True, 1)
    result = api.train(config, tmp_path / "parts", resume=True, quiet=True)
    assert (result.step, result.finished, result.stage) == (90, True, 2)
    same(tmp_path)
    with pytest.raises(ConfigError, match="The run is in stage 2, but these settings have 1"):
        api.train(apply_assignments(config, ["train.stages=1"]), tmp_path / "parts", resume=True, quiet=True)
    with pytest.raises(ConfigError, match=r"stages\.2\.data\.bptt_cap is 9, but the run was started with 10"):
        settings = ["stages.2.data.bptt_cap=9", "stages.2.train.max_steps=60"]
        api.train(apply_assignments(config, settings), tmp_path / "parts", resume=True, quiet=True)


def test_a_run_without_later_stages_gets_one(text_file, tmp_path):
    plain = apply_assignments(tiny_config(*FIRST), [f'data.path="{text_file}"'])
    api.train(plain, tmp_path / "run", quiet=True)
    assert not any(k.startswith("best.") for k in newest(tmp_path / "run").tensors)
    result = api.train(two_stages(f'data.path="{text_file}"'), tmp_path / "run", resume=True, quiet=True)
    assert result.finished and result.step == 90


def newest(run: Path) -> checkpoint.Checkpoint:
    saved, _ = checkpoint.newest(run / "checkpoints")
    assert saved is not None
    return saved


# ---- stopped and resumed --------------------------------------------------------------------------------------------


def same(folder: Path) -> None:
    parts, whole = folder / "parts", folder / "whole"
    assert trace(parts) == trace(whole) and len(trace(whole)) == 90
    assert validations(parts) == validations(whole)
    assert weights_hash(parts) == weights_hash(whole)


def test_stopped_in_each_stage_and_between_them_it_equals_an_unbroken_run(store, tmp_path):
    config = two_stages()
    make(store, tmp_path / "whole", config).run()
    folder = tmp_path / "parts"
    for stop in (6, 31, 50, 51, 64, 81, 90):
        trainer = make(store, folder, config)
        if (folder / "checkpoints").is_dir() and (saved := checkpoint.newest(folder / "checkpoints")[0]):
            trainer.resume(saved)
        real = trainer.step_and_dues

        def step_and_dues(monitor, started, trainer=trainer, real=real, stop=stop):
            real(monitor, started)
            if trainer.cursor.step == stop:
                trainer.wish.signal = signal.SIGTERM

        trainer.step_and_dues = step_and_dues
        result = trainer.run()
        assert result.step == stop and result.stage == (1 if stop <= 50 else 2) and result.finished == (stop == 90)
    same(tmp_path)


def test_out_of_time_in_each_stage_and_resumed_it_equals_an_unbroken_run(store, tmp_path, monkeypatch):
    """The measurement off the record may publish better weights than any on record: the next stage must not start there."""
    config = two_stages()
    make(store, tmp_path / "whole", config).run()
    folder, lives = tmp_path / "parts", 0
    while True:
        trainer = make(store, folder, config)
        if lives:
            trainer.resume(newest(folder))
        lives += 1
        stop, clock = trainer.cursor.step + 9, time.monotonic
        monkeypatch.setattr(time, "monotonic", lambda t=trainer, s=stop, c=clock: c() + 1e6 * (t.cursor.step >= s))
        finished = trainer.run(max_seconds=1e5).finished
        monkeypatch.setattr(time, "monotonic", clock)
        if finished:
            break
    assert lives > 8
    same(tmp_path)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_signals_in_both_stages_and_resume_is_bit_for_bit(number, recipe, tmp_path):
    def command(run: Path) -> list[str]:
        return [
            sys.executable,
            "-m",
            "recurlm",
            "train",
            str(recipe),
            "-o",
            str(run),
            "--threads",
            "1",
            "--resume",
            "auto",
        ]

    assert subprocess.run(command(tmp_path / "whole"), capture_output=True).returncode == 0
    run = tmp_path / "parts"
    for step in (20, 62):
        process = subprocess.Popen(command(run), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            if any(r["step"] >= step for r in read_metrics(run)[-1:]):
                process.send_signal(number)
                break
            time.sleep(0.002)
        process.communicate(timeout=30)
        assert process.returncode == (-9 if number == signal.SIGKILL else 143)
    assert newest(run).values["cursor"]["stage"] == 1
    assert subprocess.run(command(run), capture_output=True).returncode == 0
    same(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        lambda t, v: v["cursor"].update(stage=2),
        lambda t, v: v["cursor"].update(stage=-1),
        lambda t, v: v["cursor"].update(stage="1"),
        lambda t, v: v["cursor"].update(stage_step=10**6),
        lambda t, v: v["cursor"].update(stage_epoch=10**6),
        lambda t, v: t.update({"best.embedding": torch.zeros(3, 3)}),
        lambda t, v: t.pop("best.embedding"),
        lambda t, v: t.update({"best.evil": torch.zeros(3)}),
    ],
)
def test_stages_that_do_not_fit_are_refused(change, store, tmp_path):
    config = two_stages()
    trainer = make(store, tmp_path / "run", config)
    trainer.run()
    saved = newest(tmp_path / "run")
    change(saved.tensors, saved.values)
    with pytest.raises(CheckpointError, match="step 90"):
        make(store, tmp_path / "run", config).resume(saved)


@pytest.mark.parametrize("piece", ["stage", "stage_step", "stage_epoch", "best."])
def test_every_piece_of_a_stages_state_matters(piece, store, tmp_path):
    """Left out, the resumed run differs from the unbroken one."""
    second = SECOND | {"train": {"max_steps": 40, "epochs": 1}, "schedule": {"name": "linear"}}
    config = two_stages(second=second, train={"epochs": 9, "max_steps": 90})
    whole = make(store, tmp_path / "whole", config)
    whole.run()
    trainer = make(store, tmp_path / "parts", config)
    monitor = Monitor(trainer.folder, 0, False, True)
    while not trainer.stage_done():
        trainer.step_and_dues(monitor, 0.0)
    if piece.startswith("stage"):
        trainer.next_stage()
        trainer.step_and_dues(monitor, 0.0)
    monitor.close()
    trainer.save(0.0)
    saved = newest(tmp_path / "parts")
    if piece == "best.":
        for name, tensor in saved.tensors.items():
            if name.startswith("best."):
                tensor.copy_(saved.tensors["model." + name[5:]])
    else:
        assert saved.values["cursor"][piece]
        saved.values["cursor"][piece] = 0
    trainer = make(store, tmp_path / "parts", config)
    try:
        trainer.resume(saved)
        trainer.run()
    except CheckpointError:
        return
    found = [(trace(f), validations(f), weights_hash(f)) for f in (tmp_path / "parts", tmp_path / "whole")]
    assert found[0] != found[1]
