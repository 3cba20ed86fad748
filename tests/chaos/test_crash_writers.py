"""Two trainers in one folder, and readers while a trainer writes."""

import random
import signal
import time

import pytest
import torch
from crashes import litter, lives, outcome

from recurlm.errors import UserError
from recurlm.model import directory
from recurlm.model.precision import FP32
from support import counts, record


@pytest.mark.chaos
def test_of_two_trainers_one_goes_on(whole, tmp_path):
    draw, races = random.Random("race"), counts(4, 20)
    for n in range(races):
        run = tmp_path / f"run-{n}"
        if n % 2:  # a killed trainer's lock is no obstacle
            life = lives().start(whole.argv(run), tmp_path / "err")
            while not (run / ".lock").exists():
                time.sleep(0.001)
            life.signal(signal.SIGKILL)
            life.wait()
            assert (run / ".lock").exists()
        argv = whole.argv(run, "train.max_steps=0", "train.epochs=1000", "train.checkpoint_every=9")
        both = [lives().start(argv, tmp_path / "err-0")]
        time.sleep(draw.choice([0.0, 0.002, 0.02]))
        both.append(lives().start(argv, tmp_path / "err-1"))
        deadline = time.monotonic() + 60
        while not (refused := [life for life in both if "in use by another" in life.said]):
            assert time.monotonic() < deadline, [life.said for life in both]
            time.sleep(0.01)
        (loser,) = refused
        (winner,) = [life for life in both if life is not loser]
        assert loser.wait() == 2
        assert loser.said == f"recurlm: {run} is in use by another recurlm process; wait for it or choose another -o.\n"
        time.sleep(draw.uniform(0, 0.2))
        winner.signal(signal.SIGTERM)
        assert winner.wait() in (143, -15), winner.said
        code, life = lives().run(whole.argv(run, "train.checkpoint_every=9"), tmp_path / "err")
        assert code == 0 and litter(run) == [], life.said
        trace = outcome(run)["trace"]
        assert trace[:68] == whole.outcome["trace"][: len(trace)]
    record("two_writers", races=races, one_went_on=races)


@pytest.mark.chaos
def test_a_reader_always_finds_a_whole_model_while_it_is_exchanged(whole, tmp_path):
    run, seen, loads = tmp_path / "run", dict[int, float](), 0
    settings = ("train.max_steps=0", "train.epochs=1000", "train.eval_every=1", "train.checkpoint_every=1", "optimizer.lr=0.001",
                "averaging.name=none", "schedule.name=constant", "train.sample_every=0")  # fmt: skip
    life = lives().start(whole.argv(run, *settings), tmp_path / "err")
    wanted, enough, deadline = counts(100, 2000), counts(5, 60), time.monotonic() + 240
    while (loads < wanted or len(seen) < enough) and time.monotonic() < deadline:
        try:
            model, manifest = directory.read(run, torch.device("cpu"), FP32)
        except UserError as error:
            assert not seen and ("no such folder" in str(error) or "has no manifest.json" in str(error)), error
            time.sleep(0.01)
            continue
        loads += 1
        mean = float(next(model.parameters()).double().sum())
        assert seen.setdefault(manifest["facts"]["step"], mean) == mean  # facts and weights belong together
    life.signal(signal.SIGTERM)
    assert life.wait() == 143, life.said
    assert len(seen) >= enough and loads >= wanted
    assert lives().run(["eval", str(run), "--split", "valid"], tmp_path / "err")[0] == 0
    record("reading_while_training", loads=loads, models=len(seen))
