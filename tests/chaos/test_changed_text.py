"""The text or its tokens change between a run and its resume: the run's own tokens count, and changed ones are refused."""

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from recurlm import api
from recurlm.config import Config, apply_assignments, from_toml
from recurlm.errors import DataError, UserError
from recurlm.text.store import open_store, prepare
from recurlm.training.monitor import read_metrics
from support import record, small_text, tiny_config

pytestmark = pytest.mark.chaos


def reordered(text: str) -> str:
    lines = text.splitlines(keepends=True)
    random.Random(3).shuffle(lines)
    return "".join(lines)


EDITS: dict[str, Callable[[str], str | None]] = {
    "one letter": lambda text: text.replace("a", "e", 1),
    "same length": lambda text: text[::-1],
    "one line less": lambda text: text[text.index("\n") + 1 :],
    "one line more": lambda text: text + "the king sees a river .\n",
    "shortened": lambda text: text[: len(text) // 2],
    "replaced": lambda text: small_text(100, seed=8),
    "reordered": reordered,
    "upper case": str.upper,
    "emptied": lambda text: "",
    "removed": lambda text: None,
}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text, a store of it, and a stopped run of each; and how both go on undisturbed."""
    folder = tmp_path_factory.mktemp("changed")
    (folder / "text.txt").write_text(small_text(100))
    prepare(folder / "text.txt", tiny_config().tokenizer, folder / "store")
    for name, source in (("of-text", "text.txt"), ("of-store", "store")):
        config = apply_assignments(tiny_config("train.max_steps=8"), [f'data.path="{folder / source}"'])
        api.train(config, folder / name, quiet=True)
        whole = shutil.copytree(folder / name, folder / f"whole-{name}")
        api.train(apply_assignments(config, ["train.max_steps=14"]), whole, resume=True, quiet=True)
    return folder


def go_on(run: Path) -> None:
    config: Config = from_toml((run / "config.toml").read_text(), "config.toml")
    api.train(apply_assignments(config, ["train.max_steps=14"]), run, resume=True, quiet=True)


def trace(run: Path) -> list[tuple]:
    return [(r["step"], r["loss_nats"]) for r in read_metrics(run) if r["event"] == "step"]


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_text_does_not_change_a_run(edit, places, tmp_path, monkeypatch):
    """The stated policy: a run goes on with its own copy of the tokens, bit for bit."""
    text = places / "text.txt"
    before, run = text.read_text(), Path(shutil.copytree(places / "of-text", tmp_path / "run"))
    try:
        changed = EDITS[edit](before)
        text.unlink() if changed is None else text.write_text(changed)
        go_on(run)
        assert trace(run) == trace(places / "whole-of-text")
        # Without that copy the text would have to be the same.
        again = Path(shutil.copytree(places / "of-text", tmp_path / "again"))
        shutil.rmtree(again / "store")
        files = {p: p.read_bytes() for p in again.rglob("*") if p.is_file()}
        with pytest.raises(UserError):
            go_on(again)
        assert {p: p.read_bytes() for p in again.rglob("*") if p.is_file() and p in files} == files
    finally:
        text.write_text(before)
    record("edited_text", edit=edit, outcome="own store used; refused without it")


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_store_is_refused(edit, places, tmp_path):
    """A run of a prepared store refuses it when it was made anew from the edited text, or its files were changed."""
    store, kept = places / "store", tmp_path / "kept"
    shutil.copytree(store, kept)
    run = Path(shutil.copytree(places / "of-store", tmp_path / "run"))
    (tmp_path / "edited.txt").write_text(EDITS[edit](small_text(100)) or "")
    try:
        shutil.rmtree(store)
        if edit not in ("removed", "emptied"):
            prepare(tmp_path / "edited.txt", tiny_config().tokenizer, store)
            assert open_store(store).hash != open_store(kept).hash
        elif edit == "emptied":
            shutil.copytree(kept, store)
            (store / "train.bin").write_bytes(b"")
        files = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
        with pytest.raises(UserError) as caught:
            go_on(run)
        assert isinstance(caught.value, DataError) or edit == "removed"
        assert str(store) in str(caught.value)
        assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == files
    finally:
        shutil.rmtree(store, ignore_errors=True)
        shutil.copytree(kept, store)
    record("edited_store", edit=edit, outcome="refused")
