"""A run directory of an earlier version loads, measures and goes on; `make golden` writes the one kept here anew."""

import json
import os
import shutil
from pathlib import Path

import pytest

from recurlm import api, files
from recurlm.config import apply_assignments, from_toml
from recurlm.errors import CheckpointError, ConfigError
from recurlm.model import directory
from recurlm.text.store import prepare
from recurlm.training import checkpoint
from recurlm.training.monitor import read_metrics
from recurlm.training.trainer import Trainer
from support import small_text, tiny_config

GOLDEN = Path(__file__).parents[1] / "golden" / "run"
SETTINGS = ("data.path=small.txt", "model.layer=qrnn", "model.hidden_size=6", "model.embedding_size=4", "model.zoneout=0.1",
            "data.batch_size=2", "train.epochs=9", "train.max_steps=20", "train.eval_every=4", "averaging.name=nt-asgd",
            "averaging.nonmono=1", "schedule.name=constant", "optimizer.name=adam", "optimizer.lr=0.1",
            "train.sample_every=15")  # fmt: skip


def numbers(run: Path) -> list[float]:
    """Every loss that the run recorded."""
    return [r[key] for r in read_metrics(run) for key in ("loss_nats", "grad_norm") if key in r]


def write_golden(scratch: Path) -> None:
    """The golden run, stopped at step 12 of 20, and what it gives when it is not stopped."""
    text = scratch / "small.txt"
    text.write_text(small_text(40))
    shutil.rmtree(GOLDEN, ignore_errors=True)
    GOLDEN.mkdir()
    store = prepare(text, tiny_config(*SETTINGS).tokenizer, GOLDEN / "store")
    Trainer(tiny_config(*SETTINGS, "train.max_steps=12"), store, GOLDEN, quiet=True).run()
    whole = scratch / "whole"
    whole.mkdir()
    Trainer(tiny_config(*SETTINGS), store, whole, quiet=True).run()
    assert numbers(whole)[: len(numbers(GOLDEN))] == numbers(GOLDEN)
    expected = {"numbers": numbers(whole), "eval": api.evaluate(GOLDEN, split="valid")["loss_nats"],
                "score": api.load(GOLDEN).score("the king drinks tea").surprisals}  # fmt: skip
    (GOLDEN / "expected.json").write_text(files.to_json(expected))


@pytest.fixture
def run(tmp_path) -> Path:
    if os.environ.get("RECURLM_WRITE_GOLDEN"):
        (tmp_path / "scratch").mkdir()
        write_golden(tmp_path / "scratch")
    return Path(shutil.copytree(GOLDEN, tmp_path / "run"))


def expected(run: Path) -> dict:
    return json.loads((run / "expected.json").read_text())


def settings_of(run: Path, *settings: str):
    return apply_assignments(
        from_toml((run / "config.toml").read_text(), "config.toml"), ["train.max_steps=20", *settings]
    )


def close(found, wanted) -> bool:
    return len(found) == len(wanted) and all(
        abs(a - b) < 1e-6 * max(1, abs(b)) for a, b in zip(found, wanted, strict=True)
    )


def test_an_old_model_measures_as_it_did(run):
    assert abs(api.evaluate(run, split="valid")["loss_nats"] - expected(run)["eval"]) < 1e-6
    assert close(api.load(run).score("the king drinks tea").surprisals, expected(run)["score"])


def test_an_old_run_goes_on_as_it_would_have(run):
    result = api.train(settings_of(run), run, resume=True, quiet=True)
    assert result.finished and result.step == 20
    assert close(numbers(run), expected(run)["numbers"])


def rewrite(run: Path, change) -> None:
    """Changes the manifest of the checkpoint, as another version would have written it."""
    for path in checkpoint.steps(run / "checkpoints"):
        manifest = json.loads((path / "manifest.json").read_text())
        change(manifest)
        files.write_manifest(path / "manifest.json", manifest)


def test_a_checkpoint_from_before_a_setting_existed_takes_its_default(run):
    def before(manifest):
        values = manifest["values"]
        for section, key in (("model", "init_range"), ("data", "rescale_lr"), ("train", "patience")):
            del values["config"][section][key]
        del values["cursor"]["due"]

    rewrite(run, before)
    with pytest.raises(ConfigError, match=r"model\.init_range is 0\.2, but the run was started with 0\.1"):
        api.train(settings_of(run, "model.init_range=0.2"), run, resume=True, quiet=True)
    api.train(settings_of(run), run, resume=True, quiet=True)
    assert close(numbers(run), expected(run)["numbers"])


def test_newer_formats_are_refused_in_a_sentence(run):
    rewrite(run, lambda manifest: manifest.update(format=2))
    with pytest.raises(CheckpointError, match=r"no checkpoint is usable.*format 2, but this recurlm reads 1"):
        api.train(settings_of(run), run, resume=True, quiet=True)
    manifest = json.loads((run / directory.MANIFEST).read_text())
    files.write_manifest(run / directory.MANIFEST, manifest | {"format": 2})
    with pytest.raises(CheckpointError, match=r"manifest\.json: format 2, but this recurlm reads 1"):
        api.load(run)


def test_nothing_of_the_writing_machine_is_in_it():
    for path in GOLDEN.rglob("*"):
        if path.is_file():
            assert b"/tmp" not in path.read_bytes() and b"/home" not in path.read_bytes(), path
