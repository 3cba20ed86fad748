"""kill -9 at any time: the resumed run equals the unbroken one bit for bit."""

import random
import signal
import time
from pathlib import Path

import pytest
from crashes import litter, lives, outcome

from recurlm import api
from recurlm.model import directory
from recurlm.training import checkpoint
from support import counts, record


def sound(run: Path, step: int) -> int:
    """The newest checkpoint's step: it is never before `step`, and the model, once there, always loads."""
    saved, skipped = checkpoint.newest(run / "checkpoints")
    assert not skipped
    if directory.exists(run):
        api.load(run)
    now = saved.step if saved else 0
    assert now >= step
    return now


@pytest.mark.chaos
@pytest.mark.parametrize("where", ["stepping", "saving"])
def test_kill_9_at_random_moments(where, whole, tmp_path):
    draw, kills, wanted, number = random.Random(f"kill {where}"), 0, counts(10, 100), 0
    saving = "train.checkpoint_every=1" if where == "saving" else "train.checkpoint_every=9"
    while kills < wanted:
        number += 1
        run, step = tmp_path / f"run-{number}", 0
        argv = whole.argv(run, saving)
        for _ in range(8):  # lives of one run; a ninth finishes it
            if kills == wanted:
                break
            if where == "saving":  # nearly all of a life's I/O calls are a save's
                at = draw.randrange(1, whole.calls * 3)
                code, life = lives().run(argv, tmp_path / "err", root=str(run), at=at, what="SIGKILL")
            else:
                life = lives().start(argv, tmp_path / "err")
                time.sleep(draw.uniform(0.0, 0.7))
                life.signal(signal.SIGKILL)
                code = life.wait()
            if code == 0:
                break
            assert code == -signal.SIGKILL, life.said
            kills += 1
            step = sound(run, step)
        code, life = lives().run(argv, tmp_path / "err")
        assert code == 0, life.said
        assert outcome(run) == whole.outcome
        assert litter(run) == []
    record(f"kill_9_{where}", kills=kills, runs=number, equal=number)


@pytest.mark.chaos
def test_kill_9_at_every_io_call_of_a_save(whole, tmp_path):
    """From the first call of a life that resumes, trains four steps and saves after each, to its last."""
    run = tmp_path / "run"
    argv = whole.argv(run, "train.checkpoint_every=1")
    points = random.Random("calls").sample(range(1, whole.calls + 1), counts(12, whole.calls))
    for at in points:
        whole.fresh(run)
        code, life = lives().run(argv, tmp_path / "err", root=str(run), at=at, what="SIGKILL")
        assert code == -signal.SIGKILL, (at, life.said)
        sound(run, 64)
        code, life = lives().run(argv, tmp_path / "err")
        assert code == 0, (at, life.said)
        assert outcome(run) == whole.outcome and litter(run) == [], at
    record("kill_9_at_every_call", calls=whole.calls, killed=len(points), equal=len(points))
