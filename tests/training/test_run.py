"""Whole runs: exact resume after kills and signals, faults that cost nothing, refusals."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from recurlm import api, files
from recurlm.config import apply_assignments
from recurlm.errors import CheckpointError, ConfigError, DataError, RunError, UserError
from recurlm.model import directory
from recurlm.model.layers import LAYERS
from recurlm.training import checkpoint, objective
from recurlm.training.monitor import Monitor, read_metrics
from recurlm.training.trainer import Trainer
from support import TINY, small_text, tiny_config

EXACT = ("step", "loss_nats", "objective", "grad_norm", "lr", "length")
GOLDEN = Path(__file__).parents[1] / "golden"


def trace(run: Path) -> list[tuple]:
    return [tuple(r[k] for k in EXACT) for r in read_metrics(run) if r["event"] == "step"]


def validations(run: Path) -> list[tuple]:
    return [
        (r["step"], r["loss_nats"], r["train_loss_nats"], r["best"]) for r in read_metrics(run) if r["event"] == "valid"
    ]


def weights_hash(run: Path) -> str:
    return json.loads((run / "manifest.json").read_text())["files"]["model.safetensors"]["sha256"]


def command(run: Path, data: Path, *settings: str, resume: bool = False) -> list[str]:
    out = [sys.executable, "-m", "recurlm", "train", "--data", str(data), "-o", str(run), "--threads", "1"]
    for setting in [*TINY, *settings]:
        out += ["--set", setting]
    return out + (["--resume", "auto"] if resume else [])


LONG = ("train.epochs=2", "train.max_steps=110", "train.checkpoint_every=9", "averaging.name=nt-asgd", "averaging.nonmono=1",
        "train.eval_every=15")  # fmt: skip


def run_to_the_end(run: Path, data: Path, *settings: str) -> None:
    done = subprocess.run(command(run, data, *settings, resume=True), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def interrupt_at(run: Path, data: Path, settings: tuple[str, ...], step: int, number: int) -> int:
    """Starts training, sends the signal once `step` is on record, and returns the exit code."""
    process = subprocess.Popen(
        command(run, data, *settings, resume=True), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        if any(r["step"] >= step for r in read_metrics(run)[-1:]):
            process.send_signal(number)
            break
        time.sleep(0.002)
    process.communicate(timeout=30)
    return process.returncode


@pytest.mark.parametrize("layer", LAYERS)
def test_kill_9_in_an_epoch_and_resume_is_bit_for_bit(layer, text_file, tmp_path):
    settings = (*LONG, f"model.layer={layer}", "model.zoneout=0.1")
    run_to_the_end(tmp_path / "whole", text_file, *settings)
    for step in (20, 61):
        assert interrupt_at(tmp_path / "broken", text_file, settings, step, signal.SIGKILL) == -signal.SIGKILL
    assert (tmp_path / "broken" / "checkpoints").is_dir()
    run_to_the_end(tmp_path / "broken", text_file, *settings)
    assert len(trace(tmp_path / "whole")) == 110
    assert trace(tmp_path / "broken") == trace(tmp_path / "whole")
    assert validations(tmp_path / "broken") == validations(tmp_path / "whole")
    assert weights_hash(tmp_path / "broken") == weights_hash(tmp_path / "whole")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_save_and_resume_is_bit_for_bit(number, code, text_file, tmp_path):
    settings = (*LONG, "train.checkpoint_every=0", "train.eval_every=0")
    run_to_the_end(tmp_path / "whole", text_file, *settings)
    assert interrupt_at(tmp_path / "broken", text_file, settings, 37, number) == code
    saved, _ = checkpoint.newest(tmp_path / "broken" / "checkpoints")
    assert saved is not None
    assert saved.step == read_metrics(tmp_path / "broken")[-1]["step"]
    api.load(tmp_path / "broken")  # usable although it never validated
    run_to_the_end(tmp_path / "broken", text_file, *settings)
    assert trace(tmp_path / "broken") == trace(tmp_path / "whole")


def test_max_time_measures_and_resume_is_still_bit_for_bit(text_file, tmp_path):
    config = apply_assignments(tiny_config(*LONG), [f'data.path="{text_file}"'])
    api.train(config, tmp_path / "whole", quiet=True)
    result = api.train(config, tmp_path / "broken", max_seconds=0.05, quiet=True)
    assert not result.finished
    assert 0 < result.step < 110
    assert read_metrics(tmp_path / "broken")[-1]["event"] == "stopped"
    facts = json.loads((tmp_path / "broken" / "manifest.json").read_text())["facts"]
    assert facts["loss_nats"] == result.best_loss == read_metrics(tmp_path / "broken")[-1]["loss_nats"]
    result = api.train(config, tmp_path / "broken", resume=True, quiet=True)
    assert result.finished
    assert trace(tmp_path / "broken") == trace(tmp_path / "whole")
    assert validations(tmp_path / "broken") == validations(tmp_path / "whole")
    assert weights_hash(tmp_path / "broken") == weights_hash(tmp_path / "whole")


def make(store, folder: Path, *settings: str) -> Trainer:
    folder.mkdir(exist_ok=True)
    return Trainer(tiny_config(*settings), store, folder, quiet=True)


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def test_a_run_with_a_bad_number_keeps_its_steps(store, tmp_path, monkeypatch):
    trainer = make(store, tmp_path / "run", "train.max_steps=50")
    real, calls = objective.terms, []

    def terms(*arguments):
        calls.append(1)
        out = real(*arguments)
        return {name: value * float("nan") for name, value in out.items()} if len(calls) == 20 else out

    monkeypatch.setattr(objective, "terms", terms)
    with pytest.raises(RunError, match="Step 20: the term 'nll' is nan"):
        trainer.run()
    saved, skipped = checkpoint.newest(tmp_path / "run" / "checkpoints")
    assert saved is not None and saved.step == 19 and not skipped


def test_weights_that_are_not_finite_are_never_published(store, tmp_path):
    trainer = make(store, tmp_path / "run")
    trainer.parameters[0].data[0, 0] = float("nan")
    with pytest.raises(RunError, match="weight embedding is not finite"):
        trainer.save(time.monotonic())
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert not directory.exists(tmp_path / "run")


@pytest.fixture(scope="module")
def finished(text_file, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("finished") / "run"
    config = apply_assignments(
        tiny_config("train.max_steps=20", "train.checkpoint_every=8"), [f'data.path="{text_file}"']
    )
    api.train(config, run, quiet=True)
    return run


def copy_of(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "copy"))


def config_of(run: Path, *settings: str):
    from recurlm.config import from_toml

    return apply_assignments(from_toml((run / "config.toml").read_text(), "config.toml"), settings)


def test_a_finished_run_resumed_changes_nothing(finished, tmp_path):
    run = copy_of(finished, tmp_path)
    before = {p.name: p.read_bytes() for p in run.iterdir() if p.is_file() and p.name != "config.toml"}
    settings = (run / "config.toml").read_bytes()
    assert api.train(config_of(run, "optimizer.lr=1"), run, resume=True, quiet=True).finished
    assert {name: (run / name).read_bytes() for name in before} == before
    assert (run / "config.toml").read_bytes() == settings  # nothing was trained with the other rate


def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before(finished, tmp_path):
    run = copy_of(finished, tmp_path)
    newest = checkpoint.steps(run / "checkpoints")[0]
    data = bytearray((newest / checkpoint.TENSORS).read_bytes())
    data[len(data) // 2] ^= 4
    (newest / checkpoint.TENSORS).write_bytes(data)
    saved, skipped = checkpoint.newest(run / "checkpoints")
    assert saved is not None and saved.step == 16
    assert len(skipped) == 1 and str(newest / checkpoint.TENSORS) in skipped[0] and "checksum" in skipped[0]


@pytest.mark.parametrize("name", [checkpoint.TENSORS, checkpoint.MANIFEST])
@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "missing"])
def test_damaged_checkpoints_are_refused_by_name(finished, tmp_path, name, damage):
    path = checkpoint.steps(copy_of(finished, tmp_path) / "checkpoints")[0]
    ruin(path / name, damage)
    with pytest.raises(CheckpointError, match=name):
        checkpoint.load(path)


def ruin(path: Path, damage: str) -> None:
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[len(data) // 3] ^= 1
    path.unlink()
    if damage != "missing":
        path.write_bytes({"flip": data, "cut": data[: len(data) // 2], "empty": b""}[damage])


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "missing"])
def test_damaged_models_are_refused_by_name(finished, tmp_path, name, damage):
    run = copy_of(finished, tmp_path)
    ruin(run / name, damage)
    with pytest.raises(UserError, match=name):
        api.load(run)


def test_a_crash_between_weights_and_manifest_leaves_a_loadable_model(finished, tmp_path, monkeypatch):
    run = copy_of(finished, tmp_path)
    model = api.load(run)
    changed = {name: p + 1 for name, p in model.model.named_parameters()}
    real = files.write_manifest
    for crash_at in (1, 2):
        calls = []

        def manifest(path, content, crash_at=crash_at, calls=calls):
            calls.append(1)
            if len(calls) == crash_at:
                raise KeyboardInterrupt
            real(path, content)

        monkeypatch.setattr(files, "write_manifest", manifest)
        with pytest.raises(KeyboardInterrupt):
            directory.write(run, model.model, changed, model.tokenizer.to_json(), {})
        monkeypatch.setattr(files, "write_manifest", real)
        loaded = next(api.load(run).model.parameters())
        old, new = next(model.model.parameters()), next(iter(changed.values()))
        assert torch.equal(loaded, old if crash_at == 1 else new)
        assert not list(run.glob("*.tmp-*"))


@pytest.mark.parametrize("store_there", [True, False])
def test_a_changed_text_is_refused_at_resume(finished, tmp_path, store_there):
    run = copy_of(finished, tmp_path)
    other = tmp_path / "other.txt"
    other.write_text(small_text(300, seed=5))
    if not store_there:
        shutil.rmtree(run / "store")
    before = (run / "config.toml").read_text()
    with pytest.raises(UserError, match=r"changed since step 20|data\.path is"):
        api.train(config_of(run, f'data.path="{other}"', "train.max_steps=30"), run, resume=True, quiet=True)
    assert (run / "config.toml").read_text() == before


def test_damaged_tokens_are_refused(finished, tmp_path):
    run = copy_of(finished, tmp_path)
    ruin(run / "store" / "train.bin", "flip")
    with pytest.raises(DataError, match=r"train\.bin"):
        api.train(config_of(run, "train.max_steps=30"), run, resume=True, quiet=True)


def test_a_model_without_checkpoints_is_never_trained_over(finished, tmp_path):
    run = copy_of(finished, tmp_path)
    shutil.rmtree(run / "checkpoints")
    before = (run / "model.safetensors").read_bytes()
    with pytest.raises(ConfigError, match="no checkpoints folder"):
        api.train(config_of(run), run, resume=True, quiet=True)
    assert (run / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("resume", [True, False])
def test_a_folder_with_files_of_the_user_is_left_alone(resume, text_file, tmp_path):
    (tmp_path / "README.md").write_text("mine")
    config = apply_assignments(tiny_config(), [f'data.path="{text_file}"'])
    with pytest.raises(ConfigError, match=r"README\.md"):
        api.train(config, tmp_path, resume=resume, quiet=True)
    assert (tmp_path / "README.md").read_text() == "mine"
    assert not (tmp_path / "store").exists()


def test_a_validation_that_is_not_finite_stops_and_can_be_resumed(text_file, tmp_path, monkeypatch):
    config = apply_assignments(tiny_config("train.epochs=2"), [f'data.path="{text_file}"'])
    with monkeypatch.context() as patch:
        patch.setattr("recurlm.training.trainer.mean_loss", lambda *a: float("inf"))
        with pytest.raises(RunError, match="the validation loss is inf"):
            api.train(config, tmp_path / "run", quiet=True)
        saved, _ = checkpoint.newest(tmp_path / "run" / "checkpoints")
        assert (
            saved is not None and not saved.values["cursor"]["due"]
        )  # it goes on with the next step, not with this loss
    result = api.train(config, tmp_path / "run", resume=True, quiet=True)
    assert result.finished and result.epoch == 2


def test_two_crashes_in_a_row_leave_a_loadable_model(finished, tmp_path, monkeypatch):
    run = copy_of(finished, tmp_path)
    loaded = api.load(run)
    real = files.write_manifest
    for change in (1, 2):
        calls = []

        def manifest(path, content, calls=calls):
            calls.append(1)
            if len(calls) == 2:
                raise KeyboardInterrupt
            real(path, content)

        monkeypatch.setattr(files, "write_manifest", manifest)
        changed = {name: p + change for name, p in loaded.model.named_parameters()}
        with pytest.raises(KeyboardInterrupt):
            directory.write(run, loaded.model, changed, loaded.tokenizer.to_json(), {})
        monkeypatch.setattr(files, "write_manifest", real)
        assert torch.equal(next(api.load(run).model.parameters()), next(iter(changed.values())))


def test_a_damaged_manifest_does_not_stop_training(finished, tmp_path):
    run = copy_of(finished, tmp_path)
    ruin(run / "manifest.json", "flip")
    ruin(run / "tokenizer.json", "cut")
    api.train(config_of(run, "train.max_steps=90", "train.eval_every=10"), run, resume=True, quiet=True)
    assert api.load(run).score("the king").total > 0


def test_a_model_that_cannot_be_written_costs_no_checkpoint(finished, tmp_path, monkeypatch):
    run = copy_of(finished, tmp_path)
    before = (run / "model.safetensors").read_bytes()
    monkeypatch.setattr(
        directory, "save_file", lambda *a, **k: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    with pytest.raises(RunError, match=r"No space left on device.*what was there is intact"):
        api.train(config_of(run, "train.max_steps=60", "train.eval_every=5"), run, resume=True, quiet=True)
    assert (run / "model.safetensors").read_bytes() == before
    assert checkpoint.newest(run / "checkpoints")[0].step == 24  # before the first new best


def test_unusable_checkpoints_are_set_aside_and_the_good_one_survives(finished, tmp_path):
    run = copy_of(finished, tmp_path)
    api.train(config_of(run, "train.max_steps=24", "train.keep_checkpoints=4"), run, resume=True, quiet=True)
    for path in checkpoint.steps(run / "checkpoints")[:2]:
        ruin(path / checkpoint.TENSORS, "cut")
    result = api.train(config_of(run, "train.max_steps=26"), run, resume=True, quiet=True)
    assert result.step == 26
    assert checkpoint.newest(run / "checkpoints")[0].step == 26


def test_averaging_and_optimizer_can_be_changed_at_resume(finished, tmp_path):
    run = copy_of(finished, tmp_path)
    settings = ("averaging.name=nt-asgd", "optimizer.name=sgd", "optimizer.momentum=0.5", "train.max_steps=30")
    assert api.train(config_of(run, *settings), run, resume=True, quiet=True).step == 30


def test_another_model_is_refused_at_resume(finished, tmp_path):
    run = copy_of(finished, tmp_path)
    with pytest.raises(ConfigError, match=r"model\.hidden_size is 17, but the run was started with 16"):
        api.train(config_of(run, "model.hidden_size=17"), run, resume=True, quiet=True)


def test_an_existing_run_is_never_overwritten(finished, tmp_path):
    run = copy_of(finished, tmp_path)
    with pytest.raises(ConfigError, match="already holds a run"):
        api.train(config_of(run), run, quiet=True)


def test_a_second_trainer_is_refused(finished, tmp_path):
    run = copy_of(finished, tmp_path)
    with files.locked(run):
        done = subprocess.run(
            [sys.executable, "-m", "recurlm", "train", "-o", str(run), "--resume", "auto"],
            capture_output=True,
            text=True,
        )
    assert done.returncode == 2
    assert "in use by another recurlm process" in done.stderr


def test_resume_takes_its_settings_from_the_run_and_more_steps_from_the_user(finished, tmp_path):
    run = copy_of(finished, tmp_path)
    result = api.train(config_of(run, "train.max_steps=25"), run, resume=True, quiet=True)
    assert (result.step, result.finished) == (25, True)


def test_litter_of_a_dead_writer_is_removed_and_pruning_keeps_the_newest(finished, tmp_path):
    run = copy_of(finished, tmp_path)
    for name in ("step-99.tmp-1", "step-3.trash-77"):
        (run / "checkpoints" / name).mkdir()
    (run / "checkpoints" / "notes").mkdir()  # somebody's own folder
    api.train(config_of(run, "train.max_steps=40"), run, resume=True, quiet=True)
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["notes", "step-32", "step-40"]


def test_a_full_disk_leaves_the_earlier_checkpoint(finished, tmp_path, monkeypatch):
    run = copy_of(finished, tmp_path)
    monkeypatch.setattr(
        checkpoint, "save_file", lambda *a, **k: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    with pytest.raises(RunError, match=r"No space left on device.*earlier checkpoints are intact"):
        api.train(config_of(run, "train.max_steps=40"), run, resume=True, quiet=True)
    assert [p.name for p in checkpoint.steps(run / "checkpoints")] == ["step-20", "step-16"]
    assert checkpoint.load(run / "checkpoints" / "step-20").step == 20


@pytest.mark.parametrize("mutant", ["state.", "optimizer.", "averaging.", "position", "losses", "epoch_nats", "step"])
def test_a_piece_left_out_of_the_checkpoint_is_noticed(mutant, store, tmp_path):
    """Drops one piece of state at resume: the trace must then differ from the unbroken one (or be refused)."""
    settings = ("averaging.name=nt-asgd", "averaging.nonmono=1", "train.epochs=3", "train.eval_every=5", "schedule.name=plateau",
                "optimizer.name=adamw", "train.max_steps=60", "optimizer.lr=0.1")  # fmt: skip

    def resumed(drop: str) -> list:
        folder = tmp_path / (drop or "none").strip(".")
        trainer = make(store, folder, *settings)
        monitor = Monitor(folder, 0, False, True)
        trainer.averaging.observe([1.0, 2.0, 3.0])  # averaging has begun
        for _ in range(37):
            trainer.step_and_dues(monitor, time.monotonic())
        trainer.cursor.losses[:0] = [0.1, 0.2]  # and the plateau schedule has something to remember
        assert trainer.averaging.weights() is not None
        trainer.save(time.monotonic())
        monitor.close()
        saved, _ = checkpoint.newest(folder / "checkpoints")
        assert saved is not None
        again = make(store, folder, *settings)
        zeros = dict(vars(again.cursor)) | {"losses": []}
        if drop in zeros:
            saved.values["cursor"][drop] = zeros[drop]
        for name in [name for name in saved.tensors if drop and name.startswith(drop)]:
            saved.tensors[name].zero_()
        try:
            again.resume(saved)
        except CheckpointError:
            return ["refused"]
        monitor = Monitor(folder, 37, False, True)
        while not again.done() and again.cursor.step < 60:
            again.step_and_dues(monitor, time.monotonic())
        monitor.close()
        return [trace(folder), validations(folder)]

    assert resumed("") == resumed("")
    assert resumed(mutant) != resumed("")


def test_the_model_names_the_step_of_its_weights_not_of_its_writing(store, tmp_path):
    trainer = make(store, tmp_path / "run")
    monitor = Monitor(tmp_path / "run", 0, False, True)
    for _ in range(4):
        trainer.step()
    trainer.validate(monitor, time.monotonic())
    trainer.step()
    trainer.save(time.monotonic())
    monitor.close()
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["facts"]["step"] == 4


def test_patience_ends_a_run_that_gets_no_better(text_file, tmp_path):
    settings = ("train.eval_every=5", "train.patience=2", "optimizer.lr=0", "train.epochs=50")
    config = apply_assignments(tiny_config(*settings), [f'data.path="{text_file}"'])
    result = api.train(config, tmp_path / "run", quiet=True)
    assert result.finished and result.step == 15  # the first validation is the best, two more are waited for
    assert api.train(config, tmp_path / "run", resume=True, quiet=True).step == 15


def test_samples_and_tensorboard_events_are_written(text_file, tmp_path):
    settings = ("train.max_steps=12", "train.sample_every=6", "train.sample_prompt=the king", "train.tensorboard=true")
    run_to_the_end(tmp_path / "run", text_file, *settings)
    samples = [r["text"] for r in read_metrics(tmp_path / "run") if r["event"] == "sample"]
    assert len(samples) == 2 and all(text.startswith("the king") for text in samples)
    assert "<unk>" not in "".join(samples)
    (events,) = (tmp_path / "run" / "tensorboard").iterdir()
    data = events.read_bytes()
    assert b"step/loss_nats" in data and b"valid/ppl" in data and b"the king" in data


def test_a_text_without_valid_split_is_measured_on_itself_and_says_so(tmp_path):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "train.txt").write_text(small_text(100))
    config = apply_assignments(tiny_config("train.max_steps=20"), [f'data.path="{tmp_path / "text"}"'])
    api.train(config, tmp_path / "run", quiet=True)
    assert "on the train split" in (tmp_path / "run" / "README.md").read_text()


def test_a_prepared_store_brings_its_tokenizer(store, tmp_path):
    config = apply_assignments(tiny_config("tokenizer.kind=char", "train.max_steps=3"), [f'data.path="{store.path}"'])
    api.train(config, tmp_path / "run", quiet=True)
    assert config_of(tmp_path / "run").tokenizer.kind == "word"
    assert not (tmp_path / "run" / "store").exists()
    assert api.evaluate(tmp_path / "run", split="valid")["targets"] == store.info["valid"].tokens


def test_before_any_validation_the_newest_weights_are_published(text_file, tmp_path):
    settings = ("train.eval_every=1000000", "train.checkpoint_every=5", "train.epochs=99")
    config = apply_assignments(tiny_config(*settings, "train.max_steps=99"), [f'data.path="{text_file}"'])
    real, steps = Trainer.advance, []

    def step(self):
        steps.append(1)
        if len(steps) == 14:
            raise RunError("enough")
        return real(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "advance", step)
        with pytest.raises(RunError, match="enough"):
            api.train(config, tmp_path / "run", quiet=True)
    assert api.load(tmp_path / "run").facts["step"] == 13


def test_a_valid_text_that_cannot_be_measured_is_refused_before_training(tmp_path):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "train.txt").write_text(small_text(50))
    (tmp_path / "text" / "valid.txt").write_text("the king\n")
    settings = ("data.counting=published", "data.eval_batch_size=10")
    config = apply_assignments(tiny_config(*settings), [f'data.path="{tmp_path / "text"}"'])
    with pytest.raises(DataError, match="too short to measure in 10 streams"):
        api.train(config, tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_a_bad_validation_that_was_interrupted_once_is_not_repeated_for_ever(store, tmp_path, monkeypatch):
    settings = ("train.eval_every=5", "train.max_steps=20")
    trainer = make(store, tmp_path / "run", *settings)
    real = Trainer.validate

    def interrupted(self, monitor, started, keep=True):
        self.wish.signal = signal.SIGTERM if self.cursor.step == 10 else 0
        real(self, monitor, started, keep)

    monkeypatch.setattr(Trainer, "validate", interrupted)
    assert trainer.run().signal == signal.SIGTERM
    monkeypatch.setattr(Trainer, "validate", real)
    saved, _ = checkpoint.newest(tmp_path / "run" / "checkpoints")
    assert saved is not None and saved.step == 10
    trainer = make(store, tmp_path / "run", *settings)
    trainer.resume(saved)
    with monkeypatch.context() as patch:
        patch.setattr("recurlm.training.trainer.mean_loss", lambda *a: float("nan"))
        with pytest.raises(RunError, match="validation loss is nan"):
            trainer.run()
    saved, _ = checkpoint.newest(tmp_path / "run" / "checkpoints")
    trainer = make(store, tmp_path / "run", *settings)
    assert saved is not None
    trainer.resume(saved)
    assert trainer.run().finished


def golden_trace(layer: str, zoneout: float, store, folder: Path) -> list[float]:
    """Losses of 200 steps with every dropout, both regularisers and clipping on."""
    recurrent = zoneout if LAYERS[layer].has_recurrent_product else 0
    trainer = make(store, folder, f"model.layer={layer}", f"model.zoneout={zoneout}", f"dropout.recurrent={recurrent}",
                   "optimizer.name=sgd", "optimizer.lr=1", "optimizer.clip=0.25", "model.embedding_size=24",
                   "model.init_range=0.3", "schedule.name=constant", "schedule.warmup_steps=0")  # fmt: skip
    return [trainer.step()["objective"] for _ in range(200)]


@pytest.mark.parametrize("zoneout", [0, 0.1])
@pytest.mark.parametrize("layer", LAYERS)
def test_golden_trace(layer, zoneout, store, tmp_path):
    found = golden_trace(layer, zoneout, store, tmp_path / "one")
    assert found == golden_trace(layer, zoneout, store, tmp_path / "two")
    path = GOLDEN / (f"{layer}-zoneout.json" if zoneout else f"{layer}.json")
    if os.environ.get("RECURLM_WRITE_GOLDEN"):
        path.write_text(json.dumps(found, indent=0) + "\n")
    expected = json.loads(path.read_text())
    assert sum(found[:20]) > sum(found[-20:]) + 1  # it learns
    assert max(abs(a - b) for a, b in zip(found, expected, strict=True)) < 1e-5


def test_no_training_loss_is_told_before_the_first_step(text_file, tmp_path, capsys):
    api.train(tiny_config(f'data.path="{text_file}"'), tmp_path / "run", max_seconds=0)
    (stopped,) = [r for r in read_metrics(tmp_path / "run") if "train_loss_nats" in r]
    err = capsys.readouterr().err
    assert stopped["step"] == 0 and stopped["train_loss_nats"] is None
    assert "valid loss" in err and "train loss" not in err
