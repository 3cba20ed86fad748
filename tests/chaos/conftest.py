"""An unbroken run, to which the broken ones are compared."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from crashes import lives, outcome, train

from support import small_text

SETTINGS = ("train.epochs=3", "train.max_steps=68", "averaging.name=nt-asgd", "averaging.nonmono=1", "train.eval_every=4",
            "train.sample_every=25", "schedule.name=plateau", "schedule.factor=0.7", "optimizer.name=adam",
            "optimizer.lr=0.1")  # fmt: skip


@dataclass(frozen=True)
class Whole:
    """The text, the settings, and what an unbroken run gives; `at_64` is one that stopped there, after a save."""

    text: Path
    settings: tuple[str, ...]
    outcome: dict[str, Any]
    at_64: Path
    calls: int  # I/O calls of a life that goes on from there to the end, saving after every step

    def argv(self, run: Path, *settings: str) -> list[str]:
        return train(run, self.text, *self.settings, *settings)

    def fresh(self, run: Path) -> Path:
        """A new copy of `at_64` at `run`."""
        shutil.rmtree(run, ignore_errors=True)
        return Path(shutil.copytree(self.at_64, run))


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    folder = tmp_path_factory.mktemp("whole")
    text, run, start, saving = folder / "text.txt", folder / "run", folder / "start", "train.checkpoint_every=1"
    text.write_text(small_text(200))

    def live(*settings: str) -> int:
        code, life = lives().run(train(run, text, *SETTINGS, *settings), folder / "err", root=str(run))
        assert code == 0, life.said
        return life.calls["count"]

    live("train.checkpoint_every=9")
    expected = outcome(run)
    assert len(expected["trace"]) == 68 and len(expected["valid"]) == 17 and len(expected["samples"]) == 2
    assert any(row[-1] for row in expected["valid"]) and any(row[-2] for row in expected["valid"])  # it averages
    shutil.rmtree(run)
    live(saving, "train.max_steps=64")
    shutil.copytree(run, start)
    calls = live(saving)
    found = outcome(run)
    assert found == expected  # how often it is saved, and where it was stopped, changes nothing
    return Whole(text, SETTINGS, expected, start, calls)
