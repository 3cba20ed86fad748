"""Runs side by side: every figure is one that a run's own files hold."""

import dataclasses
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

from recurlm import api
from recurlm.config import apply_assignments, from_dict
from recurlm.errors import ConfigError, UserError
from recurlm.text.corpora import NAMED_SETS
from recurlm.training.monitor import read_metrics
from support import tiny_config

PUBLISHED = {"valid": 9.5, "test": 9.1}


@pytest.fixture(scope="module")
def runs(text_file, store, tmp_path_factory) -> dict[str, Path]:
    from recurlm.ngram import run as ngram
    from recurlm.ngram.smoothing import Settings

    folder = tmp_path_factory.mktemp("compare")
    base = tiny_config("train.max_steps=24", "train.eval_every=6", f'data.path="{text_file}"')
    two = from_dict(
        {"stages": [{"train": {"max_steps": 12}, "published": PUBLISHED}], "published": {"valid": 9.9}}, base
    )
    api.train(two, folder / "two", quiet=True)
    (folder / "two" / "eval.json").write_text(json.dumps({"split": "test", "loss_nats": 2.5}))
    api.train(apply_assignments(base, ["train.seed=7", "published.unit=bpc"]), folder / "seven", quiet=True)
    (folder / "seven" / "eval.json").write_text(json.dumps({"split": "valid", "loss_nats": 2.5}))
    api.train(
        apply_assignments(base, ["train.max_steps=9999", "train.epochs=99"]),
        folder / "short",
        max_seconds=0.3,
        quiet=True,
    )
    ngram.train(store.path, folder / "trigrams", order=3, settings=Settings(fallback=(0.5, 1.0, 1.5)))
    return {path.name: path for path in folder.iterdir()}


def rows(found: dict) -> dict[str, dict]:
    return {row[0]: dict(zip(found["header"], row, strict=True)) for row in found["rows"]}


def test_a_row_says_what_the_run_was(runs):
    found = rows(api.compare([runs[name] for name in ("two", "seven", "short", "trigrams")]))
    records = [r for r in read_metrics(runs["two"]) if r["event"] == "valid"]
    two, best = found["two"], min(r["loss_nats"] for r in records)
    assert two["valid"] == pytest.approx(math.exp(best)) and two["test"] == pytest.approx(math.exp(2.5))
    assert (two["published valid"], two["published test"]) == (9.5, 9.1)  # those of its last stage
    assert two["state"] == "stage 2, finished" and two["seed"] == 1111 and two["model"] == "lstm 16, 12"
    assert two["minutes"] == records[-1]["seconds"] / 60 and two["epochs"] == records[-1]["epoch"]
    assert two["parameters"] == api.load(runs["two"]).parameters and two["device"].startswith("CPU")
    assert two["text"] == "small.txt" and two["type"] == "fp32"
    seven, valid = found["seven"], [r["loss_nats"] for r in read_metrics(runs["seven"]) if r["event"] == "valid"]
    assert seven["unit"] == "bits a character" and seven["valid"] == pytest.approx(min(valid) / math.log(2))
    assert seven["seed"] == 7 and seven["test"] is None  # only valid was measured
    assert found["short"]["state"] == "not finished"
    assert two["unit"] == f"perplexity a word of {api.load(runs['two']).tokenizer.vocab_size}"
    for step, shown in ((json.loads((runs["two"] / "manifest.json").read_text())["facts"]["step"], True), (1, False)):
        (runs["two"] / "eval.json").write_text(json.dumps({"split": "test", "loss_nats": 2.5, "step": step}))
        assert (rows(api.compare([runs["two"]]))["two"].get("test") is not None) == shown  # not that of other weights
    (runs["two"] / "eval.json").write_text(json.dumps({"split": "test", "loss_nats": 2.5}))
    facts = json.loads((runs["trigrams"] / "manifest.json").read_text())["facts"]
    trigrams = found["trigrams"]
    assert trigrams["model"] == "3-gram" and trigrams["valid"] == pytest.approx(facts["ppl"])
    assert trigrams["parameters"] == facts["parameters"] and trigrams["seed"] is None


def test_curves_go_by_epoch_and_by_minute(runs):
    (curve,) = api.compare([runs["two"]])["curves"]
    records = [r for r in read_metrics(runs["two"]) if r["event"] == "valid"]
    assert len(curve["values"]) == 6 and list(curve["minutes"]) == sorted(curve["minutes"])
    assert list(curve["epochs"]) == sorted(curve["epochs"]) and len(set(curve["epochs"])) == 6
    assert list(curve["values"]) == pytest.approx([math.exp(r["loss_nats"]) for r in records])


