"""`recurlm eval --cache ... --dynamic ... --with ... --tune-on ...`: settings, what is tuned and on what, mistakes."""

import io
import json
import math
import shutil
import sys
from pathlib import Path

import pytest

from recurlm import api
from recurlm.cli.main import run
from recurlm.text.store import Store
from support import tiny_config

FALLBACK = ["--discount-fallback", "0.5,1,1.5"]


@pytest.fixture
def call(monkeypatch, capsys):
    """Runs a command; (exit code, stdout, stderr)."""

    def caller(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["recurlm", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
        with pytest.raises(SystemExit) as stopped:
            run()
        out, err = capsys.readouterr()
        return stopped.value.code or 0, out, err

    return caller


@pytest.fixture(scope="module")
def runs(store, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    out = {name: folder / name for name in ("neural", "sentences", "kn")}
    api.train(tiny_config(f"data.path={store.path}", "train.max_steps=40"), out["neural"], quiet=True)
    sentences = tiny_config(f"data.path={store.path}", "train.max_steps=2", "data.batching=sentence")
    api.train(sentences, out["sentences"], quiet=True)
    return out


@pytest.fixture
def values(call, runs):
    def measured(*arguments: object) -> dict:
        code, out, err = call("eval", runs["neural"], *arguments, "--json")
        assert code == 0, err
        return json.loads(out)

    return measured


def test_every_setting_is_in_the_json_and_the_runs_own_figure_stays(values, runs):
    plain = values()
    own = (runs["neural"] / "eval.json").read_bytes()
    cache = {"window": 30, "theta": 0.5, "lambda": 0.2, "rule": "exact", "chunk": 5000}
    cached = values("--cache", "window=30,theta=0.5,lambda=0.2")
    assert cached["cache"] == cache and cached["loss_nats"] != plain["loss_nats"] and "tuned" not in cached
    assert values("--cache", "window=30, lambda=0")["loss_nats"] == pytest.approx(plain["loss_nats"], abs=1e-6)
    dynamic = values("--dynamic", "lr=3e-4,batch=4,decay=0.001")
    assert dynamic["dynamic"] == {
        "rule": "rms", "lr": 3e-4, "decay": 0.001, "eps": 2e-5, "segment": 5, "batch": 4, "batches": 0, "tune_tokens": 0,
    }  # fmt: skip
    assert dynamic["loss_nats"] != plain["loss_nats"] and dynamic["targets"] == plain["targets"]
    assert dynamic["seconds"].keys() == {"statistics", "evaluation", "all"}
    both = values("--dynamic", "lr=3e-4,batch=4,decay=0.001", "--cache", "window=30,theta=0.5,lambda=0.2", "--no-ranks")
    assert both["cache"] == cache and both["dynamic"] == dynamic["dynamic"]
    assert len({v["loss_nats"] for v in (plain, cached, dynamic, both)}) == 4
    published = values("--cache", "window=30,rule=published,chunk=50", "--counting", "published")
    assert published["cache"]["rule"] == "published"
    assert (runs["neural"] / "eval.json").read_bytes() == own


def test_what_is_not_given_is_tuned_and_only_on_the_split_that_is_named(values, monkeypatch):
    read, ids = [], Store.ids
    monkeypatch.setattr(Store, "ids", lambda self, split: read.append(split) or ids(self, split))
    options = ["--cache", "window=30", "--dynamic", "batch=4,tune_tokens=300,decay=0.001", "--tune-on", "valid"]
    on_valid = values(*options, "--split", "valid")
    assert set(read) == {"train", "valid"}
    on_test = values(*options)
    for name in ("cache", "dynamic", "tuned", "tuned_on", "tuned_loss_nats", "tuned_dynamic_loss_nats"):
        assert on_valid[name] == on_test[name]
    assert on_test["tuned"] == ["lambda", "lr", "theta"] and on_test["dynamic"]["decay"] == 0.001
    assert on_valid["loss_nats"] == pytest.approx(on_valid["tuned_loss_nats"], abs=1e-5)
    given = [f"{k}={on_test['cache'][k]!r}" for k in ("window", "theta", "lambda")]
    again = values("--cache", ",".join(given), "--dynamic", f"batch=4,decay=0.001,lr={on_test['dynamic']['lr']!r}")
    assert again["loss_nats"] == pytest.approx(on_test["loss_nats"], abs=1e-6)


def test_everything_at_once(values, runs, store, call):
    if not runs["kn"].exists():
        assert call("ngram", "train", store.path, "--order", 3, "-o", runs["kn"], *FALLBACK)[0] == 0
    options = ["--cache", "window=30", "--cache", 20, "--dynamic", "batch=4,rule=sgd", "--with", runs["kn"]]
    given = values(*options, "--split", "valid")
    tuned = values(*options, "--split", "valid", "--tune-on", "valid")
    assert list(tuned["weights"]) == [str(runs["neural"]), str(runs["kn"]), "cache 20"]
    assert math.isclose(sum(tuned["weights"].values()), 1, abs_tol=1e-9)
    assert tuned["loss_nats"] < given["loss_nats"] + 1e-5
    for found in (given, tuned):
        assert found["loss_nats"] == pytest.approx(found["tuned_loss_nats"], abs=1e-5)


def test_a_table_for_people(call, runs):
    code, out, _ = call("eval", runs["neural"], "--cache", "window=9,theta=2")
    rows = dict(line.rsplit(maxsplit=1) for line in out.splitlines() if line.startswith("cache"))
    assert code == 0 and rows["cache window"] == "9" and rows["cache theta"] == "2.0000"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--cache", "windw=5"], "'window'"),
        (["--cache", "window=0"], "cache window = 0"),
        (["--cache", "window=5,theta=x"], "cache theta = 'x'"),
        (["--cache", "window=5,window=6"], "given twice"),
        (["--cache", "window"], "key=value"),
        (["--cache", "window=5,"], "key=value"),
        (["--cache", "lambda=1.5"], "from 0 to 1"),
        (["--cache", "lambda=nan"], "finite"),
        (["--cache", "0"], "cache = 0"),
        (["--cache", "-5"], "cache = -5"),
        (["--cache", "window=5", "--cache", "window=6"], "Two neural caches"),
        (["--dynamic", "lr"], "key=value"),
        (["--dynamic", "lr=-1"], "dynamic lr = -1"),
        (["--dynamic", "rule=adam"], "rms, sgd"),
        (["--dynamic", "segment=2.5"], "a whole number"),
        (["--dynamic", "lr=1e-4", "--batch-size", "2"], "batch_size = 2"),
        (["--dynamic", "lr=1e-4", "--batching", "sentence"], "--batching stream"),
        (["--cache", "window=5,theta=1,lambda=0.1", "--tune-on", "valid"], "nothing is left to tune"),
        (["--cache", "window=5", "--tune-on", "dev"], "no split 'dev'"),
        (["--tune-on", "valid"], "nothing to tune"),
        (["--cache", "5", "--suite", "blimp"], "--suite"),
    ],
)
def test_mistakes_are_one_sentence(arguments, says, call, runs):
    code, out, err = call("eval", runs["neural"], *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1) and says in err and "Traceback" not in err, err


def test_what_a_model_cannot_do(call, runs, store, tmp_path):
    code, _, err = call("eval", runs["sentences"], "--cache", "window=5")
    assert code == 2 and "--batching stream" in err
    assert call("eval", runs["sentences"], "--cache", "window=5", "--batching", "stream")[0] == 0
    if not runs["kn"].exists():
        assert call("ngram", "train", store.path, "--order", 3, "-o", runs["kn"], *FALLBACK)[0] == 0
    for options in (["--cache", "window=5"], ["--dynamic", "rule=sgd"], ["--dynamic", "rule=rms"]):
        code, _, err = call("eval", runs["kn"], *options)
        assert code == 2 and "n-gram" in err, err
    code, _, err = call("eval", runs["neural"], "--dynamic", "batch=60000")
    assert code == 3 and "too short" in err
    code, _, err = call("eval", runs["neural"], "--with", runs["neural"])
    assert code == 2 and "twice" in err


def test_another_text_and_a_training_text_that_is_gone(call, runs, text_file, tmp_path):
    code, out, err = call("eval", runs["neural"], "--data", text_file, "--dynamic", "batch=4", "--json")
    assert code == 0 and json.loads(out)["split"] == "all", err
    gone = tmp_path / "gone"
    shutil.copytree(runs["neural"], gone)
    toml = (gone / "config.toml").read_text()
    lines = ['path = "/nowhere/store"' if line.startswith("path = ") else line for line in toml.splitlines()]
    (gone / "config.toml").write_text("\n".join(lines))
    code, _, err = call("eval", gone, "--data", text_file, "--dynamic", "batch=4")
    assert code == 2 and "/nowhere/store" in err and err.count("\n") == 1, err
    assert call("eval", gone, "--data", text_file, "--dynamic", "rule=sgd")[0] == 0


def test_a_small_setting_is_shown_as_it_was_given(runs, call):
    code, out, _ = call("eval", runs["neural"], "--dynamic", "rule=sgd,lr=5e-5", "--no-ranks")
    assert code == 0
    assert "5e-05" in next(line for line in out.splitlines() if line.startswith("dynamic lr"))


@pytest.mark.parametrize("verb", [["prune", "-o", "out"], ["query", "a"], ["export", "out.arpa"]])
def test_ngram_verbs_say_that_a_neural_run_is_none_of_theirs(runs, call, verb, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = call("ngram", verb[0], runs["neural"], *verb[1:])
    assert (code, err.count("\n")) == (2, 1)
    assert "a neural model" in err
    assert not list(tmp_path.iterdir())
