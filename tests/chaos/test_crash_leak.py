"""A long training does not grow: memory and open files after many tiny steps are those after the warm-up."""

import gc
import time
from pathlib import Path

import pytest

from recurlm.training.monitor import Monitor
from recurlm.training.trainer import Trainer
from support import counts, record, tiny_config

SMALL = ("model.hidden_size=4", "model.embedding_size=4", "model.num_layers=1", "data.batch_size=2", "data.bptt=5",
         "data.bptt_spread=1", "data.eval_batch_size=50", "train.log_every=20", "train.epochs=1000000")  # fmt: skip


def resident() -> int:
    """Bytes of this process in memory, garbage collected."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.chaos
def test_many_steps_leak_nothing(store, tmp_path):
    if not Path("/proc/self/statm").exists():
        pytest.skip("there is no /proc here")
    folder = tmp_path / "run"
    folder.mkdir()
    trainer = Trainer(tiny_config(*SMALL, "train.eval_every=1000"), store, folder, quiet=True)
    monitor, steps = Monitor(folder, 0, False, True), counts(2000, 100_000)

    def go(until: int) -> None:
        while trainer.cursor.step < until:
            trainer.step_and_dues(monitor, time.monotonic())
            if trainer.cursor.step % 250 == 0:
                trainer.save(time.monotonic())

    go(max(500, steps // 10))
    before, files = resident(), open_files()
    go(steps)
    after, files_after = resident(), open_files()
    monitor.close()
    record("leak", steps=steps, rss_before=before, rss_after=after, files_before=files, files_after=files_after)
    assert files_after == files
    assert after < 1.01 * before
