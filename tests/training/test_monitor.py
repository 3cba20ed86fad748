"""What cannot be recorded or shown never stops a training, and no record is lost while there is memory."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from recurlm.training.interrupt import listening
from recurlm.training.monitor import METRICS, Monitor, read_metrics
from recurlm.training.trainer import Trainer
from support import tiny_config


class FullDisk:
    """A file that takes `room` more bytes, and then fails."""

    def __init__(self, file, room: int):
        self.file, self.room, self.name = file, room, file.name

    def write(self, data: bytes) -> int:
        taken = self.file.write(data[: self.room])
        self.room -= taken
        if not taken:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return taken

    def __getattr__(self, name):
        return getattr(self.file, name)


def test_records_wait_until_they_can_be_written(tmp_path, capsys):
    monitor = Monitor(tmp_path, 0, False, False)
    real = monitor.file
    monitor.record("step", 1, {"a": 1})
    monitor.file = FullDisk(real, 10)
    for step in (2, 3):
        monitor.record("step", step, {"a": step})
    assert [r["step"] for r in read_metrics(tmp_path)] == [1]  # half a line counts for nothing
    said = capsys.readouterr().err
    assert said.count("No space left on device; training goes on") == 1 and str(tmp_path / METRICS) in said
    monitor.file.room = 10**6
    monitor.record("step", 4, {"a": 4})
    monitor.close()
    assert [(r["step"], r["a"]) for r in read_metrics(tmp_path)] == [(1, 1), (2, 2), (3, 3), (4, 4)]
    assert len((tmp_path / METRICS).read_text().splitlines()) == 4


def test_what_waited_is_written_at_the_end(tmp_path):
    monitor = Monitor(tmp_path, 0, False, True)
    monitor.file = FullDisk(monitor.file, 0)
    monitor.record("step", 1, {})
    monitor.file.room = 10**6
    monitor.close()
    assert [r["step"] for r in read_metrics(tmp_path)] == [1]


def test_tensorboard_that_fails_is_left_out(tmp_path, capsys):
    class Broken:
        def add_scalar(self, *arguments):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monitor = Monitor(tmp_path, 0, False, False)
    monitor.writer = Broken()
    for step in (1, 2):
        monitor.record("step", step, {"a": 1})
    monitor.close()
    assert capsys.readouterr().err.count("TensorBoard's events cannot be written") == 1
    assert len(read_metrics(tmp_path)) == 2


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
@pytest.mark.parametrize("stderr", ["full", "closed"])
def test_a_log_that_is_full_or_closed_costs_nothing(stderr, store, tmp_path):
    argv = [
        sys.executable,
        "-m",
        "recurlm",
        "train",
        "--data",
        str(store.path),
        "-o",
        str(tmp_path / "run"),
        "--threads",
        "1",
    ]
    for setting in ("model.hidden_size=4", "train.max_steps=3", "train.tensorboard=false", "train.log_every=1"):
        argv += ["--set", setting]
    if stderr == "full":
        with Path("/dev/full").open("w") as full:
            code = subprocess.run(argv, stderr=full, stdout=subprocess.DEVNULL).returncode
    else:
        reader, writer = os.pipe()
        os.close(reader)
        code = subprocess.run(argv, stderr=writer, stdout=subprocess.DEVNULL).returncode
        os.close(writer)
    assert [r["step"] for r in read_metrics(tmp_path / "run") if r["event"] == "step"] == [1, 2, 3]
    assert (tmp_path / "run" / "manifest.json").exists()
    assert code in (0, 1, 120)  # the sentence after the training could not be shown either


def test_a_hangup_saves_too_and_an_ignored_one_stays_ignored(store, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    trainer = Trainer(tiny_config("train.max_steps=5"), store, folder, quiet=True)
    real = trainer.advance

    def step():
        signal.raise_signal(signal.SIGHUP)
        return real()

    trainer.advance = step
    result = trainer.run()
    assert result.signal == signal.SIGHUP and result.step == 1 and (folder / "checkpoints" / "step-1").is_dir()
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with listening() as wish:
            signal.raise_signal(signal.SIGHUP)
            assert not wish.signal
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_second_signal_waits_a_second_and_then_ends_the_process():
    program = """
import os, signal, sys, time
from recurlm.training import interrupt
with interrupt.listening():
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)
    print("still here", flush=True)
    time.sleep(60)
"""
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "still here\n", "")
    assert time.monotonic() - start < 40


def test_a_run_that_ended_in_time_is_not_ended_later():
    program = """
import os, signal, time
from recurlm.training import interrupt
with interrupt.listening():
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)
time.sleep(1.5)
"""
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
