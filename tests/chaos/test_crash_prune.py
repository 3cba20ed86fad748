"""Pruning: the newest checkpoint is never gone, and what is not ours is neither followed nor deleted."""

import random
import shutil
import signal
from pathlib import Path

import pytest
from crashes import litter, lives, outcome

from recurlm.training import checkpoint
from support import counts, record


def add_foreign(folder: Path, outside: Path) -> dict[str, str]:
    """Things of somebody else among the checkpoints; returns what they look like."""
    outside.mkdir()
    (outside / "manifest.json").write_text("theirs")
    names = ("step-007", "step--1", "step-1e9", "step-99999999999999", "step-٣", "step-12", "notes", "STEP-4")
    for name in names:
        (folder / name).mkdir()
        (folder / name / "file").write_text(name)
    (folder / "step-3").write_text("a file")
    for name in ("step-5", "step-6.tmp-1", "step-7.trash-1", "step-8.old-1"):
        (folder / name).symlink_to(outside)
    return look(folder, outside)


def look(folder: Path, outside: Path) -> dict[str, str]:
    found = {
        str(path.relative_to(folder)): path.read_text() for path in folder.glob("*/file") if "unusable" not in str(path)
    }
    links = {path.name: str(path.readlink()) for path in folder.iterdir() if path.is_symlink()}
    return found | links | {"step-3": (folder / "step-3").read_text(), "": (outside / "manifest.json").read_text()}


@pytest.mark.chaos
def test_kill_9_while_pruning(whole, tmp_path):
    run, many, outside = tmp_path / "run", tmp_path / "many", tmp_path / "outside"
    whole.fresh(run)
    keeping = whole.argv(run, "train.checkpoint_every=1", "train.keep_checkpoints=9", "train.max_steps=67")
    assert lives().run(keeping, tmp_path / "err")[0] == 0
    foreign = add_foreign(run / "checkpoints", outside)
    shutil.copytree(run, many, symlinks=True)
    argv = whole.argv(run, "train.keep_checkpoints=2")
    code, life = lives().run(argv, tmp_path / "err", root=str(run), record="yes")
    assert code == 0, life.said
    assert look(run / "checkpoints", outside) == foreign
    assert [p.name for p in checkpoint.steps(run / "checkpoints")] == ["step-68", "step-67", "step-12"]
    calls = life.calls
    (published,) = (
        number
        for event, number in zip(calls["events"], calls["numbers"], strict=True)
        if event[0] == "replace" and event[2].endswith("/step-68")
    )
    points = random.Random("prune").sample(range(published, calls["count"]), counts(8, 50))
    for at in points:
        shutil.rmtree(run)
        shutil.copytree(many, run, symlinks=True)
        code, life = lives().run(argv, tmp_path / "err", root=str(run), at=at, what="SIGKILL")
        assert code == -signal.SIGKILL
        saved, skipped = checkpoint.newest(run / "checkpoints")
        assert saved is not None and saved.step == 68 and not skipped
        assert look(run / "checkpoints", outside) == foreign
        assert lives().run(argv, tmp_path / "err")[0] == 0
        assert [name for name in litter(run) if not (run / name).is_symlink()] == []
        assert look(run / "checkpoints", outside) == foreign
    record("kill_9_while_pruning", points=len(points), calls=calls["count"] - published, newest_there=len(points))


def test_foreign_things_in_the_way_of_a_checkpoint_are_kept_aside(whole, tmp_path):
    run = whole.fresh(tmp_path / "run")
    folder, outside = run / "checkpoints", tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_text("outside")
    (folder / "step-66").write_text("a file")
    (folder / "step-67").symlink_to(outside)
    (folder / "step-68").mkdir()
    (folder / "step-68" / "file").write_text("a folder")
    code, life = lives().run(whole.argv(run, "train.checkpoint_every=1"), tmp_path / "err")
    assert code == 0, life.said
    assert [p.name for p in checkpoint.steps(folder)] == ["step-68", "step-67"]
    kept = sorted(path for path in folder.iterdir() if path.name.startswith("unusable"))
    assert [path.name for path in kept] == [f"unusable-step-{n}-0" for n in (66, 67, 68)]
    assert kept[0].read_text() == "a file" and kept[1].is_symlink() and (kept[2] / "file").read_text() == "a folder"
    assert (outside / "file").read_text() == "outside"
    assert outcome(run) == whole.outcome


def test_a_checkpoint_that_was_being_replaced_comes_back(whole, tmp_path):
    run = whole.fresh(tmp_path / "run")
    for path in checkpoint.steps(run / "checkpoints")[1:]:
        shutil.rmtree(path)
    (only,) = checkpoint.steps(run / "checkpoints")
    only.rename(only.with_name(f"{only.name}.old-1"))  # and the writer died before the new one was in place
    code, life = lives().run(whole.argv(run), tmp_path / "err")
    assert code == 0 and "Resumed" in life.said
    assert outcome(run) == whole.outcome and litter(run) == []
