"""SIGTERM and SIGINT at any moment: the checkpoint is saved, the exit code says so, and the resumed run is the same."""

import random
import re
import signal
import subprocess
import sys
import time

import pytest
from crashes import litter, lives, outcome

from recurlm import api
from recurlm.config import apply_assignments
from recurlm.errors import DataError
from recurlm.training import checkpoint, trainer
from support import counts, record, small_text, tiny_config

CODES = {signal.SIGTERM: (143, -15), signal.SIGINT: (130, -2)}  # the second: before Python could listen


def saved_step(run, said: str) -> int:
    """The step that the life says it saved, which must be the newest checkpoint's; 0 when training had not begun."""
    told = re.search(r"Interrupted at step ([\d,]+); saved", said)
    step = int(told[1].replace(",", "")) if told else 0
    saved, skipped = checkpoint.newest(run / "checkpoints")
    assert not skipped and (not told or (saved is not None and saved.step == step))
    return step


@pytest.mark.chaos
@pytest.mark.parametrize("twice", [False, True], ids=["once", "twice_in_10_ms"])
def test_signals_at_random_moments(twice, whole, tmp_path):
    draw, told, moments = random.Random(f"signals {twice}"), 0, counts(6, 50)
    started = time.monotonic()
    assert lives().run(whole.argv(tmp_path / "unbroken", "train.checkpoint_every=5"), tmp_path / "err")[0] == 0
    took = time.monotonic() - started  # a life on this machine as busy as it is
    for n in range(10 * moments):
        if n >= moments and told:  # more only until one fell into training
            break
        run, number = tmp_path / f"run-{n}", draw.choice([signal.SIGTERM, signal.SIGINT])
        argv = whole.argv(run, "train.checkpoint_every=5")
        if n % 2:  # in the middle of an I/O call: start-up, saving
            at = draw.randrange(1, 2 * whole.calls)
            life = lives().start(argv, tmp_path / "err", root=str(run), at=at, what=signal.Signals(number).name)
        else:
            life = lives().start(argv, tmp_path / "err")
            time.sleep(draw.uniform(0, took))
            life.signal(number)
        if twice:
            time.sleep(0.01)
            life.signal(number)
        code = life.wait()
        assert code in (0, *CODES[number]), life.said
        assert "Traceback" not in life.said, life.said
        if code > 0:
            step = saved_step(run, life.said)
            told += step > 0
            assert step or f"recurlm: interrupted ({signal.Signals(number).name})." in life.said
        code, life = lives().run(argv, tmp_path / "err")
        assert code == 0 and outcome(run) == whole.outcome and litter(run) == [], life.said
    assert told
    record("signals", twice=twice, moments=moments, in_training=told, equal=moments)


@pytest.mark.chaos
def test_a_second_signal_ends_a_save_that_hangs(whole, tmp_path):
    draw, slowest = random.Random("second"), 0.0
    for _ in range(counts(2, 10)):
        run = whole.fresh(tmp_path / "run")
        at = draw.randrange(whole.calls // 2, whole.calls - 40)
        argv = whole.argv(run, "train.checkpoint_every=1")
        life = lives().start(argv, tmp_path / "err", root=str(run), at=at, what="hang")
        time.sleep(1.5)
        life.signal(signal.SIGTERM)
        time.sleep(1.2)
        start = time.monotonic()
        life.signal(signal.SIGTERM)
        assert life.wait() == 143
        slowest = max(slowest, time.monotonic() - start)
        code, life = lives().run(argv, tmp_path / "err")
        assert code == 0 and outcome(run) == whole.outcome and litter(run) == [], life.said
    assert slowest < 20  # the hang lasts a minute
    record("second_signal", slowest_seconds=slowest)


@pytest.mark.chaos
def test_a_signal_in_a_validation_saves_at_once_and_the_validation_comes_after_the_resume(whole, tmp_path, monkeypatch):
    real, number = trainer.mean_loss, 0
    config = apply_assignments(tiny_config(*whole.settings), [f'data.path="{whole.text}"'])
    for at in random.Random("validation").sample(range(1, 18), counts(5, 17)):
        run, calls = tmp_path / f"run-{at}", []

        def mean_loss(*arguments, at=at, calls=calls):
            calls.append(1)
            if len(calls) == at:
                signal.raise_signal(signal.SIGTERM)
            return real(*arguments)

        monkeypatch.setattr(trainer, "mean_loss", mean_loss)
        result = api.train(config, run, resume=True, quiet=True)
        monkeypatch.setattr(trainer, "mean_loss", real)
        assert result.signal == signal.SIGTERM and not result.finished and result.step == 4 * at
        saved, _ = checkpoint.newest(run / "checkpoints")
        assert saved is not None and saved.step == 4 * at and saved.values["cursor"]["due"]
        assert api.train(config, run, resume=True, quiet=True).finished
        assert outcome(run) == whole.outcome and litter(run) == []
        number += 1
    record("signal_in_validation", moments=number, equal=number)


@pytest.mark.chaos
def test_signals_in_the_first_seconds(whole, tmp_path):
    """A new interpreter, so that imports are met too; nothing was made, so nothing is left."""
    draw = random.Random("first")
    endless = [word for key in ("max_steps", "epochs", "eval_every") for word in ("--set", f"train.{key}=1000000")]
    for n in range(counts(2, 10)):
        number, run = (signal.SIGTERM, signal.SIGINT)[n % 2], tmp_path / f"run-{n}"
        process = subprocess.Popen(
            [sys.executable, "-m", "recurlm", *whole.argv(run), *endless], stderr=subprocess.PIPE, text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # a background job ignores it
        )  # fmt: skip
        time.sleep(draw.uniform(0.6, 2.0))
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
        assert process.returncode in CODES[number], said
        if process.returncode > 0 and "saved" not in said:
            assert said.splitlines()[-1] == f"recurlm: interrupted ({signal.Signals(number).name})."
            assert "Traceback" not in said and (not run.exists() or (run / "config.toml").exists())


def test_a_signal_while_the_text_is_tokenized_leaves_nothing(tmp_path):
    text, run = tmp_path / "text.txt", tmp_path / "parent" / "run"
    text.write_text(small_text(60_000))
    argv = ["train", "--data", str(text), "-o", str(run), "--threads", "1", "--set", "tokenizer.kind=word"]
    life = lives().start(argv, tmp_path / "err")
    while life.pid and not list(run.glob(".store.tmp-*")):
        time.sleep(0.001)
    life.signal(signal.SIGINT)
    assert life.wait() == 130
    assert life.said == "recurlm: interrupted (SIGINT).\n"
    assert not run.parent.exists()


def test_a_start_that_fails_leaves_nothing(whole, tmp_path):
    config = apply_assignments(
        tiny_config("data.counting=published", "data.batch_size=5000"), [f'data.path="{whole.text}"']
    )
    with pytest.raises(DataError, match="too few"):
        api.train(config, tmp_path / "a" / "b" / "run", quiet=True)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "mine").mkdir()
    with pytest.raises(DataError, match="too few"):
        api.train(config, tmp_path / "mine", quiet=True)
    assert list((tmp_path / "mine").iterdir()) == []