def test_the_page_is_whole_and_refers_to_nothing(runs, tmp_path):
    api.compare(list(runs.values()), tmp_path / "a.html")
    api.compare(list(runs.values()), tmp_path / "b.html")
    text = (tmp_path / "a.html").read_text()
    assert text == (tmp_path / "b.html").read_text()
    assert text.count("<svg ") == 4 and all(name in text for name in runs)  # by epoch and minute, for each unit
    assert not re.search(r'(src|href)="(?!#)', text) and "url(" not in text.replace("url(#", "")


def test_what_is_no_run_and_no_page_is_refused(runs, tmp_path):
    with pytest.raises(UserError, match="not a run directory"):
        api.compare([tmp_path])
    with pytest.raises(UserError, match="No run was named"):
        api.compare([])
    with pytest.raises(UserError, match=r"ends in \.html"):
        api.compare([runs["two"]], tmp_path / "page.txt")
    (tmp_path / "page.html").write_text("mine")
    with pytest.raises(UserError, match="exists already"):
        api.compare([runs["two"]], tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text() == "mine"


def test_damaged_files_cost_a_row_its_figures_or_are_named(runs, tmp_path):
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "config.toml").write_bytes((runs["two"] / "config.toml").read_bytes())
    lines = ["{", '{"event": "valid", "step": 1}', '{"event": "valid", "step": 1, "loss_nats": "x", "seconds": 1, "epoch": 1}',
             '{"event": "valid", "step": 1, "loss_nats": 2.0, "seconds": 60, "epoch": 1}',
             '{"event": "start", "step": 1, "device": 7, "commit": []}']  # fmt: skip
    (bad / "metrics.jsonl").write_text("\n".join(lines))
    (bad / "eval.json").write_text("[]")
    row = rows(api.compare([bad, runs["two"]]))["bad"]
    assert (
        row["valid"] == pytest.approx(math.exp(2))
        and row["minutes"] == 1
        and row["test"] is None
        and row["device"] == ""
    )
    (bad / "config.toml").write_text("[model]\nlayer = 3\n")
    with pytest.raises(ConfigError, match=r"config\.toml: model\.layer"):
        api.compare([bad])


def test_the_verb(runs, tmp_path):
    command = [sys.executable, "-m", "recurlm", "compare", str(runs["two"]), str(runs["trigrams"])]
    done = subprocess.run([*command, "-o", str(tmp_path / "x.html")], capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert (
        done.returncode == 0
        and lines[0].startswith("run ")
        and [line.split()[0] for line in lines[1:]] == ["two", "trigrams"]
    )
    done = subprocess.run([*command, "--json"], capture_output=True, text=True)
    assert json.loads(done.stdout)["rows"][0][0] == "two" and not done.stderr
    done = subprocess.run([*command[:-1], str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "not a run directory" in done.stderr


def test_published_figures_are_shown_beside_their_own_text_alone(store, tmp_path, monkeypatch):
    sizes = {split: info.bytes for split, info in store.info.items()}
    monkeypatch.setitem(NAMED_SETS, "ours", dataclasses.replace(NAMED_SETS["ptb"], bytes=sizes))
    for text, shown in (("ours", (9.5, 9.1)), ("ptb", (None, None))):
        base = tiny_config("train.max_steps=2", f'data.path="{store.path}"', f"published.text={text}")
        stages = [{"train": {"max_steps": 1}, "published": PUBLISHED}]
        api.train(from_dict({"stages": stages, "published": {"valid": 9.9}}, base), tmp_path / text, quiet=True)
        found = rows(api.compare([tmp_path / text]))[text]
        assert (found.get("published valid"), found.get("published test")) == shown
    with pytest.raises(ConfigError, match=r"published\.text = 'pdb' is not known\. Did you mean 'ptb'"):
        api.train(apply_assignments(base, ["published.text=pdb"]), tmp_path / "pdb", quiet=True)


def test_a_store_of_other_tokens_has_no_published_figures(store, tmp_path, monkeypatch):
    sizes = {split: info.bytes for split, info in store.info.items()}
    monkeypatch.setitem(NAMED_SETS, "ours", dataclasses.replace(NAMED_SETS["ptb"], bytes=sizes))
    settings = ("train.max_steps=2", f'data.path="{store.path}"', "published.text=ours", "published.valid=1.2")
    api.train(tiny_config(*settings, "tokenizer.kind=char", "published.unit=bpc"), tmp_path / "run", quiet=True)
    found = rows(api.compare([tmp_path / "run"]))["run"]
    assert "published valid" not in found and found["unit"].startswith("perplexity a word")
