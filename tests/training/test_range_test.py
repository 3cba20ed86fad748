"""The learning-rate range test, as a function and from the command line."""

import json
import subprocess
import sys

import numpy as np
import pytest

from recurlm import api
from recurlm.config import apply_assignments
from recurlm.errors import RequestError, RunError
from recurlm.training import objective
from recurlm.training.range_test import SPAN, range_test
from support import TINY, tiny_config


def test_it_finds_where_the_loss_falls_and_where_it_breaks(store, text_file):
    config = apply_assignments(tiny_config("optimizer.lr=0.01"), [f'data.path="{text_file}"'])
    test = api.lr_find(config)
    rates = np.array(test.rates)
    assert rates[0] == pytest.approx(0.01 * SPAN[0])
    steps = np.diff(np.log(rates))
    assert steps == pytest.approx(np.full(len(steps), steps[0]))  # one factor from step to step
    assert test.diverged  # an Adam at a rate of 10 breaks this model
    assert test.rates[0] < test.steepest < test.lowest < test.rates[-1]
    assert min(test.losses) < test.losses[0] - 0.1


@pytest.mark.parametrize("bad", [3, 40])
def test_a_loss_that_is_not_finite_ends_it(store, bad, monkeypatch):
    real, calls = objective.terms, []

    def terms(*arguments):
        calls.append(1)
        out = real(*arguments)
        return {name: value * float("nan") for name, value in out.items()} if len(calls) == bad else out

    monkeypatch.setattr(objective, "terms", terms)
    if bad == 3:
        with pytest.raises(RunError, match="not finite after 2 steps"):
            range_test(tiny_config(), store)
    else:
        test = range_test(tiny_config(), store)
        assert test.diverged and len(test.losses) == bad - 1


def test_too_few_steps_are_refused(store):
    with pytest.raises(RequestError, match="steps"):
        range_test(tiny_config(), store, steps=5)


def test_the_command_writes_a_picture_and_trains_nothing(text_file, tmp_path):
    picture = tmp_path / "lr.svg"
    base = [
        sys.executable,
        "-m",
        "recurlm",
        "train",
        "--data",
        str(text_file),
        "--lr-find",
        "-o",
        str(picture),
        "--json",
    ]
    for setting in TINY:
        base += ["--set", setting]
    done = subprocess.run(base, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["steepest"] <= facts["lowest"]
    assert picture.read_text().lstrip().startswith("<?xml")
    assert [p.name for p in tmp_path.iterdir()] == ["lr.svg"]
    again = subprocess.run(base, capture_output=True, text=True, cwd=tmp_path)
    assert again.returncode == 2 and "exists already" in again.stderr
